"""What jobs of the coders and snapshots of the trainers cost, as metrics. Must not decide anything."""

from __future__ import annotations

from typing import Final

from backstay.protocol import messages
from backstayd.coder.jobs import (
    CheckUploaded,
    CoderEvent,
    DecodeStripe,
    EncodeStripe,
    FetchChunks,
    FetchManifests,
    FetchPlan,
    FetchShard,
    Job,
    JobResult,
    MarkSnapshot,
    PruneSnapshot,
    SurveyStorage,
    UploadShard,
    VerifyFragment,
    VerifyShard,
    WriteRecord,
)
from backstayd.telemetry.metrics import NodeMetrics

MAX_COST_S: Final = 3600.0  # of one message: more is not believed
MAX_COST_BYTES: Final = 1 << 50
STAGES: Final[dict[type[Job], str]] = {
    EncodeStripe: "encode",
    DecodeStripe: "rebuild",
    FetchPlan: "fetch",
    FetchShard: "fetch",
    FetchManifests: "fetch",
    FetchChunks: "fetch",
    VerifyShard: "verify",
    VerifyFragment: "verify",
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
    """Bytes that peers read and wrote since the coder's last event of this kind."""
    metrics.peer_bytes.labels(direction="sent").inc(event.sent_bytes)
    metrics.peer_bytes.labels(direction="received").inc(event.received_bytes)


def note_cost(metrics: NodeMetrics, run: str, cost: messages.TrainerCost) -> tuple[float, float]:
    """What snapshots cost a trainer since its last message with a cost.

    Returns how long it was held up, and how much of that it waited for slots and for copying.
    """
    blocked = metrics.trainer_blocked_seconds
    snapshot_s, fence_s = _within(cost.snapshot_s, MAX_COST_S), _within(cost.fence_s, MAX_COST_S)
    blocked.of(run, where="snapshot").inc(snapshot_s)
    blocked.of(run, where="fence").inc(fence_s)
    if cost.capture_s > 0:
        metrics.stage_seconds.labels(stage="capture").observe(_within(cost.capture_s, MAX_COST_S))
    metrics.stage_bytes.of(run, stage="capture").inc(_within(cost.copied_bytes, MAX_COST_BYTES))
    metrics.trainer_kept_bytes.of(run).inc(_within(cost.kept_bytes, MAX_COST_BYTES))
    return snapshot_s + fence_s, min(_within(cost.waited_s, MAX_COST_S), fence_s)


def _within(value: float, most: float) -> float:
    return min(max(value, 0), most)
