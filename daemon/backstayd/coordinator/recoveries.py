"""Metrics of recoveries: how many began, how each ended, how long its phases took.

Looks at the core after every evaluation and decides nothing. Time is an argument.
"""

from __future__ import annotations

from typing import Final

from backstayd.core.inventory.nodes import NodeTable
from backstayd.core.messages.decisions import Decision
from backstayd.core.recover.ledger import farthest_source
from backstayd.core.recover.recovery import ACTIVE, Recovery, Stage
from backstayd.core.run_state import RunState
from backstayd.telemetry.metrics import CoordinatorMetrics

ORDER: Final = (Stage.FENCING, Stage.PREPARE, Stage.RECORD, Stage.RELEASED)
PHASE_AFTER: Final = {Stage.FENCING: "decide", Stage.PREPARE: "stage", Stage.RECORD: "release"}


class RecoveryWatch:
    """The recoveries of one run; a decision that a former coordinator released does not count."""

    def __init__(self, run: str, metrics: CoordinatorMetrics) -> None:
        self._run = run
        self._metrics = metrics
        self._stage = Stage.IDLE
        self._world_id = ""
        self._stage_began_s = 0.0
        self._lost_s: float | None = None

    def look(self, state: RunState, nodes: NodeTable, now_s: float) -> None:
        """Call once after every evaluation."""
        recovery = state.recovery
        if (recovery.stage, recovery.world_id) != (self._stage, self._world_id):
            self._follow(recovery, now_s)
        if recovery.stage is Stage.RELEASED and state.context is not None:
            self._watch_world(state, nodes, now_s)

    def _follow(self, recovery: Recovery, now_s: float) -> None:
        was_active = self._stage in ACTIVE
        if was_active and (recovery.world_id != self._world_id or recovery.stage is Stage.IDLE):
            self._end("abandoned")
            was_active = False
        if recovery.stage in ACTIVE and not was_active:
            self._begin(recovery)
            was_active = True
        if was_active:
            self._advance(recovery, now_s)
        self._stage, self._world_id = recovery.stage, recovery.world_id

    def _begin(self, recovery: Recovery) -> None:
        self._metrics.recoveries_started.of(self._run).inc()
        self._stage, self._stage_began_s = Stage.FENCING, recovery.opened_s
        if self._lost_s is not None:
            self._observe("restart", recovery.opened_s - self._lost_s)
            self._lost_s = None

    def _advance(self, recovery: Recovery, now_s: float) -> None:
        if recovery.stage is Stage.REFUSED:
            self._observe("decide", now_s - self._stage_began_s)
            self._end("refused")
        elif recovery.stage in ORDER and self._stage in ORDER:
            for passed in ORDER[ORDER.index(self._stage) : ORDER.index(recovery.stage)]:
                self._observe(PHASE_AFTER[passed], now_s - self._stage_began_s)
                self._stage_began_s = now_s
            if recovery.stage is Stage.FENCING:  # decided anew: the time of what failed is in no phase
                self._stage_began_s = now_s
            if recovery.stage is Stage.RELEASED and recovery.decision is not None:
                self._release(recovery.decision)

    def _release(self, decision: Decision) -> None:
        for source in decision.sources:
            self._metrics.recovery_shards.of(self._run, source=source.kind.value).inc()
        farthest = farthest_source(decision)
        self._end(decision.outcome.value.lower(), source=farthest.value if farthest is not None else "none")

    def _end(self, outcome: str, *, source: str = "none") -> None:
        self._metrics.recoveries.of(self._run, source=source, outcome=outcome).inc()

    def _observe(self, phase: str, seconds: float) -> None:
        self._metrics.recovery_phase_seconds.labels(phase=phase).observe(max(0.0, seconds))

    def _watch_world(self, state: RunState, nodes: NodeTable, now_s: float) -> None:
        """Note when the world was seen to be broken."""
        context, decision = state.context, state.recovery.decision
        assert context is not None
        if decision is None:
            return
        world = context.worlds.get(decision.world_id, {})
        if len(world) == decision.world_size:  # after each evaluation: not by every rank
            self._lost_s = None
            return
        missing = [place.node for place in decision.placements if place.rank not in world]
        if not missing or decision.world_id in state.forgetting.ended:
            self._lost_s = None
        elif self._lost_s is None:
            self._lost_s = now_s
            silent_s = [now_s - nodes.nodes[name].seen_s for name in missing if name in nodes.nodes]
            self._observe("detect", max(silent_s, default=0.0))
