"""The coordinator's metrics, kept in step with the core. Must not decide anything."""

from __future__ import annotations

from collections import Counter

from backstayd.core.coordinator import Coordinator
from backstayd.core.nodes import Liveness
from backstayd.core.timeline import Event
from backstayd.telemetry.metrics import Metrics


class Gauges:
    """Series of runs that are gone are dropped, so that a long-lived coordinator does not grow."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._runs: set[str] = set()
        self._protected_steps: dict[str, int] = {}
        self._persisted: dict[str, str] = {}

    def count(self, event: Event) -> None:
        """Counters follow events."""
        metrics = self._metrics
        if event.kind == "complete":
            metrics.snapshots_complete.labels(training_job=event.run).inc()
        elif event.kind == "protected":
            metrics.snapshots_protected.labels(training_job=event.run).inc()
        elif event.kind == "released_snapshot" and "without a snapshot" in event.message:
            metrics.snapshots_abandoned.labels(training_job=event.run).inc()
        elif event.kind in ("released", "refused"):
            outcome = "refused" if event.kind == "refused" else _outcome(event.message)
            metrics.recoveries.labels(training_job=event.run, outcome=outcome).inc()

    def update(self, core: Coordinator, *, unix_s: float) -> None:
        """Gauges follow the state."""
        metrics = self._metrics
        states = Counter(node.liveness for node in core.nodes.nodes.values())
        for liveness in Liveness:
            metrics.nodes.labels(state=liveness.value).set(states[liveness])
        for run, state in core.runs.items():
            evaluation = state.evaluation
            if evaluation is None:
                continue
            self._runs.add(run)
            metrics.spares.labels(training_job=run).set(evaluation.spares)
            metrics.complete_step.labels(training_job=run).set(evaluation.complete_step)
            metrics.protected_step.labels(training_job=run).set(evaluation.protected_step)
            if self._protected_steps.get(run) != evaluation.protected_step:
                self._protected_steps[run] = evaluation.protected_step
                metrics.protected_timestamp_seconds.labels(training_job=run).set(unix_s)
            newest = state.persisting.newest
            if newest is not None:
                metrics.persisted_step.labels(training_job=run).set(newest.step)
                metrics.persisted_size_bytes.labels(training_job=run).set(sum(s.size_bytes for s in newest.shards))
                if self._persisted.get(run) != newest.snapshot_id:
                    self._persisted[run] = newest.snapshot_id
                    metrics.persisted_timestamp_seconds.labels(training_job=run).set(newest.unix_s or unix_s)
        for run in sorted(self._runs - set(core.runs)):
            self._persisted.pop(run, None)
            metrics.forget_run(run)
            self._runs.discard(run)
            self._protected_steps.pop(run, None)


def _outcome(message: str) -> str:
    """The first word of a released decision's sentence is its outcome, but for one from scratch."""
    word = message.partition(":")[0]
    return word.lower() if word in ("EXACT", "EXACT_OLDER") else "none"
