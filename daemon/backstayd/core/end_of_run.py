"""When a run is over, and when a tombstone that says so is wrong. Pure.

A run is over when every rank has finished, when no trainer came back in time, when an operator forgets it, or when it never
held anything. The coordinator cannot know that for sure: nodes may be away, and with them a trainer that goes on. So two rules
hold. A tombstone is made of what is known at that moment (:func:`tombstone_of`) and covers nothing newer. And as long as any
part of what it covers is left somewhere, it is held against the reports again (:func:`why_wrong`): a decision made later, a
trainer that lives, or steps beyond it show that the run goes on, and the tombstone is lifted before anybody deletes by it.
Without the second rule, a coordinator that was cut off from half of the nodes would delete a run that trains on the other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from backstay.ids import SnapshotKey
from backstayd.core.inventory.catalog import ShapeCache, SnapshotView, build_views, take_inventory
from backstayd.core.inventory.lineage import newest_decision
from backstayd.core.inventory.nodes import NodeState
from backstayd.core.inventory.run_context import RunContext
from backstayd.core.inventory.tombstones import Tombstones
from backstayd.core.messages.decisions import Decision
from backstayd.core.messages.report import RunReport, SessionPhase, SessionRecord
from backstayd.core.messages.tombstone import MAX_ABSENT, Cause, Tombstone
from backstayd.core.protect.durable_uploads import Persisting
from backstayd.core.recover.choice import Memory, is_never_used
from backstayd.core.recover.recovery import Recovery
from backstayd.core.timeline import LogEvent

MAX_SKEW_S = (
    86400.0  # by which a node's clock may be ahead: a clock that is a year off must not make tombstones of then
)
UNUSED_LEASES = 60  # three minutes at the default lease: enough for a trainer to be started again after it died at once


@dataclass(slots=True)
class Forgetting:
    """Watches one run for its end."""

    job_ttl_s: float
    log: LogEvent
    is_under_way: bool = False  # it is over, nobody uses its name, and nodes still hold something of it
    ended: dict[str, set[int]] = field(default_factory=dict)  # by world: ranks that have finished
    idle_since_s: float | None = None  # since when this coordinator has seen no trainer of it

    def judge(self, context: RunContext, recovery: Recovery, persisting: Persisting, memory: Memory) -> Cause | None:
        """Why the run is over; None while it is not."""
        is_idle = self._is_idle(context, memory)
        if self._is_finished(context, recovery, persisting):
            self.log("finished", "every rank has finished: the run is forgotten on every node")
            return Cause.FINISHED
        if is_idle and self.due_in_s(context.now_s) == 0:
            self.log("freed", f"no trainer was connected for {self.job_ttl_s:g} s: the run is forgotten")
            return Cause.IDLE
        if is_idle and self.idle_s(context.now_s) >= UNUSED_LEASES * context.lease_s and is_never_used(context, memory):
            self.log("freed", "it never held a snapshot, and no trainer is connected: its name is dropped")
            return Cause.UNUSED
        return None

    def due_in_s(self, now_s: float) -> float | None:
        """Time until the run's memory is freed because no trainer came back; None while there is no such time."""
        if self.idle_since_s is None or self.job_ttl_s == 0:
            return None
        return max(0.0, self.idle_since_s + self.job_ttl_s - now_s)

    def idle_s(self, now_s: float) -> float:
        """For how long no trainer has been connected."""
        return now_s - self.idle_since_s if self.idle_since_s is not None else 0.0

    def _is_idle(self, context: RunContext, memory: Memory) -> bool:
        """Whether no trainer is connected to a run that holds something, or of which this coordinator remembers that it did."""
        phases = {session.record.phase for world in context.worlds.values() for session in world.values()}
        if phases - {SessionPhase.ENDED} or (context.inventory.is_empty and not memory.is_known):
            self.idle_since_s = None
        elif self.idle_since_s is None:
            self.idle_since_s = context.now_s
        return self.idle_since_s is not None

    def _is_finished(self, context: RunContext, recovery: Recovery, persisting: Persisting) -> bool:
        for world_id, world in context.worlds.items():
            ended = {rank for rank, session in world.items() if session.record.phase is SessionPhase.ENDED}
            if ended:
                self.ended.setdefault(world_id, set()).update(ended)
        world = context.worlds.get(recovery.world_id, {})
        size = next((session.record.world_size for session in world.values()), 0)
        return 0 < size <= len(self.ended.get(recovery.world_id, ())) and not persisting.is_saving(context)


def tombstone_of(
    context: RunContext, cause: Cause, *, memory: Memory, idle_s: float, absent: Collection[str]
) -> Tombstone:
    """The tombstone of all that is known of the run now.

    Args:
        memory: Its newest attempt is covered though no present node knows it: a node that is away may have recorded it.
        absent: Nodes that have a part in it and are away. Where only they know what it held, it is not called unused.
    """
    decisions = [decision for decision, _ in context.inventory.decisions.values()]
    decisions += [context.head] if context.head is not None else []
    keys = [view.key for view in context.views] + [SnapshotKey(decision.attempt, 0) for decision in decisions]
    keys += [memory.newest_complete] if memory.newest_complete is not None else []
    newest_attempt = memory.newest_attempt
    attempt = max([key.attempt for key in keys] + ([newest_attempt] if cause is not Cause.IDLE else []), default=0)
    steps = [key.step for key in keys if key.attempt == attempt or cause is not Cause.IDLE]
    steps += [session.record.last_step for world in context.worlds.values() for session in world.values()]
    step, head = max(steps, default=0), context.head
    is_known_to_absent = cause is Cause.IDLE and bool(absent)
    return Tombstone(
        run=context.run,
        attempt=attempt,
        generation=context.generation.number,
        cause=cause if step or cause is Cause.FORGOTTEN or is_known_to_absent else Cause.UNUSED,
        world_id=head.world_id if head is not None and head.attempt == attempt else "",
        step=step,
        idle_s=idle_s if cause is Cause.IDLE else 0.0,
        absent=tuple(sorted(absent))[:MAX_ABSENT],
    )


def made_unix_s(context: RunContext, *, now_unix_s: float) -> float:
    """The time of a tombstone made now: no decision that it covers may seem later, whatever a node's clock says."""
    newest = max((report.recorded_unix_s for report in context.reports.values()), default=0.0)
    return max(now_unix_s, min(newest, now_unix_s + MAX_SKEW_S))


def lift_if_wrong(
    run: str, nodes: Mapping[str, NodeState], tombstones: Tombstones, shapes: ShapeCache, head: Decision | None
) -> str:
    """Lift the run's tombstone if it names what lives; the sentence for that, "" if it stands or there is none."""
    reports = {name: node.runs[run] for name, node in nodes.items() if run in node.runs}
    tombstone = tombstones.get(run)
    if tombstone is None or not any(tombstones.is_left(name, report) for name, report in reports.items()):
        return ""
    why = why_wrong(tombstone, reports, build_views(take_inventory(run, nodes.values()), shapes), head)
    if not why:
        return ""
    tombstones.lift(run)
    return f"its tombstone is lifted, though it {tombstone.sentence()}: {why}"


def why_wrong(
    tombstone: Tombstone, reports: Mapping[str, RunReport], views: Sequence[SnapshotView], head: Decision | None
) -> str:
    """Why ``tombstone`` names what lives and must not be followed; "" if it may be.

    Args:
        reports: Of all present nodes, with what the tombstone covers.
        views: What lies there, covered or not.
        head: The newest decision that this coordinator has followed.
    """
    decisions = [report.decision for report in reports.values() if report.decision is not None]
    newest = newest_decision([*decisions, *([head] if head is not None else [])])
    if newest is not None and newest.attempt > tombstone.attempt:  # the name is used again, or the run went on
        is_rooted = any(0 < entry.base_attempt <= tombstone.attempt for entry in newest.lineage)
        return f"attempt {newest.attempt} continues what it covers" if is_rooted else ""
    if newest is not None and newest.generation.number > tombstone.generation:
        return f"attempt {newest.attempt} was decided after it, at generation {newest.generation.number}"
    later = [report.decision for report in reports.values() if _is_begun_since(tombstone, report)]
    if later and later[0] is not None:
        return f"attempt {later[0].attempt} began later, under a coordinator that did not know of it"
    living = _living(tombstone, reports)
    if living:
        name, session = living[0]
        return f"rank {session.rank} on {name} is connected"
    if any(_is_beyond(tombstone, view) for view in views):
        return f"there are snapshots above step {tombstone.step}"
    return ""


def _living(tombstone: Tombstone, reports: Mapping[str, RunReport]) -> list[tuple[str, SessionRecord]]:
    """Trainers of what is named; where it was only idle, also whoever asks to restore it while some of it is left."""
    return [
        (name, session)
        for name, report in sorted(reports.items())
        for session in report.sessions
        if _is_living(tombstone, session, report)
    ]


def _is_living(tombstone: Tombstone, session: SessionRecord, report: RunReport) -> bool:
    """Whether a trainer may still write or restore what ``tombstone`` covers.

    Not a rank of an older world, frozen or never reaped, that is still connected: it is fenced off.
    """
    if session.phase is SessionPhase.TRAINING:
        is_decided = report.decision is not None and report.decision.world_id == session.world_id
        return is_decided or tombstone.world_id in ("", session.world_id)
    is_asking = session.phase in (SessionPhase.ATTACHED, SessionPhase.RESTORING)
    return is_asking and tombstone.cause not in (Cause.FINISHED, Cause.FORGOTTEN)


def _is_begun_since(tombstone: Tombstone, report: RunReport) -> bool:
    """Whether another world's decision was recorded after ``tombstone`` was made.

    Numbers do not tell: where no node that keeps the tombstone was there, the name was used again from attempt 1 on.
    """
    decision = report.decision
    is_other = decision is not None and decision.world_id != tombstone.world_id
    return is_other and report.recorded_unix_s > tombstone.unix_s


def _is_beyond(tombstone: Tombstone, view: SnapshotView) -> bool:
    """Whether the newest history that is named went on; parts that nobody can restore are no sign of that."""
    is_named = view.key.attempt == tombstone.attempt and view.world_id in ("", tombstone.world_id)
    return is_named and view.key.step > tombstone.step and (view.is_restorable or tombstone.cause is Cause.IDLE)
