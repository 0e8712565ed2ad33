"""Taking in what coders made: staged shards are published, plans and fragments that lie in their place enter the index.

Files come first, the index after them. Must not decide what is wanted.
"""

from __future__ import annotations

import hashlib

from backstay.errors import SnapshotNotFoundError
from backstay.format import json_records
from backstay.format.manifest import Manifest
from backstay.ids import SnapshotKey
from backstayd.core.messages.plans import FragmentRecord, ShardRecord
from backstayd.store.adopt import read_fragment, read_stored_plan, slot_id_of
from backstayd.store.directory import remove_empty
from backstayd.store.index import HeldShard, StagedFile
from backstayd.store.paths import ShardRef
from backstayd.store.record_files import make_directory, read_small
from backstayd.store.remove import discard_staged, quarantine_shard
from backstayd.store.staging import remove_staging
from backstayd.store.store import Store


def publish_staged(store: Store, ref: ShardRef) -> ShardRecord:
    """Make a complete, verified staged shard a committed one of this node; idempotent.

    Raises:
        SnapshotNotFoundError: it is not staged (and not published) here.
    """
    run, rank, world_size, digest = ref.run, ref.rank, ref.world_size, ref.digest
    index, paths = store.index(run), store.paths(run)
    present = next((held.record for held in index.shards.values() if held.record.digest == digest), None)
    if present is not None:
        discard_staged(store, ref)
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


def note_staged(store: Store, ref: ShardRef) -> None:
    """Take a staging file that a coder or the supervisor just made into the index."""
    path, digest16 = store.paths(ref.run).staged(ref.rank, ref.world_size, ref.digest), ref.digest[:16]
    if path.exists():
        store.index(ref.run).staged[ref.rank, digest16] = StagedFile(
            rank=ref.rank, world_size=ref.world_size, digest16=digest16, size_bytes=path.lstat().st_size
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
