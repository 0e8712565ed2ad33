"""Acts on storage that others share: completion records, pruning, marks of distrust, each under a fence of its own.

An order can be older than it looks: the node that carries it out may have been cut off, and another cluster may use the same
run_id. So each act is done only before its time is over, and only if what it relies on lies there at that moment.
Must not decide what is recorded or removed.
"""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from backstay import __version__, faults
from backstay.errors import IntegrityError, SnapshotNotFoundError, UnavailableError
from backstay.format import json_records
from backstay.ids import SnapshotKey
from backstayd.clock import boot_s
from backstayd.coder.context import JobContext
from backstayd.coder.jobs import CheckUploaded, MarkSnapshot, PruneSnapshot, WriteRecord
from backstayd.core.inventory.distrust import MAX_REASON, why_tainted
from backstayd.core.inventory.durable_names import (
    MARKS_NAME,
    RECORD_NAME,
    attempt_of,
    is_markable,
    manifest_name,
    mark_name,
    mark_of,
    root_of,
    shard_name,
    snapshot_name,
    snapshot_url,
)
from backstayd.core.messages.decisions import Distrusted
from backstayd.core.messages.durable import PersistedSnapshot, Stored
from backstayd.durable.open import open_place
from backstayd.durable.place import Place
from backstayd.store.record_files import parse_manifest

PARALLEL_SMALL = 8  # manifests read at a time

Act = WriteRecord | PruneSnapshot | MarkSnapshot


def run_check(context: JobContext, job: CheckUploaded) -> None:
    """Do ``job``.

    Raises:
        UnavailableError (``incomplete``): a shard is not there whole.
    """
    snapshot = job.snapshot
    place = open_place(snapshot_url(job.url, snapshot.key))
    sizes = {entry.name: entry.size_bytes for entry in place.list()}
    with ThreadPoolExecutor(PARALLEL_SMALL, thread_name_prefix="record") as pool:
        ranks = range(snapshot.world_size)
        problems = list(pool.map(lambda rank: _why_incomplete(context, place, snapshot, rank, sizes), ranks))
    problem = next(filter(None, problems), "")
    if problem:
        raise UnavailableError(f"{place.url} is not complete: {problem}", reason="incomplete")


def run_record(context: JobContext, job: WriteRecord) -> None:
    """Do ``job``; ``context.persisted`` is the snapshot as its record says it. Idempotent.

    Raises:
        UnavailableError (``occupied``): another snapshot's record is there; ``distrusted``, ``superseded``, ``fenced``.
    """
    snapshot, run = job.snapshot, open_place(job.url)
    place = open_place(snapshot_url(job.url, snapshot.key))
    _require_newest(run, job)
    why = why_tainted(snapshot.key, snapshot.snapshot_id, snapshot.lineage, read_marks(run))
    if why:
        raise UnavailableError(f"step {snapshot.step} is not recorded in {job.url}: {why}", reason="distrusted")
    faults.reach("before_record", step=snapshot.step)
    written = replace(snapshot, unix_s=time.time(), writer=f"backstay {__version__} on {socket.gethostname()}")
    _require_time(context, job)
    place.create(RECORD_NAME, json_records.dumps(written))
    there = json_records.loads(PersistedSnapshot, place.read_small(RECORD_NAME))  # whoever was first
    if there.snapshot_id != snapshot.snapshot_id:
        raise UnavailableError(
            f"{place.url} holds another snapshot of step {snapshot.step} already; it is not touched", reason="occupied"
        )
    faults.reach("after_record", step=snapshot.step)
    context.persisted = there


def run_prune(context: JobContext, job: PruneSnapshot) -> None:
    """Do ``job``; fine if nothing is there.

    Raises:
        UnavailableError (``changed``): storage is not as it was when this was ordered; ``superseded``, ``fenced``.
    """
    run, name = open_place(job.url), snapshot_name(job.target.key)
    _require_newest(run, job)
    _require_grounds(run, job)
    _require_target(run, job.target)
    _require_time(context, job)
    run.remove(f"{name}/{RECORD_NAME}")
    faults.reach("mid_prune", step=job.target.step)
    run.remove_tree(name, check=lambda: _require_time(context, job))


def run_mark(context: JobContext, job: MarkSnapshot) -> None:
    """Do ``job``; fine if it is done already."""
    run, key = open_place(job.url), SnapshotKey(job.item.attempt, job.item.step)
    name = mark_name(key, job.item.snapshot_id)
    if not is_markable(job.item.snapshot_id):
        raise IntegrityError(f"{job.item.snapshot_id[:80]!r} is no snapshot id", reason="bad_record")
    open_place(root_of(job.url)).require_root()
    _require_time(context, job)
    if job.is_trusted:
        _require_newest(run, job)
        run.remove(name)
    else:
        run.create(name, json_records.dumps(job.item))


def read_marks(run: Place) -> list[Distrusted]:
    """Every mark in the run's directory ``run``, by one listing: without the reasons. Oldest first."""
    marks = [mark for entry in run.list(MARKS_NAME) if (mark := mark_of(entry.name)) is not None]
    return [
        Distrusted(snapshot_id=snapshot_id, attempt=key.attempt, step=key.step, reason="it is marked there")
        for key, snapshot_id in sorted(marks)
    ]


def with_reason(run: Place, mark: Distrusted) -> Distrusted:
    """The mark with what is written in it; it counts whatever that is."""
    name = mark_name(SnapshotKey(mark.attempt, mark.step), mark.snapshot_id)
    try:
        reason = json_records.loads(Distrusted, run.read_small(name)).reason[:MAX_REASON]
    except (IntegrityError, SnapshotNotFoundError):
        reason = "its mark cannot be read"
    return replace(mark, reason=reason)


def _require_time(context: JobContext, job: Act) -> None:
    """Called right before each change."""
    context.check()
    if boot_s() >= job.act_before_s:
        raise UnavailableError(
            "the coordinator has not confirmed it within a lease; nothing on shared storage is changed before it does",
            reason="fenced",
        )


def _require_newest(run: Place, job: Act) -> None:
    attempts = [attempt_of(entry.name) for entry in run.list() if entry.is_directory]
    newest = max((attempt for attempt in attempts if attempt is not None), default=0)
    if newest > job.newest_attempt:
        raise UnavailableError(
            f"attempt {newest} in {job.url} is of a newer history than attempt {job.newest_attempt}, the newest that the "
            "coordinator knows: another cluster has taken over this run_id, and nothing there is changed from here",
            reason="superseded",
        )


def _require_grounds(run: Place, job: PruneSnapshot) -> None:
    marks = read_marks(run)
    for kept in job.grounds:
        found = _record_at(run, kept.key)
        if found is None or found.snapshot_id != kept.snapshot_id:
            raise _changed(job.target, f"step {kept.step} of attempt {kept.attempt}, which is to stay, is not there")
        why = why_tainted(found.key, found.snapshot_id, found.lineage, marks)
        if why:
            raise _changed(job.target, f"step {kept.step} of attempt {kept.attempt} is to stay, and {why}")
    if not job.grounds:
        raise _changed(job.target, "nothing newer is named that stays")


def _require_target(run: Place, target: Stored) -> None:
    """What lies there is what the order is about, or what an earlier try left of it."""
    found = _record_at(run, target.key)
    if found is not None and found.snapshot_id != target.snapshot_id:
        what = f"snapshot {target.snapshot_id[:12]}" if target.snapshot_id else "a copy that never became whole"
        raise _changed(target, f"snapshot {found.snapshot_id[:12]} lies there, not {what}")


def _record_at(run: Place, key: SnapshotKey) -> PersistedSnapshot | None:
    """Raises IntegrityError for a record that cannot be read: that is not none."""
    try:
        return json_records.loads(PersistedSnapshot, run.read_small(f"{snapshot_name(key)}/{RECORD_NAME}"))
    except SnapshotNotFoundError:
        return None


def _changed(target: Stored, why: str) -> UnavailableError:
    return UnavailableError(
        f"step {target.step} of attempt {target.attempt} is not removed: {why}; storage is not as it was when that was "
        "ordered",
        reason="changed",
    )


def _why_incomplete(
    context: JobContext, place: Place, snapshot: PersistedSnapshot, rank: int, sizes: dict[str, int]
) -> str:
    context.check()
    shard = snapshot.shards[rank]
    name = shard_name(rank, snapshot.world_size)
    if sizes.get(name) != shard.size_bytes:
        return f"{name} has {sizes.get(name, 'no')} bytes, not {shard.size_bytes}"
    try:
        parse_manifest(place.read_small(manifest_name(rank, snapshot.world_size)), digest=shard.digest)
    except (SnapshotNotFoundError, IntegrityError) as error:
        return str(error)
    return ""
