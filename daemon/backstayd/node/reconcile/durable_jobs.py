"""Work of a node on durable storage: its jobs, and what they did and found for each run. Decides nothing.

The jobs run in a coder of their own, so that a store that hangs holds up nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from backstayd.coder.jobs import (
    CheckUploaded,
    CoderEvent,
    Job,
    JobResult,
    MarkSnapshot,
    PruneSnapshot,
    SurveyStorage,
    UploadShard,
    WriteRecord,
)
from backstayd.core.messages.decisions import Distrusted
from backstayd.core.messages.desired import NodeDesired, RunDesired
from backstayd.core.messages.durable import PersistedSnapshot, Stored, Survey, Upload, UploadState
from backstayd.node.coders import Coders
from backstayd.node.deadlines import STORAGE_DEADLINE_S
from backstayd.node.node_state import NodeState
from backstayd.node.reconcile.actions import DurableRun
from backstayd.node.reconcile.quarantine import BadSources
from backstayd.node.reconcile.tasks import TaskKey, Tasks

logger = logging.getLogger(__name__)

FENCED: Final = "fenced"  # the reason in coder/durable/shared_changes.py
LOUD_FAILURES: Final = (1, 2, 4, 8, 16)  # of a task; those in between are logged at level DEBUG


class DurableRecords:
    """What this daemon did and found, by run."""

    def __init__(self, node: NodeState) -> None:
        self._node = node
        self._runs: dict[str, DurableRun] = {}

    def of(self, run: str) -> DurableRun:
        return self._runs.get(run) or DurableRun()

    def confirm(self, desired: NodeDesired, answered_s: float) -> None:
        """The coordinator wanted this when it received a report that was sent at ``answered_s`` (since boot).

        What it does not name is unconfirmed, even where it stays wanted for a while under a new coordinator.
        """
        if desired.generation == self._node.store.generation:  # else it is an older one, which nobody obeys
            named = {run.run for run in desired.runs if run.storage is not None}
            for run in self._runs.keys() - named:
                self._runs[run].confirmed_s = float("-inf")
            for run in named:
                state = self._runs.setdefault(run, DurableRun())
                state.confirmed_s = max(state.confirmed_s, answered_s)

    def trim(self, desired: Mapping[str, RunDesired]) -> list[str]:
        """Forget what is no longer wanted; returns the runs for which nothing is."""
        for run, wanted in desired.items():
            if wanted.storage is not None:
                self._runs.setdefault(run, DurableRun()).trim(wanted.storage)
        ended = [run for run in self._runs if run not in desired or desired[run].storage is None]
        for run in ended:
            del self._runs[run]
        return ended

    def confirmed_until_s(self, run: str) -> float:
        """Until then the coordinator cannot have counted this node lost since it wanted what it wants of the run."""
        return self.of(run).confirmed_s + self._node.lease_s

    def note_upload(
        self, key: TaskKey, state: UploadState, *, total_bytes: int, done_bytes: int = 0, reason: str = ""
    ) -> None:
        """Record the progress of the upload of the snapshot and rank of ``key``."""
        if key.run in self._runs:
            self._runs[key.run].uploads[key.subject, key.index] = Upload(
                snapshot_id=key.subject,
                rank=key.index,
                state=state,
                done_bytes=done_bytes,
                total_bytes=total_bytes,
                reason=reason,
            )
            self._node.report_due.notify()

    def note_progress(self, event: CoderEvent) -> None:
        """A coder uploaded more of a shard."""
        assert event.shard is not None
        uploads = self.of(event.shard.run).uploads
        for place, upload in uploads.items():
            if upload.state is UploadState.UPLOADING and place[1] == event.shard.rank:
                uploads[place] = replace(upload, done_bytes=event.size_bytes)
                self._node.report_due.notify()
                return


class DurableJobs:
    """Runs jobs and records their results."""

    def __init__(
        self, node: NodeState, coders: Coders, tasks: Tasks, records: DurableRecords, bad_sources: BadSources
    ) -> None:
        self._node = node
        self._coders = coders
        self._tasks = tasks
        self._records = records
        self._bad_sources = bad_sources

    async def run(self, key: TaskKey, job: Job) -> None:
        """Do ``job``; a completion record is written only after a check that all shards are there."""
        if isinstance(job, UploadShard):
            self._records.note_upload(key, UploadState.UPLOADING, total_bytes=job.size_bytes)
        elif isinstance(job, WriteRecord):
            deadline_s = STORAGE_DEADLINE_S + job.snapshot.world_size
            result = await self._attempt(key, CheckUploaded(snapshot=job.snapshot, url=job.url, deadline_s=deadline_s))
            if result.error_class:
                self._failed(key, job, result)
                return
            # the check can take longer than a confirmation holds
            job = replace(job, act_before_s=self._records.confirmed_until_s(key.run))
        result = await self._attempt(key, job)
        for corrupt in result.corrupt:
            self._bad_sources.quarantine(corrupt)
        if result.error_class:
            self._failed(key, job, result)
        else:
            self._done(key, job, result)

    async def _attempt(self, key: TaskKey, job: Job) -> JobResult:
        self._node.metrics.storage_attempts.of(key.run).inc()
        return await self._coders.run(job)

    def _done(self, key: TaskKey, job: Job, result: JobResult) -> None:
        run, state = key.run, self._records.of(key.run)
        if isinstance(job, SurveyStorage):
            state.survey = result.survey
        elif isinstance(job, UploadShard):
            self._node.metrics.persisted_bytes.of(run).inc(job.size_bytes)
            size = job.size_bytes
            self._records.note_upload(key, UploadState.DONE, total_bytes=size, done_bytes=size)
        elif isinstance(job, WriteRecord):
            self._records.note_upload(key, UploadState.DONE, total_bytes=0)
            self._log("persisted", run, job.snapshot, f"is in {job.url}")
        elif isinstance(job, PruneSnapshot):
            state.pruned.add(job.target)
            self._log("pruned", run, job.target, f"was removed from {job.url}")
        elif isinstance(job, MarkSnapshot) and job.is_trusted:
            state.struck.add(job.item.snapshot_id)
            self._log("struck", run, job.item, f"is trusted again in {job.url}")
        elif isinstance(job, MarkSnapshot):
            state.marked.add(job.item.snapshot_id)
            self._log("marked", run, job.item, f"is marked distrusted in {job.url}")
        self._node.changed()

    def _failed(self, key: TaskKey, job: Job, result: JobResult) -> None:
        """Log it, less and less often, count it, and try again after a pause."""
        count = self._tasks.fail(key)
        level = logging.WARNING if count in LOUD_FAILURES else logging.DEBUG
        logger.log(level, "run %s: %s failed (failure no. %d): %s", key.run, key.kind, count, result.message)
        self._node.metrics.storage_failures.of(key.run, reason=result.reason).inc()
        if isinstance(job, SurveyStorage):
            self._records.of(key.run).survey = Survey(url=job.url, survey_id=job.survey_id, error=result.message)
        elif isinstance(job, (UploadShard, WriteRecord)) and result.reason != FENCED:
            # a fenced job says nothing about the snapshot
            size = job.size_bytes if isinstance(job, UploadShard) else 0
            self._records.note_upload(key, UploadState.FAILED, total_bytes=size, reason=result.message)
        self._node.changed()

    def _log(self, kind: str, run: str, snapshot: PersistedSnapshot | Stored | Distrusted, what: str) -> None:
        self._node.log_event(kind, run, f"step {snapshot.step} of attempt {snapshot.attempt} {what}")
