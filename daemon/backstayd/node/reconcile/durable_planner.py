"""What a node does next with durable storage for one run: survey, uploads, and changes of what others share. Pure.

Records, prunes and marks change what others share and nobody can take back: each needs an answer of the coordinator that still
wants it, to a report sent less than a lease ago. A node that is cut off continues to upload, which harms nobody.
"""

from __future__ import annotations

from typing import Any, Final

from backstayd.coder.jobs import MarkSnapshot, PruneSnapshot, SurveyStorage, UploadShard, WriteRecord
from backstayd.core.inventory.survey import SURVEY_DEADLINE_S
from backstayd.core.messages.durable import PersistedSnapshot, StorageDesired
from backstayd.core.protect.durable_uploads import RECORD_RANK
from backstayd.node.deadlines import STORAGE_DEADLINE_S, STORAGE_FLOOR_BYTES_PER_S
from backstayd.node.reconcile.actions import StartJob, View
from backstayd.node.reconcile.tasks import TaskKey, TaskKind
from backstayd.store.paths import ShardRef

PARALLEL_UPLOADS: Final = 2  # per node, over all runs


def durable_jobs(view: View) -> list[StartJob]:
    """Everything that is wanted and not done."""
    desired = view.desired.storage
    if desired is None:
        return []
    jobs = [*_survey(view, desired), *_uploads(view, desired)]
    return [*jobs, *_shared_changes(view, desired)] if view.is_confirmed else jobs


def _survey(view: View, desired: StorageDesired) -> list[StartJob]:
    run, survey = view.desired.run, view.durable.survey
    is_done = survey is not None and survey.survey_id == desired.survey_id and survey.is_done
    if not desired.survey_id or is_done:
        return []
    job = SurveyStorage(run=run, url=desired.url, survey_id=desired.survey_id, deadline_s=SURVEY_DEADLINE_S)
    return [StartJob(key=TaskKey(run, TaskKind.SURVEY, desired.survey_id), job=job)]


def _uploads(view: View, desired: StorageDesired) -> list[StartJob]:
    held = {(shard.key, shard.rank): shard.digest for shard in view.shards}
    return [
        _upload(view, desired, task.snapshot, rank)
        for task in desired.uploads
        for rank in task.ranks
        if not view.durable.is_uploaded(task.snapshot.snapshot_id, rank)
        and held.get((task.snapshot.key, rank)) == task.snapshot.shards[rank].digest
    ]


def _upload(view: View, desired: StorageDesired, snapshot: PersistedSnapshot, rank: int) -> StartJob:
    shard, rate = snapshot.shards[rank], desired.bandwidth_bytes_per_s
    floor = STORAGE_FLOOR_BYTES_PER_S
    slowest = min(floor, rate / (2 * PARALLEL_UPLOADS)) if rate else floor
    job = UploadShard(
        shard=ShardRef(
            run=view.desired.run,
            key=snapshot.key,
            rank=rank,
            world_size=snapshot.world_size,
            digest=shard.digest,
        ),
        size_bytes=shard.size_bytes,
        url=desired.url,
        mark=view.node,
        bandwidth_bytes_per_s=rate,
        deadline_s=STORAGE_DEADLINE_S + shard.size_bytes / slowest,
    )
    return StartJob(key=TaskKey(view.desired.run, TaskKind.UPLOAD, snapshot.snapshot_id, rank), job=job)


def _shared_changes(view: View, desired: StorageDesired) -> list[StartJob]:
    run, durable = view.desired.run, view.durable
    fence: dict[str, Any] = {  # when and on what it may be done
        "url": desired.url,
        "newest_attempt": desired.newest_attempt,
        "act_before_s": view.confirmed_until_s,
        "deadline_s": STORAGE_DEADLINE_S,
    }
    jobs = []
    for task in desired.uploads:
        snapshot = task.snapshot
        if task.is_last and not durable.is_uploaded(snapshot.snapshot_id, RECORD_RANK):
            key = TaskKey(run, TaskKind.COMPLETE, snapshot.snapshot_id, RECORD_RANK)
            jobs.append(StartJob(key=key, job=WriteRecord(snapshot=snapshot, **fence)))
    for target in desired.prunes:
        if target not in durable.pruned:
            key = TaskKey(run, TaskKind.PRUNE, f"{target.attempt}:{target.step}:{target.snapshot_id}")
            job = PruneSnapshot(run=run, target=target, grounds=desired.grounds, **fence)
            jobs.append(StartJob(key=key, job=job))
    for item in desired.distrust:
        if item.snapshot_id not in durable.marked:
            key = TaskKey(run, TaskKind.DISTRUST, item.snapshot_id)
            jobs.append(StartJob(key=key, job=MarkSnapshot(run=run, item=item, **fence)))
    for item in desired.trust:
        if item.snapshot_id not in durable.struck:
            key = TaskKey(run, TaskKind.TRUST, item.snapshot_id)
            jobs.append(StartJob(key=key, job=MarkSnapshot(run=run, item=item, is_trusted=True, **fence)))
    return jobs
