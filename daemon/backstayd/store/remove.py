"""Taking things out of the store: release, drop, quarantine.

Commit records go first, so that no reader begins on bytes that are about to change. Only what is named is deleted.
"""

from __future__ import annotations

import shutil

from backstay import faults
from backstay.ids import SnapshotKey
from backstayd.core.messages.plans import FragmentRecord, Quarantined
from backstayd.store.adopt import (
    Finding,
    FindingKind,
    quarantined_fragment,
)
from backstayd.store.directory import remove_empty
from backstayd.store.index import UNKNOWN_UID, HeldShard, RunIndex
from backstayd.store.paths import ShardRef
from backstayd.store.staging import remove_staging
from backstayd.store.store import Store


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


def discard_staged(store: Store, ref: ShardRef) -> None:
    """Remove what is staged of one shard; idempotent."""
    remove_staging(store.paths(ref.run), rank=ref.rank, world_size=ref.world_size, digest=ref.digest)
    store.index(ref.run).staged.pop((ref.rank, ref.digest[:16]), None)
