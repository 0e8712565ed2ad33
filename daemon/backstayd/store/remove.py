"""Taking things out of the store and putting staged shards in: release, drop, quarantine, publish.

Commit records go first, so that no reader begins on bytes that are about to change. Only what is named is deleted.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from typing import Any

from backstay import faults
from backstay.errors import SnapshotNotFoundError
from backstay.format import json_records
from backstay.format.manifest import Manifest
from backstay.ids import SnapshotKey
from backstayd.core.messages.plans import FragmentRecord, Quarantined, ShardRecord
from backstayd.store import published
from backstayd.store.adopt import (
    Finding,
    FindingKind,
    quarantined_fragment,
    read_fragment,
    read_stored_plan,
    slot_id_of,
)
from backstayd.store.index import UNKNOWN_UID, HeldShard, RunIndex, StagedFile
from backstayd.store.record_files import make_directory, read_small
from backstayd.store.staging import remove_staging
from backstayd.store.store import Store, remove_empty


def release_snapshot(store: Store, run: str, key: SnapshotKey) -> bool:
    """Delete shards and parity of one snapshot; slots of attached ranks stay as free slots. Returns whether any was here."""
    index, paths = store.runs.get(run), store.paths(run)
    if index is None:
        return False
    doomed = [(owner, shard) for (owner_key, owner), shard in index.shards.items() if owner_key == key]
    for rank, shard in doomed:
        _withdraw_shard(store, index, key, rank, shard)
    plans = [plan_id for plan_id, plan in index.plans.items() if plan.key == key]
    for plan_id in plans:
        drop_plan(store, run, plan_id)
    directory = paths.snapshot(key)
    was_here = bool(doomed or plans) or directory.exists()
    shutil.rmtree(directory, ignore_errors=True)
    remove_empty(directory.parent)
    return was_here


def _withdraw_shard(store: Store, index: RunIndex, key: SnapshotKey, rank: int, shard: HeldShard) -> None:
    paths = store.paths(index.run)
    paths.manifest(key, rank, shard.record.world_size).unlink(missing_ok=True)
    del index.shards[key, rank]
    faults.reach("mid_release", step=key.step, rank=rank)
    path = paths.shard(key, rank, shard.record.world_size)
    if store.slots.hosted.get((index.run, rank)) == shard.record.world_size and path.exists():
        store.slots.shelve(index, path, rank=rank)
    else:
        path.unlink(missing_ok=True)
        store.slots.forget_holder(index, shard.slot_id)


def drop_plan(store: Store, run: str, plan_id: str) -> bool:
    """Delete parity and plan file of one plan; returns whether it was here. The plan file goes first: late puts bounce."""
    index = store.runs.get(run)
    plan = index.plans.pop(plan_id, None) if index is not None else None
    if index is None or plan is None:
        return False
    paths = store.paths(run)
    paths.plan(plan.key, plan_id).unlink(missing_ok=True)
    for fragment in [fragment for fragment in index.fragments if fragment.plan_id == plan_id]:
        del index.fragments[fragment]
    for path in sorted(paths.parity(plan.key).glob(f"plan-{plan_id}.stripe-*"), reverse=True):  # records before bytes
        path.unlink(missing_ok=True)
    remove_empty(paths.parity(plan.key))
    remove_empty(paths.snapshot(plan.key))
    return True


def drop_decision(store: Store, run: str) -> None:
    """Delete the recorded decision; idempotent."""
    index = store.runs.get(run)
    store.paths(run).decision.unlink(missing_ok=True)
    if index is not None:
        index.decision, index.recorded_unix_s = None, 0.0


def drop_vanished(store: Store) -> list[str]:
    """Strike out what somebody deleted behind our back: a report promises only what is there. Returns names."""
    names = []
    for run, index in store.runs.items():
        paths = store.paths(run)
        for (key, rank), shard in list(index.shards.items()):
            world_size = shard.record.world_size
            path = paths.shard(key, rank, world_size)
            if not (path.exists() and paths.manifest(key, rank, world_size).exists()):
                names.append(path.name)
                _withdraw_shard(store, index, key, rank, shard)
        for plan_id, plan in list(index.plans.items()):
            if not paths.plan(plan.key, plan_id).exists():
                names.append(f"plan {plan_id[:8]}")
                drop_plan(store, run, plan_id)
        for fragment in list(index.fragments):
            key = index.plans[fragment.plan_id].key
            path = paths.fragment(key, fragment.plan_id, stripe=fragment.stripe, index=fragment.index)
            if not path.exists():
                names.append(path.name)
                del index.fragments[fragment]
        for slot in list(index.slots.values()):
            if slot.slot_id not in store.slots.grants and not paths.slot(slot.rank, slot.number).exists():
                names.append(f"slot {slot.number} of rank {slot.rank}")
                store.slots.discard(index, slot)
        if index.decision is not None and not paths.decision.exists():
            names.append(paths.decision.name)
            index.decision = None
        if index.distrusted and not paths.distrusted.exists():
            names.append(paths.distrusted.name)
            known, index.distrusted = index.distrusted, ()
            store.record_distrust(run, known)
        if index.owner_uid != UNKNOWN_UID and not paths.owner.exists():
            names.append(paths.owner.name)
            store.write_owner(run, index.owner_uid)
    return names


def quarantine_shard(store: Store, run: str, key: SnapshotKey, *, rank: int, reason: str) -> Quarantined | None:
    """Put a bad shard aside; returns its entry, None when it is not here any more."""
    index = store.runs.get(run)
    shard = index.shards.pop((key, rank), None) if index is not None else None
    if index is None or shard is None:
        return None
    paths = store.paths(run)
    entry = Quarantined(
        what=f"shard rank {rank} of step {key.step}", attempt=key.attempt, step=key.step, reason=reason, rank=rank
    )
    world_size = shard.record.world_size
    store.quarantine_files(
        Finding(
            kind=FindingKind.DAMAGED,
            path=paths.shard(key, rank, world_size),
            reason=reason,
            run=run,
            quarantined=entry,
            companions=(paths.manifest(key, rank, world_size),),
        )
    )
    store.slots.forget_holder(index, shard.slot_id)
    return entry


def quarantine_fragment(store: Store, run: str, fragment: FragmentRecord, *, reason: str) -> Quarantined | None:
    """Put a bad parity fragment aside; returns its entry, None when it is not here any more."""
    index = store.runs.get(run)
    if index is None or index.fragments.pop(fragment, None) is None:
        return None
    plan, paths = index.plans[fragment.plan_id], store.paths(run)
    entry = quarantined_fragment(plan, fragment, reason)
    store.quarantine_files(
        Finding(
            kind=FindingKind.DAMAGED,
            path=paths.fragment(plan.key, plan.plan_id, stripe=fragment.stripe, index=fragment.index),
            reason=reason,
            run=run,
            quarantined=entry,
            companions=(paths.fragment_record(plan.key, plan.plan_id, stripe=fragment.stripe, index=fragment.index),),
        )
    )
    return entry


def publish_staged(store: Store, run: str, *, rank: int, world_size: int, digest: str) -> ShardRecord:
    """Make a complete, verified staged shard a committed one of this node; idempotent.

    Raises:
        SnapshotNotFoundError: it is not staged (and not published) here.
    """
    index, paths = store.index(run), store.paths(run)
    present = next((held.record for held in index.shards.values() if held.record.digest == digest), None)
    if present is not None:
        discard_staged(store, run, rank=rank, world_size=world_size, digest=digest)
        return present
    raw = read_small(paths.staged_manifest(rank, world_size, digest))
    manifest = json_records.loads(Manifest, raw)
    key = SnapshotKey(manifest.attempt, manifest.step)
    if (key, rank) in index.shards:
        quarantine_shard(
            store, run, key, rank=rank, reason="another history wrote the same step; its bytes are not wanted"
        )
    target = paths.shard(key, rank, world_size)
    make_directory(target.parent)
    part = paths.staged(rank, world_size, digest)
    try:
        part.rename(target)
    except FileNotFoundError as error:
        raise SnapshotNotFoundError(f"rank {rank} ({digest[:16]}) is not staged here") from error
    paths.staged_manifest(rank, world_size, digest).rename(paths.manifest(key, rank, world_size))
    remove_staging(paths, rank=rank, world_size=world_size, digest=digest)
    index.staged.pop((rank, digest[:16]), None)
    shard = ShardRecord(
        attempt=key.attempt,
        step=key.step,
        rank=rank,
        world_size=world_size,
        size_bytes=manifest.size_bytes,
        digest=hashlib.sha256(raw).hexdigest(),
        world_id=manifest.world_id,
        layout=manifest.layout,
    )
    index.shards[key, rank] = HeldShard(record=shard, slot_id=slot_id_of(target.lstat()))
    return shard


def discard_staged(store: Store, run: str, *, rank: int, world_size: int, digest: str) -> None:
    """Remove what is staged of one shard; idempotent."""
    remove_staging(store.paths(run), rank=rank, world_size=world_size, digest=digest)
    store.index(run).staged.pop((rank, digest[:16]), None)


def note_staged(store: Store, run: str, *, rank: int, world_size: int, digest: str) -> None:
    """Take a staging file that a coder or the supervisor just made into the index."""
    path = store.paths(run).staged(rank, world_size, digest)
    if path.exists():
        store.index(run).staged[rank, digest[:16]] = StagedFile(
            rank=rank, world_size=world_size, digest16=digest[:16], size_bytes=path.lstat().st_size
        )


def note_plan(store: Store, run: str, key: SnapshotKey, plan_id: str) -> bool:
    """Take a plan that a coder stored into the index; returns whether it is new."""
    known = store.runs.get(run)
    if known is not None and plan_id in known.plans:
        return False
    try:
        plan = read_stored_plan(store.paths(run), key, plan_id)
    except SnapshotNotFoundError:
        return False
    store.index(run).plans[plan_id] = plan
    return True


def note_fragment(store: Store, run: str, key: SnapshotKey, fragment: FragmentRecord) -> bool:
    """Take a fragment that a coder published into the index; returns whether it is new.

    One whose plan was dropped while it was being published is removed: nothing else would find it.
    """
    note_plan(store, run, key, fragment.plan_id)
    index, paths = store.runs.get(run), store.paths(run)
    plan = index.plans.get(fragment.plan_id) if index is not None else None
    if index is None or plan is None:
        place = {"stripe": fragment.stripe, "index": fragment.index}
        paths.fragment_record(key, fragment.plan_id, **place).unlink(missing_ok=True)
        paths.fragment(key, fragment.plan_id, **place).unlink(missing_ok=True)
        remove_empty(paths.parity(key))
        remove_empty(paths.snapshot(key))
        return False
    if fragment in index.fragments:
        return False
    try:
        index.fragments[fragment] = read_fragment(paths, plan, fragment)
    except (SnapshotNotFoundError, FileNotFoundError):
        return False
    return True


def open_for_trainer(store: Store, run: str, key: SnapshotKey, *, rank: int) -> tuple[int, dict[str, Any]]:
    """A read-only descriptor of a committed shard and its manifest.

    The descriptor carries a shared lock for as long as the trainer has it, so that the slot is not filled under its eyes.

    Raises:
        SnapshotNotFoundError: it is not here.
    """
    held = store.index(run).shards.get((key, rank))
    if held is None:
        raise SnapshotNotFoundError(f"rank {rank} of step {key.step} is not on this node")
    paths, world_size = store.paths(run), held.record.world_size
    with published.open_shard(paths, key, rank=rank, world_size=world_size, digest=held.record.digest) as (fd, _):
        manifest = json_records.loads(dict, read_small(paths.manifest(key, rank, world_size)))
        return os.dup(fd), manifest
