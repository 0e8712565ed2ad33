"""What a world restored is on trial: the gate before its first step, probation after it, and distrust. Pure.

Says what must not be released or restored; must neither choose nor release.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from backstay.ids import SnapshotKey
from backstayd.core.inventory.distrust import MAX_REASON, Trust
from backstayd.core.inventory.nodes import NodeState
from backstayd.core.inventory.run_context import RunContext, World
from backstayd.core.inventory.survey import Surveying
from backstayd.core.messages.decisions import Base, Decision, Distrusted
from backstayd.core.messages.gate import GateState
from backstayd.core.messages.report import SessionPhase
from backstayd.core.recover.gate import Gate
from backstayd.core.timeline import LogEvent


@dataclass(slots=True, kw_only=True)
class Probation:
    """Invariant: what the current world restored is ``held`` until every rank is ``steps`` beyond it.

    Would it be released before, and NaN show up then, there would be nothing sound to go back to.
    """

    steps: int
    trust: Trust = field(default_factory=Trust)
    gate: Gate = field(default_factory=Gate)
    distrusted: tuple[Distrusted, ...] = ()

    def unite(self, run: str, nodes: Mapping[str, NodeState], surveying: Surveying) -> tuple[Distrusted, ...]:
        """Take in what the nodes distrust, and what is marked on durable storage."""
        survey_id = surveying.survey_id if surveying.is_answered else ""
        self.distrusted = self.trust.unite(run, nodes.values(), surveying.marks, survey_id=survey_id)
        return self.distrusted

    def judge(self, decision: Decision, world: World, context: RunContext, log: LogEvent) -> None:
        """Compare what the ranks loaded; a snapshot whose bytes do not pass is not restored again."""
        base = decision.base
        if base is None:
            return
        if not self.gate.update(decision, world, now_s=context.now_s, lease_s=context.lease_s):
            return
        verdict = self.gate.verdict
        assert verdict is not None
        if verdict.state is GateState.PASSED:
            log("gate_passed", f"all ranks agree on what they loaded of step {base.step}")
            return
        log("gate_failed", verdict.message)
        self.trust.note_end(verdict.message)
        if self.gate.is_content:
            self.distrust(base, verdict.message)

    def distrust(self, base: Base, reason: str) -> None:
        """Have ``base``, and what was trained from it, never restored again."""
        self.trust.add(
            Distrusted(snapshot_id=base.snapshot_id, attempt=base.attempt, step=base.step, reason=reason[:MAX_REASON])
        )

    def held(self, decision: Decision | None, world: World) -> set[SnapshotKey]:
        """What ``world`` restored, while some rank has not yet gone ``steps`` beyond it."""
        if decision is None or decision.base is None or self.steps <= 0:
            return set()
        end = decision.base.step + self.steps
        passed = [
            session
            for session in world.values()
            if session.record.phase is SessionPhase.ENDED
            or max(session.record.last_step, session.record.skipped_step) >= end
        ]
        if len(passed) >= decision.world_size:
            return set()
        return {SnapshotKey(decision.base.attempt, decision.base.step)}


def has_both(context: RunContext) -> bool:
    """Whether a sound snapshot is kept beside distrusted ones: then training needs one slot more."""
    kinds = {view.key in context.tainted for view in context.live_views if view.is_restorable}
    return len(kinds) == 2
