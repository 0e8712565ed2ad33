"""The node's metrics, kept in step with what the node holds and does. Must not decide anything.

Counters are fed where things happen; what can be read off the store and the sessions is read here now and then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from backstay.protocol import messages
from backstayd.coder.jobs import (
    CheckUploaded,
    CoderEvent,
    DecodeStripe,
    EncodeStripe,
    FetchChunks,
    FetchManifests,
    FetchPersisted,
    FetchPlan,
    FetchShard,
    Job,
    JobResult,
    MarkSnapshot,
    PruneSnapshot,
    SurveyStorage,
    UploadShard,
    VerifyFragment,
    VerifyPersisted,
    VerifyShard,
    WriteRecord,
)
from backstayd.node.node_state import NodeContext
from backstayd.node.trainers.session import Session
from backstayd.telemetry.heartbeat_margin import LeastMargin
from backstayd.telemetry.metrics import NodeMetrics

if TYPE_CHECKING:
    from backstayd.node.reconcile.reconciler import Reconciler

MAX_COST_S: Final = 3600.0  # of one message: a trainer that says more is not believed
MAX_COST_BYTES: Final = 1 << 50
STAGES: Final[dict[type[Job], str]] = {
    EncodeStripe: "encode",
    DecodeStripe: "rebuild",
    FetchPlan: "fetch",
    FetchShard: "fetch",
    FetchManifests: "fetch",
    FetchChunks: "fetch",
    FetchPersisted: "fetch",
    VerifyShard: "verify",
    VerifyFragment: "verify",
    VerifyPersisted: "verify",
    UploadShard: "persist",
    CheckUploaded: "record",
    WriteRecord: "record",
    MarkSnapshot: "record",
    SurveyStorage: "survey",
    PruneSnapshot: "prune",
}


def note_job(metrics: NodeMetrics, job: Job, result: JobResult, seconds: float) -> None:
    """A coder job ended."""
    stage = STAGES[type(job)]
    metrics.stage_seconds.labels(stage=stage).observe(seconds)
    metrics.stage_runs.labels(stage=stage, result="failed" if result.error_class else "ok").inc()
    for part, spent_s in result.seconds.items():
        metrics.stage_part_seconds.labels(stage=stage, part=part).inc(max(0.0, spent_s))
    metrics.stage_bytes.of(run_of(job), stage=stage).inc(result.done_bytes)
    metrics.verified_bytes.inc(result.done_bytes)
    if result.flipped_in_flight:
        metrics.corrupt.labels(where="in_flight").inc(result.flipped_in_flight)


def run_of(job: Job) -> str:
    """The run that a job is about."""
    if isinstance(job, (EncodeStripe, FetchPlan, VerifyFragment)):
        return job.plan.run
    if isinstance(job, DecodeStripe):
        return job.rebuild.plan.run
    return job.run


def note_traffic(metrics: NodeMetrics, event: CoderEvent) -> None:
    """A coder says what peers read and put since it said so last."""
    metrics.peer_bytes.labels(direction="sent").inc(event.sent_bytes)
    metrics.peer_bytes.labels(direction="received").inc(event.received_bytes)


def note_cost(metrics: NodeMetrics, run: str, cost: messages.TrainerCost | None) -> tuple[float, float]:
    """What a trainer says its snapshots cost it since it said so last; an older one says nothing.

    Returns how long it was held up, and how much of that it waited for slots and for copying.
    """
    if cost is None:
        return 0.0, 0.0
    blocked = metrics.trainer_blocked_seconds
    snapshot_s, fence_s = _within(cost.snapshot_s, MAX_COST_S), _within(cost.fence_s, MAX_COST_S)
    blocked.of(run, where="snapshot").inc(snapshot_s)
    blocked.of(run, where="fence").inc(fence_s)
    if cost.capture_s > 0:
        metrics.stage_seconds.labels(stage="capture").observe(_within(cost.capture_s, MAX_COST_S))
    metrics.stage_bytes.of(run, stage="capture").inc(_within(cost.copied_bytes, MAX_COST_BYTES))
    metrics.trainer_kept_bytes.of(run).inc(_within(cost.kept_bytes, MAX_COST_BYTES))
    return snapshot_s + fence_s, min(_within(cost.waited_s, MAX_COST_S), fence_s)


class NodeGauges:
    """Everything that is read now and then, and how close the coordinator's answers come to the lease."""

    def __init__(self, metrics: NodeMetrics, *, lease_s: float, now_s: Callable[[], float]) -> None:
        self._metrics = metrics
        self._lease_s = lease_s
        self._now_s = now_s
        self._margin = LeastMargin(lease_s)
        self._answered_s: float | None = None

    def note_answer(self) -> None:
        """The coordinator answered."""
        now_s = self._now_s()
        if self._answered_s is not None:
            self._margin.note(self._lease_s - (now_s - self._answered_s), now_s)
        self._answered_s = now_s

    def note_lost(self) -> None:
        """The line is lost: the next answer is the first of another one."""
        self._margin.note(0.0, self._now_s())
        self._answered_s = None

    def update(self, context: NodeContext, sessions: Iterable[Session], reconciler: Reconciler) -> None:
        """Read off what is held; series of runs that nobody knows here any more go."""
        metrics, store = self._metrics, context.store
        for use, size_bytes in store.used_by().items():
            metrics.memory_used_bytes.labels(use=use).set(size_bytes)
        metrics.memory_capacity_bytes.set(store.capacity_bytes)
        metrics.memory_free_bytes.set(store.free_bytes)
        metrics.memory_quota_bytes.set(store.quota_bytes)
        metrics.coordinator_connected.set(context.is_coordinator_connected())
        metrics.node_draining.set(context.drain.is_draining)
        metrics.node_lease_margin_seconds.set(self._margin.least_s(self._now_s()))
        metrics.peers.set(sum(1 for name in reconciler.peers if name != context.identity.name))
        known = {*store.runs, *context.desired, *(session.run for session in sessions)}
        metrics.keep_runs(known)


def _within(value: float, most: float) -> float:
    return min(max(value, 0), most)
