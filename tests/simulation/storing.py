"""What a simulated node does with durable storage: list it, copy shards to it, prune it, read from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backstay.ids import SnapshotKey
from backstayd.core.records import (
    Decision,
    ShardRecord,
    ShardSource,
    StorageDesired,
    Upload,
    UploadState,
    UploadTask,
)

if TYPE_CHECKING:
    from tests.simulation.node import Node


def keep_stored(node: Node, run: str, desired: StorageDesired) -> None:
    """List, copy and prune as is wanted; each thing in its own time."""
    work = node.work[run]
    if desired.survey_id and (work.survey is None or work.survey.survey_id != desired.survey_id):
        node.job(run, ("survey", desired.survey_id), _survey, node, run, desired.survey_id)
    for task in desired.uploads:
        for rank in (*task.ranks, *((-1,) if task.is_last else ())):
            node.job(run, ("upload", task.snapshot.snapshot_id, rank), _upload, node, task, rank)
    for key in desired.prune:
        if key not in work.pruned:
            node.job(run, ("prune", key), _prune, node, run, key)


def _survey(node: Node, run: str, survey_id: str) -> bool:
    node.work[run].survey = node.cluster.storage.survey(run, survey_id)
    node.changed()
    return True


def _upload(node: Node, task: UploadTask, rank: int) -> bool:
    snapshot, work = task.snapshot, node.work[task.snapshot.run]
    held = node.memory[snapshot.run].shards.get((snapshot.attempt, snapshot.step, rank))
    if rank < 0:
        why = node.cluster.storage.write_record(snapshot)
    elif held is None or held.digest != snapshot.shards[rank].digest:
        why = "it is not in memory here"
    elif held.digest in node.memory[snapshot.run].corrupt:
        node.quarantine_shard(snapshot.run, held)
        why = "it is corrupt"
    else:
        why = node.cluster.storage.write_shard(snapshot, rank, held)
    state = UploadState.FAILED if why else UploadState.DONE
    work.uploads[snapshot.snapshot_id, rank] = Upload(
        snapshot_id=snapshot.snapshot_id, rank=rank, state=state, reason=why
    )
    node.changed()
    is_wanted = work.desired is not None and work.desired.storage is not None and any(
        other.snapshot == snapshot and (rank in other.ranks or (rank < 0 and other.is_last))
        for other in work.desired.storage.uploads
    )  # fmt: skip
    return not why or not is_wanted


def _prune(node: Node, run: str, key: SnapshotKey) -> bool:
    if not node.cluster.storage.prune(run, key):
        return False
    node.work[run].pruned.add(key)
    node.cluster.checker.pruned(run, key)
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
