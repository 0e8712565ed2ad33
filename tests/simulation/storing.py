"""What a simulated node does with durable storage: list it, copy shards to it, prune it, read from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backstay.ids import SnapshotKey
from backstayd.core.messages.decisions import Decision, Distrusted, ShardSource
from backstayd.core.messages.durable import StorageDesired, Stored, Survey, Upload, UploadState, UploadTask
from backstayd.core.messages.plans import ShardRecord
from backstayd.core.protect.durable_uploads import RECORD_RANK

if TYPE_CHECKING:
    from tests.simulation.node import Node


def keep_stored(node: Node, run: str, desired: StorageDesired) -> None:
    """List, copy, record, prune and mark as is wanted; each thing in its own time."""
    work = node.work[run]
    is_surveyed = work.survey is not None and work.survey.survey_id == desired.survey_id and work.survey.is_done
    if desired.survey_id and not is_surveyed:  # what failed is tried again, as the daemon does
        node.job(run, ("survey", desired.survey_id), _survey, node, run, desired.survey_id)
    for task in desired.uploads:
        for rank in (*task.ranks, *((RECORD_RANK,) if task.is_last else ())):
            node.job(run, ("upload", task.snapshot.snapshot_id, rank), _upload, node, task, rank)
    for item in desired.prunes:
        if item.key not in work.pruned:
            node.job(run, ("prune", item), _prune, node, run, item)
    for mark in desired.distrust:
        if mark.snapshot_id not in work.marked:
            node.job(run, ("distrust", mark.snapshot_id), _mark, node, run, mark, False)
    for mark in desired.trust:
        if mark.snapshot_id not in work.struck:
            node.job(run, ("trust", mark.snapshot_id), _mark, node, run, mark, True)


def _survey(node: Node, run: str, survey_id: str) -> bool:
    """What it listed is reported a while later: storage may be another by then."""
    found = node.cluster.storage.survey(run, survey_id)
    node.job(run, ("listed", survey_id), _listed, node, run, found)
    return True


def _listed(node: Node, run: str, found: Survey) -> bool:
    node.work[run].survey = found
    node.changed()
    return True


def _upload(node: Node, task: UploadTask, rank: int) -> bool:
    snapshot, work = task.snapshot, node.work[task.snapshot.run]
    if rank == RECORD_RANK:
        wanted = _wanted(node, snapshot.run)
        if wanted is None or not any(t.snapshot == snapshot and t.is_last for t in wanted.uploads):
            return not _is_wanted(node, task, rank)  # not by anybody it heard of a moment ago
        why = node.cluster.storage.write_record(snapshot, newest_attempt=wanted.newest_attempt)
    else:
        why = _why_not_uploaded(node, task, rank)
    state = UploadState.FAILED if why else UploadState.DONE
    work.uploads[snapshot.snapshot_id, rank] = Upload(
        snapshot_id=snapshot.snapshot_id, rank=rank, state=state, reason=why
    )
    node.changed()
    return not why or not _is_wanted(node, task, rank)


def _why_not_uploaded(node: Node, task: UploadTask, rank: int) -> str:
    snapshot = task.snapshot
    held = node.memory[snapshot.run].shards.get((snapshot.attempt, snapshot.step, rank))
    if held is None or held.digest != snapshot.shards[rank].digest:
        return "it is not in memory here"
    if held.digest in node.memory[snapshot.run].corrupt:
        node.quarantine_shard(snapshot.run, held)
        return "it is corrupt"
    return node.cluster.storage.write_shard(snapshot, rank, held)


def _is_wanted(node: Node, task: UploadTask, rank: int) -> bool:
    desired = node.work[task.snapshot.run].desired
    return (
        desired is not None
        and desired.storage is not None
        and any(
            other.snapshot == task.snapshot and (rank in other.ranks or (rank == RECORD_RANK and other.is_last))
            for other in desired.storage.uploads
        )
    )


def _wanted(node: Node, run: str) -> StorageDesired | None:
    """What the coordinator wants of shared storage; None once it has not confirmed that for a lease."""
    work = node.work[run]
    if work.desired is None or node.cluster.engine.now_s >= work.confirmed_s + node.cluster.lease_s:
        return None
    return work.desired.storage


def _prune(node: Node, run: str, item: Stored) -> bool:
    """Waits for a confirmation, and ends with the order: a node that is cut off keeps both."""
    desired, wanted = node.work[run].desired, _wanted(node, run)
    if desired is None or desired.storage is None or item not in desired.storage.prunes:
        return True
    if wanted is None or node.cluster.storage.prune(
        run, item, grounds=wanted.grounds, newest_attempt=wanted.newest_attempt
    ):
        return False
    node.work[run].pruned.add(item.key)
    node.cluster.checker.pruned(run, item.key)
    node.changed()
    return True


def _mark(node: Node, run: str, item: Distrusted, is_struck: bool) -> bool:
    """Write the mark of a distrusted snapshot, or strike it out."""
    wanted, storage, work = _wanted(node, run), node.cluster.storage, node.work[run]
    if wanted is None or item not in (wanted.trust if is_struck else wanted.distrust):
        return wanted is not None
    if (storage.strike if is_struck else storage.mark)(run, item):
        return False
    (work.struck if is_struck else work.marked).add(item.snapshot_id)
    node.changed()
    return True


def is_stored(node: Node, decision: Decision, source: ShardSource) -> bool:
    assert decision.base is not None
    key = SnapshotKey(decision.base.attempt, decision.base.step)
    return node.cluster.storage.read(decision.run, key, source.rank, source.digest)


def fetch_stored(node: Node, decision: Decision, source: ShardSource) -> bool:
    assert decision.base is not None
    if not is_stored(node, decision, source):
        return False
    base = decision.base
    node.memory[decision.run].shards[base.attempt, base.step, source.rank] = ShardRecord(
        attempt=base.attempt, step=base.step, rank=source.rank, world_size=base.world_size,
        size_bytes=source.size_bytes, digest=source.digest, world_id=node.cluster.writer_of(source.digest),
    )  # fmt: skip
    node.changed()
    return True
