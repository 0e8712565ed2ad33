"""What a node does with durable storage: surveys, uploads, completion records, pruning, as the coordinator wants them.

Level-triggered like the rest of the node: wanted and done are compared after every change; what failed is tried again with
growing pauses. Runs in a coder of its own, so that a store that hangs holds up nothing else. Decides nothing.

Records, prunes and marks change what others share and nobody can take back: each needs an answer of the coordinator that still
wants it, to a report sent less than a lease ago. A node that is cut off goes on uploading, which harms nobody.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

from backstay.ids import SnapshotKey
from backstayd.coder.jobs import (
    CheckUploaded,
    CoderEvent,
    Corrupt,
    Job,
    JobResult,
    MarkSnapshot,
    PruneSnapshot,
    SurveyStorage,
    UploadShard,
    WriteRecord,
)
from backstayd.core.durable_uploads import RECORD_RANK
from backstayd.core.inventory.survey import SURVEY_DEADLINE_S
from backstayd.core.messages.decisions import Distrusted
from backstayd.core.messages.desired import NodeDesired
from backstayd.core.messages.durable import PersistedSnapshot, StorageDesired, Stored, Survey, Upload, UploadState
from backstayd.node.node_state import NodeContext
from backstayd.node.reconcile.actions import STORAGE_DEADLINE_S, STORAGE_FLOOR_BYTES_PER_S
from backstayd.node.reconcile.tasks import Tasks

logger = logging.getLogger(__name__)

PARALLEL_UPLOADS: Final = 2  # per node, over all runs
LAST_PAUSE_LEASES: Final = 3
FENCED: Final = "fenced"  # as coder/durable/shared_changes.py says it
LOUD_FAILURES: Final = (1, 2, 4, 8, 16)  # of a task; in between only debug says so

RunJob = Callable[[Job], Awaitable[JobResult]]


@dataclass(slots=True)
class _RunState:
    """What this daemon did and found for one run."""

    survey: Survey | None = None
    uploads: dict[tuple[str, int], Upload] = field(default_factory=dict)  # (snapshot id, rank)
    pruned: set[Stored] = field(default_factory=set)
    marked: set[str] = field(default_factory=set)
    struck: set[str] = field(default_factory=set)
    confirmed_s: float = float("-inf")  # when the newest report was sent whose answer names this run


class Storing:
    """Owns its tasks and what they found.

    Args:
        run_job: Runs a job on the storage coder.
        quarantine: Takes a shard of this node that failed verification out of use.
    """

    def __init__(self, context: NodeContext, run_job: RunJob, quarantine: Callable[[Corrupt], None]) -> None:
        self._context = context
        self._run_job = run_job
        self._quarantine = quarantine
        self._runs: dict[str, _RunState] = {}
        self._is_kicked = False
        self._is_closed = False
        self.tasks = Tasks(context.clock, self.kick, last_pause_s=LAST_PAUSE_LEASES * context.lease_s)

    async def close(self) -> None:
        self._is_closed = True
        await self.tasks.close()

    def survey(self, run: str) -> Survey | None:
        state = self._runs.get(run)
        return state.survey if state is not None else None

    def uploads(self, run: str) -> tuple[Upload, ...]:
        state = self._runs.get(run)
        return tuple(upload for _, upload in sorted(state.uploads.items())) if state is not None else ()

    def pruned(self, run: str) -> tuple[SnapshotKey, ...]:
        state = self._runs.get(run)
        return tuple(sorted(item.key for item in state.pruned)) if state is not None else ()

    def marked(self, run: str) -> tuple[str, ...]:
        state = self._runs.get(run)
        return tuple(sorted(state.marked)) if state is not None else ()

    def struck(self, run: str) -> tuple[str, ...]:
        state = self._runs.get(run)
        return tuple(sorted(state.struck)) if state is not None else ()

    def on_desired(self, desired: NodeDesired, answered_s: float) -> None:
        """The coordinator wanted this when a report arrived that was sent at ``answered_s`` (since boot).

        What it does not name is confirmed by nobody, though it stays wanted for a while under a new coordinator.
        """
        if desired.generation == self._context.store.generation:  # else it is an older one, which nobody obeys
            named = {run.run for run in desired.runs if run.storage is not None}
            for run in self._runs.keys() - named:
                self._runs[run].confirmed_s = float("-inf")
            for run in named:
                state = self._runs.setdefault(run, _RunState())
                state.confirmed_s = max(state.confirmed_s, answered_s)
        self.kick()

    def on_event(self, event: CoderEvent) -> None:
        """How far an upload is."""
        state = self._runs.get(event.run)
        for place, upload in state.uploads.items() if state is not None else ():
            if upload.state is UploadState.UPLOADING and place[1] == event.rank and state is not None:
                state.uploads[place] = replace(upload, done_bytes=event.size_bytes)
                self._context.notify()
                return

    def kick(self) -> None:
        """Look again soon."""
        if not self._is_kicked and not self._is_closed:
            self._is_kicked = True
            asyncio.get_running_loop().call_soon(self._pass)

    def _pass(self) -> None:
        self._is_kicked = False
        if self._is_closed:
            return
        for run in {*self._context.desired, *self._runs}:
            desired = self._context.desired.get(run)
            self._pass_run(run, desired.storage if desired is not None else None)

    def _pass_run(self, run: str, desired: StorageDesired | None) -> None:
        running = self.tasks.running(run)
        if desired is None:
            for key in running:
                self.tasks.cancel(key)
            self._runs.pop(run, None)
            return
        state = self._runs.setdefault(run, _RunState())
        wanted = {task.snapshot.snapshot_id for task in desired.uploads}
        state.uploads = {place: upload for place, upload in state.uploads.items() if place[0] in wanted}
        state.pruned &= set(desired.prunes)
        state.marked &= {item.snapshot_id for item in desired.distrust}
        state.struck &= {item.snapshot_id for item in desired.trust}
        jobs = self._jobs(run, state, desired)
        for key in running - set(jobs):
            self.tasks.cancel(key)
        settled = self.tasks.settled(run)
        for key, work in jobs.items():
            if key not in running and key not in settled and (not key.startswith("upload:") or self._has_place()):
                self.tasks.start(key, run, work)

    def _has_place(self) -> bool:
        running = [key for run in self._runs for key in self.tasks.running(run)]
        return sum(1 for key in running if key.startswith("upload:")) < PARALLEL_UPLOADS

    def _jobs(self, run: str, state: _RunState, desired: StorageDesired) -> dict[str, Callable[[], Awaitable[None]]]:
        """Everything that is wanted and not done, by the name of its task."""
        jobs: dict[str, Callable[[], Awaitable[None]]] = {}
        survey = state.survey
        is_surveyed = survey is not None and survey.survey_id == desired.survey_id and survey.is_done
        if desired.survey_id and not is_surveyed:
            jobs[f"survey:{run}:{desired.survey_id}"] = lambda: self._survey(run, desired)
        for task in desired.uploads:
            snapshot = task.snapshot
            for rank in task.ranks:
                if not self._is_done(state, snapshot, rank) and self._holds(run, snapshot, rank):
                    key = f"upload:{run}:{snapshot.snapshot_id}:{rank}"
                    jobs[key] = lambda key=key, snapshot=snapshot, rank=rank: (  # type: ignore[misc]
                        self._upload(run, key, snapshot, rank, desired)
                    )
        return jobs | (self._acts(run, state, desired) if self._is_confirmed(state) else {})

    def _acts(self, run: str, state: _RunState, desired: StorageDesired) -> dict[str, Callable[[], Awaitable[None]]]:
        """What changes storage that others share."""
        acts: dict[str, Callable[[], Awaitable[None]]] = {}
        for task in desired.uploads:
            snapshot = task.snapshot
            if task.is_last and not self._is_done(state, snapshot, RECORD_RANK):
                key = f"record:{run}:{snapshot.snapshot_id}"
                acts[key] = lambda key=key, snapshot=snapshot: self._record(run, key, snapshot, desired)  # type: ignore[misc]
        for item in desired.prunes:
            if item not in state.pruned:
                key = f"prune:{run}:{item.attempt}:{item.step}:{item.snapshot_id}"
                acts[key] = lambda key=key, item=item: self._prune(run, key, item, desired)  # type: ignore[misc]
        for mark in desired.distrust:
            if mark.snapshot_id not in state.marked:
                key = f"distrust:{run}:{mark.snapshot_id}"
                acts[key] = lambda key=key, mark=mark: self._mark(run, key, mark, desired)  # type: ignore[misc]
        for mark in desired.trust:
            if mark.snapshot_id not in state.struck:
                key = f"trust:{run}:{mark.snapshot_id}"
                acts[key] = lambda key=key, mark=mark: self._strike(run, key, mark, desired)  # type: ignore[misc]
        return acts

    def _is_confirmed(self, state: _RunState) -> bool:
        return self._context.clock.boot_s() < self._act_before_s(state)

    def _act_before_s(self, state: _RunState | None) -> float:
        """Until then the coordinator cannot have counted this node lost since it wanted what it wants of the run."""
        return state.confirmed_s + self._context.lease_s if state is not None else float("-inf")

    def _is_done(self, state: _RunState, snapshot: PersistedSnapshot, rank: int) -> bool:
        upload = state.uploads.get((snapshot.snapshot_id, rank))
        return upload is not None and upload.state is UploadState.DONE

    def _holds(self, run: str, snapshot: PersistedSnapshot, rank: int) -> bool:
        index = self._context.store.runs.get(run)
        held = index.shards.get((snapshot.key, rank)) if index is not None else None
        return held is not None and held.record.digest == snapshot.shards[rank].digest

    async def _survey(self, run: str, desired: StorageDesired) -> None:
        key = f"survey:{run}:{desired.survey_id}"
        job = SurveyStorage(run=run, url=desired.url, survey_id=desired.survey_id, deadline_s=SURVEY_DEADLINE_S)
        result = await self._attempt(run, job)
        state = self._runs.get(run)
        if state is None:
            return
        if result.survey is not None and not result.error_class:
            state.survey = result.survey
        else:
            state.survey = Survey(url=desired.url, survey_id=desired.survey_id, error=result.message)
            self._failed(run, key, result)
        self._context.changed()

    async def _upload(
        self, run: str, key: str, snapshot: PersistedSnapshot, rank: int, desired: StorageDesired
    ) -> None:
        shard, rate = snapshot.shards[rank], desired.bandwidth_bytes_per_s
        floor = STORAGE_FLOOR_BYTES_PER_S
        slowest = min(floor, rate / (2 * PARALLEL_UPLOADS)) if rate else floor
        job = UploadShard(
            run=run,
            attempt=snapshot.attempt,
            step=snapshot.step,
            rank=rank,
            world_size=snapshot.world_size,
            size_bytes=shard.size_bytes,
            digest=shard.digest,
            url=desired.url,
            mark=self._context.identity.name,
            bandwidth_bytes_per_s=rate,
            deadline_s=STORAGE_DEADLINE_S + shard.size_bytes / slowest,
        )
        self._note(run, snapshot, rank, UploadState.UPLOADING, total=shard.size_bytes)
        result = await self._attempt(run, job)
        for corrupt in result.corrupt:
            self._quarantine(corrupt)
        if not result.error_class:
            self._context.metrics.persisted_bytes.of(run).inc(shard.size_bytes)
        self._end(run, key, result, snapshot=snapshot, rank=rank, size_bytes=shard.size_bytes)

    async def _record(self, run: str, key: str, snapshot: PersistedSnapshot, desired: StorageDesired) -> None:
        deadline_s = STORAGE_DEADLINE_S + snapshot.world_size
        result = await self._attempt(run, CheckUploaded(snapshot=snapshot, url=desired.url, deadline_s=deadline_s))
        if not result.error_class:  # that can take longer than a confirmation holds
            job = WriteRecord(snapshot=snapshot, **self._fence(run, desired))
            result = await self._attempt(run, job)
        if not result.error_class:
            self._say("persisted", run, f"step {snapshot.step} of attempt {snapshot.attempt} is in {desired.url}")
        self._end(run, key, result, snapshot=snapshot, rank=RECORD_RANK, size_bytes=0)

    async def _prune(self, run: str, key: str, item: Stored, desired: StorageDesired) -> None:
        job = PruneSnapshot(run=run, target=item, grounds=desired.grounds, **self._fence(run, desired))
        if await self._act(run, key, job):
            self._runs[run].pruned.add(item)
            self._say("pruned", run, f"step {item.step} of attempt {item.attempt} was removed from {desired.url}")
        self._context.changed()

    async def _mark(self, run: str, key: str, item: Distrusted, desired: StorageDesired) -> None:
        if await self._act(run, key, MarkSnapshot(run=run, item=item, **self._fence(run, desired))):
            self._runs[run].marked.add(item.snapshot_id)
            self._say(
                "marked", run, f"step {item.step} of attempt {item.attempt} is marked distrusted in {desired.url}"
            )
        self._context.changed()

    async def _strike(self, run: str, key: str, item: Distrusted, desired: StorageDesired) -> None:
        if await self._act(run, key, MarkSnapshot(run=run, item=item, is_trusted=True, **self._fence(run, desired))):
            self._runs[run].struck.add(item.snapshot_id)
            self._say("struck", run, f"step {item.step} of attempt {item.attempt} is trusted again in {desired.url}")
        self._context.changed()

    async def _act(self, run: str, key: str, job: PruneSnapshot | MarkSnapshot) -> bool:
        """Whether it was done, and the run is still here."""
        result = await self._attempt(run, job)
        if result.error_class:
            self._failed(run, key, result)
        return not result.error_class and run in self._runs

    def _fence(self, run: str, desired: StorageDesired) -> dict[str, Any]:
        """What an act on shared storage carries of when and on what it may be done."""
        return {
            "url": desired.url,
            "newest_attempt": desired.newest_attempt,
            "act_before_s": self._act_before_s(self._runs.get(run)),
            "deadline_s": STORAGE_DEADLINE_S,
        }

    def _end(
        self, run: str, key: str, result: JobResult, *, snapshot: PersistedSnapshot, rank: int, size_bytes: int
    ) -> None:
        if result.reason == FENCED:  # the order was not confirmed in time: that is not the snapshot's fault
            self._failed(run, key, result)
        elif result.error_class:
            self._failed(run, key, result)
            self._note(run, snapshot, rank, UploadState.FAILED, total=size_bytes, reason=result.message)
        else:
            self._note(run, snapshot, rank, UploadState.DONE, total=size_bytes, done=size_bytes)
        self._context.changed()

    def _note(
        self,
        run: str,
        snapshot: PersistedSnapshot,
        rank: int,
        state: UploadState,
        *,
        total: int,
        done: int = 0,
        reason: str = "",
    ) -> None:
        runs = self._runs.get(run)
        if runs is not None:
            runs.uploads[snapshot.snapshot_id, rank] = Upload(
                snapshot_id=snapshot.snapshot_id,
                rank=rank,
                state=state,
                done_bytes=done,
                total_bytes=total,
                reason=reason,
            )
            self._context.notify()

    async def _attempt(self, run: str, job: Job) -> JobResult:
        self._context.metrics.storage_attempts.of(run).inc()
        return await self._run_job(job)

    def _failed(self, run: str, key: str, result: JobResult) -> None:
        """Say so, less and less often, count it, and try again after a pause."""
        count = self.tasks.fail(key, run)
        level = logging.WARNING if count in LOUD_FAILURES else logging.DEBUG
        logger.log(level, "run %s: %s failed (%d): %s", run, key.partition(":")[0], count, result.message)
        self._context.metrics.storage_failures.of(run, reason=result.reason).inc()

    def _say(self, kind: str, run: str, message: str) -> None:
        logger.info("run %s: %s: %s", run, kind, message)
        self._context.timeline.add(kind, run, message)
