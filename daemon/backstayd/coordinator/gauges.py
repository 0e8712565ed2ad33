"""The coordinator's metrics, updated from the core. Must not decide anything."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from backstayd.coordinator.recoveries import RecoveryWatch
from backstayd.core.coordinator import Coordinator
from backstayd.core.evaluation import Evaluation
from backstayd.core.inventory.nodes import Liveness, NodeTable
from backstayd.core.messages.report import NodeReport
from backstayd.core.policy import CorePolicy
from backstayd.core.protect.retention import ABANDONED
from backstayd.core.run_state import RunState
from backstayd.core.timeline import Event
from backstayd.telemetry.heartbeat_margin import LeastMargin
from backstayd.telemetry.metrics import CoordinatorMetrics
from backstayd.telemetry.metrics.coordinator import PHASES, RUN_PARTS

WHOLE_S: Final = 0.25  # what takes a look at every rank, or sums up a ledger, is done at most so often


@dataclass(slots=True)
class _Seen:
    """What was exported of one run last, since it has series."""

    complete_s: dict[str, float] = field(default_factory=dict)  # snapshot id -> when it was seen to be complete
    protected: set[str] = field(default_factory=set)
    persisted: str = ""
    ledger: dict[str, float] = field(default_factory=dict)  # sums that were exported
    whole_s: float = float("-inf")


class Gauges:
    """Series of runs that are gone are dropped, so that a long-lived coordinator does not grow."""

    def __init__(self, metrics: CoordinatorMetrics, policy: CorePolicy) -> None:
        self._metrics = metrics
        self._seen: dict[str, _Seen] = {}
        self._recoveries: dict[str, RecoveryWatch] = {}  # those of runs without series last for some time as well
        self._lease_s = policy.lease_s
        self._margin = LeastMargin(policy.lease_s)
        metrics.report_lease_margin_seconds.set(policy.lease_s)
        self.adopt(policy)

    def adopt(self, policy: CorePolicy) -> None:
        """Show these settings from now on."""
        has_storage = policy.persist_url != ""
        self._metrics.persist_interval_seconds.set(policy.persist_every_s if has_storage else 0)
        self._metrics.persist_interval_steps.set(policy.persist_every_steps if has_storage else 0)

    def close(self) -> None:
        """Another coordinator leads: drop the series of runs, which that one exports."""
        self._seen.clear()
        self._recoveries.clear()
        self._metrics.keep_runs(())
        for liveness in Liveness:
            self._metrics.nodes.labels(state=liveness.value).set(0)
        self._metrics.coordinator_settled.set(0)

    def note_report(self, report: NodeReport, nodes: NodeTable, now_s: float) -> None:
        """Note how close a node was to being called lost; before the core takes its report in."""
        known = nodes.nodes.get(report.node.name)
        if known is None or known.identity.incarnation != report.node.incarnation:
            return
        gap_s = now_s - known.seen_s
        self._metrics.report_lease_ratio.observe(gap_s / self._lease_s)
        self._margin.note(self._lease_s - gap_s, now_s)

    def count(self, event: Event) -> None:
        """Counters follow events."""
        metrics = self._metrics
        counters = {
            "complete": metrics.snapshots_complete,
            "protected": metrics.snapshots_protected,
            "persisted": metrics.snapshots_persisted,
            "quarantined": metrics.quarantined,
            "rebuild": metrics.rebuilds_started,
            "repaired": metrics.rebuilds_finished,
            "gate_failed": metrics.gates_failed,
        }
        if event.kind in counters:
            counters[event.kind].of(event.run).inc()
        elif event.cause == ABANDONED:
            metrics.snapshots_abandoned.of(event.run).inc()

    def update(self, core: Coordinator, *, now_s: float, unix_s: float) -> None:
        """Gauges follow the state."""
        metrics = self._metrics
        states = Counter(node.liveness for node in core.nodes.nodes.values())
        for liveness in Liveness:
            metrics.nodes.labels(state=liveness.value).set(states[liveness])
        metrics.coordinator_settled.set(core.is_settled)
        metrics.generation.set(core.generation.number)
        metrics.report_lease_margin_seconds.set(self._margin.least_s(now_s))
        for run, state in core.runs.items():
            if state.evaluation is None:
                continue
            if run not in self._recoveries:
                self._recoveries[run] = RecoveryWatch(run, metrics)
            self._recoveries[run].look(state, core.nodes, now_s)
            if metrics.admit(run):
                self._update_run(state, state.evaluation, now_s=now_s, unix_s=unix_s)
        for run in self._recoveries.keys() - core.runs.keys():
            del self._recoveries[run]
            self._seen.pop(run, None)
        metrics.keep_runs(core.runs)

    def _update_run(self, state: RunState, evaluation: Evaluation, *, now_s: float, unix_s: float) -> None:
        metrics, run = self._metrics, state.run
        if run not in self._seen:
            self._seen[run] = _Seen()
            metrics.first_seen_timestamp_seconds.of(run).set(unix_s)
        seen = self._seen[run]
        metrics.spares.of(run).set(evaluation.spares)
        metrics.spares_wanted.of(run).set(evaluation.wanted)
        metrics.complete_step.of(run).set(evaluation.complete_step)
        metrics.protected_step.of(run).set(evaluation.protected_step)
        behind = state.lag.behind
        since_unix_s = unix_s - (now_s - behind.since_s) if behind is not None else 0.0
        metrics.behind_since_timestamp_seconds.of(run).set(since_unix_s)
        metrics.snapshot_interval_steps.of(run).set(state.interval.schedule.interval_steps)
        metrics.snapshot_wait_ratio.of(run).set(state.interval.waits.share)
        metrics.distrusted_snapshots.of(run).set(len(state.probation.distrusted))
        self._note_progress(state, unix_s)
        self._note_persisted(state, unix_s)
        if now_s - seen.whole_s >= WHOLE_S:
            seen.whole_s = now_s
            self._note_trainers(state, evaluation)
            self._note_ledger(state, now_s)

    def _note_trainers(self, state: RunState, evaluation: Evaluation) -> None:
        metrics, run = self._metrics, state.run
        sessions = [s.record for world in evaluation.context.worlds.values() for s in world.values()]
        phases = Counter(session.phase.value for session in sessions)
        for phase in PHASES:
            metrics.trainers.of(run, phase=phase).set(phases[phase])
        stored = max((view.key.step for view in evaluation.context.live_views), default=0)
        metrics.trainer_step.of(run).set(max([stored, *(session.skipped_step for session in sessions)]))

    def _note_progress(self, state: RunState, unix_s: float) -> None:
        """When snapshots became complete and protected, and how long one took from the first to the second."""
        metrics, run, seen = self._metrics, state.run, self._seen[state.run]
        complete = {snapshot: seen.complete_s.get(snapshot, unix_s) for snapshot in state.memory.holders}
        if complete.keys() - seen.complete_s.keys():
            metrics.complete_timestamp_seconds.of(run).set(unix_s)
        protected = set(state.memory.protected)
        for snapshot in protected - seen.protected:
            metrics.protected_timestamp_seconds.of(run).set(unix_s)
            if snapshot in seen.complete_s:
                metrics.protect_seconds.of(run).observe(max(0.0, unix_s - seen.complete_s[snapshot]))
        seen.complete_s, seen.protected = complete, protected

    def _note_persisted(self, state: RunState, unix_s: float) -> None:
        newest, seen = state.persisting.newest, self._seen[state.run]
        if newest is None or newest.snapshot_id == seen.persisted:
            return
        seen.persisted = newest.snapshot_id
        metrics, run = self._metrics, state.run
        metrics.persisted_step.of(run).set(newest.step)
        metrics.persisted_size_bytes.of(run).set(sum(shard.size_bytes for shard in newest.shards))
        metrics.persisted_timestamp_seconds.of(run).set(newest.unix_s or unix_s)

    def _note_ledger(self, state: RunState, now_s: float) -> None:
        """The sums of the run's ledger. They outlive coordinators, so the counters of this one begin where they are."""
        metrics, run, seen = self._metrics, state.run, self._seen[state.run]
        document = state.accounts.document(now_s)
        if document is None:
            return
        sums = {part: float(document[f"{part}_s"]) for part in RUN_PARTS} | {"steps": float(document["steps_lost"])}
        grown = {name: max(0.0, total - seen.ledger.get(name, 0.0)) for name, total in sums.items()}
        seen.ledger = {name: seen.ledger.get(name, 0.0) + more for name, more in grown.items()}
        for part in RUN_PARTS:
            metrics.run_seconds.of(run, part=part).inc(grown[part])
        metrics.steps_lost.of(run).inc(grown["steps"])
        if document["goodput"] is not None:
            metrics.goodput_ratio.of(run).set(document["goodput"])
