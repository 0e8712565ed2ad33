"""When a run is over: every rank has ended, nobody came back, or a node says it was forgotten. Pure.

Says that everything of the run may go; must not delete.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from backstayd.core.context import RunContext
from backstayd.core.persisting import Persisting
from backstayd.core.records import SessionPhase
from backstayd.core.recovery import Recovery, Say, Stage


@dataclass(slots=True)
class Forgetting:
    """Invariant: once under way it goes on until no node holds anything of the run."""

    job_ttl_s: float
    say: Say
    is_under_way: bool = False
    ended: dict[str, set[int]] = field(default_factory=dict)  # ranks of a world that have finished
    idle_since_s: float | None = None  # no trainer is connected, as far as this coordinator has seen

    def update(self, context: RunContext, recovery: Recovery, persisting: Persisting) -> None:
        """Begin when the run is over."""
        self._count_idle(context)
        self._count_ended(context, recovery, persisting)
        reports = [node.runs[context.run] for node in context.nodes.values() if context.run in node.runs]
        is_new = recovery.stage is not Stage.IDLE  # a later run of a forgotten name: a world was opened since
        if any(report.is_forgotten for report in reports) and not context.inventory.is_empty and not is_new:
            self.is_under_way = True

    def is_done(self, context: RunContext) -> bool:
        """Whether nothing of the run is left anywhere, sessions of the world that ended included."""
        has_unfinished = any(world_id in self.ended for world_id in context.worlds)
        return self.is_under_way and context.inventory.is_empty and not has_unfinished

    def due_in_s(self, now_s: float) -> float | None:
        """Time until the run's memory is freed because no trainer comes back; None: not as things are."""
        if self.idle_since_s is None or self.job_ttl_s == 0:
            return None
        return max(0.0, self.idle_since_s + self.job_ttl_s - now_s)

    def _count_idle(self, context: RunContext) -> None:
        """Count from when the last trainer left; one that is connected anywhere, or a new coordinator, begins anew."""
        phases = {session.record.phase for world in context.worlds.values() for session in world.values()}
        if phases - {SessionPhase.ENDED} or context.inventory.is_empty:
            self.idle_since_s = None
        elif self.idle_since_s is None:
            self.idle_since_s = context.now_s
        elif self.due_in_s(context.now_s) == 0 and not self.is_under_way:
            self.say("abandoned", f"no trainer was connected for {self.job_ttl_s:g} s: the run is forgotten")
            self.is_under_way = True

    def _count_ended(self, context: RunContext, recovery: Recovery, persisting: Persisting) -> None:
        for world_id, world in context.worlds.items():
            ended = {rank for rank, session in world.items() if session.record.phase is SessionPhase.ENDED}
            if ended:
                self.ended.setdefault(world_id, set()).update(ended)
                size = next(iter(world.values())).record.world_size
                is_over = world_id == recovery.world_id and len(self.ended[world_id]) >= size
                if is_over and not self.is_under_way and not persisting.is_saving(context):
                    self.say("abandoned", "every rank has finished: the run is forgotten on every node")
                    self.is_under_way = True
