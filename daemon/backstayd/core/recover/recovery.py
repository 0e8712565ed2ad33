"""One decision per world: fence, choose, let every host stage, then record, then release to all ranks or to none. Pure.

Invariant: all ranks of a world return with the same decision, and every host of it has recorded that decision before the first
one does. Each stage is there for a reason:

- FENCING: a new generation reaches every present node before anything is chosen. Else a rank of the world before, not yet known
  to be dead, could still commit a step, or a node still delete one, while it is being chosen.
- PREPARE: every host brings what its ranks need and verifies it. Only then is it known that the choice can be loaded: a source
  that turns out to be corrupt or gone costs a new decision, not a world that loaded half of one.
- RECORD: every host writes the decision to its tmpfs. The coordinator keeps nothing on disk: the next one goes by these files.
  Would a rank return before that, a crash could leave no trace of the decision, and the next coordinator would choose otherwise
  for the ranks that still wait: two worlds in one history.
- RELEASED: ``restore()`` returns. There is no way back but by another world.

So a decision that any host has recorded may be in effect somewhere, and the next coordinator finishes it as long as its world
waits or trains; one that no host has recorded is in effect nowhere. A rank that dies before the release abandons the decision.
docs/architecture.md has the diagram.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from backstay.format import json_records
from backstay.ids import Generation
from backstayd.bounded import drop_oldest
from backstayd.core.inventory.catalog import SnapshotView
from backstayd.core.inventory.distrust import count_tries, loop_message
from backstayd.core.inventory.lineage import extend, trimmed
from backstayd.core.inventory.nodes import natural
from backstayd.core.inventory.run_context import RunContext, World, is_waiting, phases_of
from backstayd.core.messages.decisions import (
    Base,
    Decision,
    DecisionPhase,
    Outcome,
    Placement,
    ShardSource,
    SourceKind,
    Staging,
    StagingState,
    base_size,
    readers_of,
)
from backstayd.core.messages.report import SessionPhase
from backstayd.core.recover.choice import Choice, Memory, choose, sources_of
from backstayd.core.recover.numbering import attempts_in_use, generation_floor, next_attempt
from backstayd.core.recover.rebuild_plan import choose_targets
from backstayd.core.sentences import amount, counted, listed
from backstayd.core.timeline import LogEvent

SAME_FAILURES = (
    3  # failed stagings of one snapshot, a lease and then two apart: what lasts so long is no hiccup of a node
)
CLOSED_WORLDS = 64  # more than the restarts during which nodes may still report an old world

Enter = Callable[[Decision, RunContext], Decision]  # adds the run's ledger to a decision that has no id yet


class Stage(enum.StrEnum):
    IDLE = "idle"  # no world waits whose ranks are all there
    FENCING = "fencing"  # its generation travels to every node
    PREPARE = "prepare"  # hosts stage and verify
    RECORD = "record"  # hosts write the decision to tmpfs
    RELEASED = "released"  # the ranks load and train
    REFUSED = "refused"  # nothing can be restored: restore() raises


ACTIVE = frozenset({Stage.FENCING, Stage.PREPARE, Stage.RECORD})
PHASES = {
    Stage.PREPARE: DecisionPhase.PREPARE,
    Stage.RECORD: DecisionPhase.RECORD,
    Stage.RELEASED: DecisionPhase.RELEASE,
    Stage.REFUSED: DecisionPhase.REFUSE,
}


@dataclass(frozen=True, slots=True)
class Failure:
    """Failed stagings of one snapshot, or of a fresh start, with nothing new quarantined since."""

    count: int
    reason: str  # of the last one
    again_s: float  # not tried before: what failed a moment ago would fail again


@dataclass(slots=True)
class Recovery:
    """The current world of one run and its decision.

    Invariant: ``decision`` is of ``world_id``; its stage never goes back from RELEASED but by another world.
    """

    raise_generation: Callable[[int], Generation]  # above every known one, and above this number
    log: LogEvent
    enter: Enter
    stage: Stage = Stage.IDLE
    world_id: str = ""
    decision: Decision | None = None
    fence: int = 0  # the generation that the world's decision needs at least
    opened_s: float = 0.0
    adopted_id: str = ""  # the decision of a former coordinator that was taken over
    unreleased_from: int = 0  # decisions made here at this generation and above were not released; 0: the newest was
    closed: dict[str, None] = field(default_factory=dict)  # worlds in whose place another came
    arrived_s: dict[str, float] = field(default_factory=dict)  # when a rank of each world was first seen
    failures: dict[tuple[str, int], Failure] = field(default_factory=dict)  # by snapshot id and quarantine marks

    @property
    def is_active(self) -> bool:
        return self.stage in ACTIVE

    @property
    def released(self) -> Decision | None:
        """The decision with which trainers may have returned."""
        return self.decision if self.stage is Stage.RELEASED else None

    def outranks_former(self, context: RunContext, own: Generation) -> bool:
        """Whether what was decided here is later than any decision of a former coordinator that nodes may still bring back.

        It is where this coordinator decided, or is about to, and where a world trains. A decision that was only taken over,
        and with which nobody trains, is as old as its generation says.
        """
        if self.stage is not Stage.RELEASED or self.decision is None:
            return self.stage in (Stage.PREPARE, Stage.RECORD)
        is_training = SessionPhase.TRAINING in phases_of(context.worlds.get(self.world_id, {}))
        return is_training or self.decision.generation.incarnation == own.incarnation

    @property
    def phase(self) -> DecisionPhase:
        return PHASES.get(self.stage, DecisionPhase.PREPARE)

    def placements(self) -> dict[int, str]:
        """Rank to node of the current decision."""
        return self.decision.node_of_rank if self.decision is not None else {}

    def placements_of(self, world_size: int) -> dict[int, str]:
        """Where the ranks of a snapshot run now: nowhere, if it was written by another number of ranks."""
        placements = self.placements()
        return placements if len(placements) == world_size else {}

    def update(self, context: RunContext, memory: Memory) -> None:
        """Go through as many stages as the reports allow."""
        self._note_arrivals(context)
        if self._has_newer_head(context):
            self._adopt(context)
        if self.is_active:
            self._check_world(context)
        if not self.is_active:
            self._open(context)
        if self.stage is Stage.FENCING and context.is_fenced(self.fence) and context.storage.is_ready:
            self._decide(context, memory)
        if self.stage is Stage.PREPARE:
            self._prepare(context)
        if self.stage is Stage.RECORD:
            self._record(context)
        if self.stage is Stage.RELEASED:
            memory.is_proved_empty = False

    def is_unreleased(self, decision: Decision, own: Generation) -> bool:
        """Whether ``decision`` was made here and no trainer can have returned with it, though hosts may have recorded it."""
        made_here = decision.generation.incarnation == own.incarnation
        return made_here and 0 < self.unreleased_from <= decision.generation.number

    def raise_above(self, generation: Generation) -> None:
        """Nodes came back with a higher generation of a former coordinator, and maybe with its decisions.

        The decision with which trainers may have returned is later all the same: it is raised above theirs, and its hosts
        record it again. One that was not released is made anew from what is known now.
        """
        if self.stage is Stage.RELEASED and self.decision is not None:
            self.decision = replace(self.decision, generation=generation)
        elif self.stage in (Stage.PREPARE, Stage.RECORD):
            self._decide_anew("nodes came back with decisions of a former coordinator")

    def recorded_hosts(self, context: RunContext) -> list[str]:
        """Hosts of the decision that have it on their tmpfs."""
        return [host for host in self._hosts() if self._is_recorded(context, host)]

    def is_recorded_on_some(self, context: RunContext) -> bool:
        return self.stage is Stage.RECORD and 0 < len(self.recorded_hosts(context)) < len(self._hosts())

    def check_invariants(self) -> None:
        """Raise AssertionError for a mistake of ours."""
        if self.decision is None:
            assert self.stage in (Stage.IDLE, Stage.FENCING)
            return
        decision = self.decision
        assert decision.world_id == self.world_id
        assert (decision.outcome is Outcome.REFUSED) == (self.stage is Stage.REFUSED)
        assert (decision.base is not None) == (decision.outcome in (Outcome.EXACT, Outcome.EXACT_OLDER))
        if decision.base is not None:
            assert decision.base.attempt < decision.attempt
            assert [source.rank for source in decision.sources] == list(range(base_size(decision)))
        assert [place.rank for place in decision.placements] == list(range(decision.world_size))

    def _hosts(self) -> list[str]:
        return sorted(set(self.placements().values()), key=natural)

    def _has_newer_head(self, context: RunContext) -> bool:
        """Whether the newest recorded decision is one of a former coordinator that this one does not follow yet."""
        head = context.head
        if (
            head is None
            or self.is_active
            or head.decision_id == self.adopted_id
            or head.generation.number <= self.fence
        ):
            return False
        own = self.decision.generation.number if self.decision is not None else 0
        return head.generation.number > own

    def _adopt(self, context: RunContext) -> None:
        """Take over what a former coordinator decided, as far as hosts have recorded it."""
        head = context.head
        if head is None:
            return
        self.adopted_id = head.decision_id
        self.world_id = head.world_id
        self.stage, self.decision = Stage.IDLE, None
        phases = phases_of(context.worlds.get(head.world_id, {}))
        _, recorded = context.inventory.decisions.get(head.decision_id, (head, set()))
        if phases & {SessionPhase.TRAINING, SessionPhase.ENDED} or head.hosts <= recorded:
            self.stage, self.decision = Stage.RELEASED, head
            self.log("settled", f"kept the decision that {listed(sorted(recorded))} recorded: {_history(head)}")
        # A world that still waits is opened next, and goes on with this decision.

    def _check_world(self, context: RunContext) -> None:
        """Abandon when a rank of the world is gone or moved before the release."""
        world = context.worlds.get(self.world_id, {})
        where = {rank: session.node for rank, session in world.items()}
        if is_waiting(world) and (self.decision is None or where == self.placements()):
            return
        if self.decision is not None:
            gone = sorted(rank for rank, node in self.placements().items() if where.get(rank) != node)
            what = f"{counted(gone, 'rank')} died" if gone else "a rank stopped waiting"
        else:
            what = "not all of its ranks still wait"
        self.log("abandoned", f"the recovery of world {self.world_id[:8]} was abandoned before its release: {what}")
        self.stage, self.decision = Stage.IDLE, None

    def _open(self, context: RunContext) -> None:
        """Serve a world whose ranks all wait, of several the one that came last: a supervisor started it later."""
        waiting = sorted(
            world_id
            for world_id, world in context.worlds.items()
            if is_waiting(world)
            and world_id not in self.closed
            and not (world_id == self.world_id and self.stage in (Stage.RELEASED, Stage.REFUSED))
        )
        if not waiting:
            return
        chosen = max(waiting, key=lambda world_id: self.arrived_s.get(world_id, 0.0))
        for world_id in waiting:
            if self.arrived_s.get(world_id, 0.0) < self.arrived_s.get(chosen, 0.0):
                self._close(world_id)
        if self.world_id and self.world_id != chosen:
            self._close(self.world_id)
            self.failures.clear()
        self.world_id = chosen
        self.opened_s = context.now_s
        world = context.worlds[self.world_id]
        nodes = sorted({session.node for session in world.values()}, key=natural)
        self.log("world_opened", f"{len(world)} ranks on {listed(nodes)} wait to restore (world {self.world_id[:8]})")
        head = context.head
        if head is not None and head.world_id == self.world_id and _runs_where_decided(world, head):
            self.stage, self.decision = Stage.PREPARE, head
            self.log("settled", f"finishing the decision that some hosts recorded: {_describe(head)}")
            return
        self._fence()

    def _note_arrivals(self, context: RunContext) -> None:
        """Remember when each world was first seen."""
        for world_id in context.worlds:
            self.arrived_s.setdefault(world_id, context.now_s)
        for world_id in [known for known in self.arrived_s if known not in context.worlds][:-CLOSED_WORLDS]:
            del self.arrived_s[world_id]

    def _close(self, world_id: str) -> None:
        """Serve that world no more: a later one takes its place."""
        self.closed[world_id] = None
        drop_oldest(self.closed, CLOSED_WORLDS)

    def _fence(self, above: int = 0) -> None:
        self.stage, self.decision = Stage.FENCING, None
        self.fence = self.raise_generation(above).number
        self.unreleased_from = self.unreleased_from or self.fence

    def _decide(self, context: RunContext, memory: Memory) -> None:
        floor = generation_floor(context, memory)
        if context.generation.number <= floor:
            self._fence(above=floor)
            return
        world = context.worlds[self.world_id]
        choice = choose(
            context,
            memory,
            is_fresh_allowed=all(session.record.allow_fresh for session in world.values()),
            excluded=self._excluded(context),
        )
        failed = self.failures.get(_place(context, choice.view))
        if failed is not None and context.now_s < failed.again_s:
            return
        if choice.outcome in (Outcome.NONE, Outcome.REFUSED) and not context.has_long_memory:
            return  # a node that could say otherwise may still be on its way
        if choice.view is not None and self._is_looping(context, memory, choice.view):
            tries = self._tries(context, memory, choice.view)
            message = loop_message(context.run, choice.view.key.step, tries, context.trust.last_reason)
            choice = Choice(outcome=Outcome.REFUSED, message=message)
        memory.is_proved_empty = choice.is_proved_empty
        self.decision = self._make(context, memory, choice, world)
        self.stage = Stage.REFUSED if choice.outcome is Outcome.REFUSED else Stage.PREPARE
        self.log("refused" if choice.outcome is Outcome.REFUSED else "decided", _describe(self.decision))

    def _tries(self, context: RunContext, memory: Memory, view: SnapshotView) -> int:
        return count_tries(context.head, view.snapshot_id, newest=memory.newest_complete, trust=context.trust)

    def _is_looping(self, context: RunContext, memory: Memory, view: SnapshotView) -> bool:
        """Whether the same snapshot was restored as often as is allowed, and nothing came of it."""
        return 0 < context.restore_loop_limit <= self._tries(context, memory, view)

    def _make(self, context: RunContext, memory: Memory, choice: Choice, world: World) -> Decision:
        placements = {rank: session.node for rank, session in sorted(world.items())}
        view = choice.view
        attempt = next_attempt(context, memory)
        base = None if view is None else _base(view)
        lineage = extend(
            trimmed(context.lineage, needed=attempts_in_use(context)),
            attempt=attempt,
            base=(base.attempt, base.step) if base else (0, 0),
            world_id=self.world_id,
        )
        bare = Decision(
            decision_id="",
            generation=context.generation,
            run=context.run,
            world_id=self.world_id,
            world_size=len(world),
            attempt=attempt,
            outcome=choice.outcome,
            base=base,
            lineage=lineage,
            placements=tuple(Placement(rank=rank, node=node) for rank, node in placements.items()),
            sources=_sources(context, view, placements) if view is not None else (),
            message=choice.message,
            tries=self._tries(context, memory, view) if view is not None else 0,
        )
        entered = self.enter(bare, context)
        return replace(entered, decision_id=hashlib.sha256(json_records.dumps(entered)).hexdigest()[:32])

    def _excluded(self, context: RunContext) -> dict[str, str]:
        """Snapshots that could not be staged again and again, and why the last time."""
        marks = len(context.quarantined())
        return {
            snapshot_id: failure.reason
            for (snapshot_id, count), failure in self.failures.items()
            if snapshot_id and count == marks and failure.count >= SAME_FAILURES
        }

    def _prepare(self, context: RunContext) -> None:
        if self._has_failed(context, "stage"):
            return
        hosts = self._hosts()
        unready = [host for host in hosts if not self._is_ready(context, host)]
        if not unready:
            self.log("staged", f"every host has verified what it needs: {listed(hosts)}")
            self.stage = Stage.RECORD
            return
        problem = self._why_impossible(context, unready)
        if problem:
            self._decide_anew(problem)

    def _record(self, context: RunContext) -> None:
        assert self.decision is not None
        recorded = self.recorded_hosts(context)
        if len(recorded) < len(self._hosts()):
            self._has_failed(context, "record")
            return
        self.log("recorded", f"the decision is recorded on {listed(recorded)}")
        self.log("released", _describe(self.decision))
        self.stage = Stage.RELEASED
        self.unreleased_from = 0
        context.trust.begin_world()

    def _has_failed(self, context: RunContext, what: str) -> bool:
        """Whether a host could not do its part of the decision; then it is made anew."""
        for host in self._hosts():
            staging = self._staging(context, host)
            if staging is not None and staging.state is StagingState.FAILED:
                reason = staging.reason or "no reason given"
                self._note_failure(context, f"{host}: {reason}")
                self._decide_anew(f"{host} could not {what}: {reason}")
                return True
        return False

    def _note_failure(self, context: RunContext, reason: str) -> None:
        """Count that a host could not stage the base or record the decision. A source that went away is no such failure."""
        assert self.decision is not None
        place = _place(context, self.decision.base)
        count = 1 + (self.failures[place].count if place in self.failures else 0)
        self.failures[place] = Failure(count, reason, context.now_s + min(count, SAME_FAILURES) * context.lease_s)
        drop_oldest(self.failures, CLOSED_WORLDS)

    def _decide_anew(self, why: str) -> None:
        """Fence again and choose from what is left: no trainer has returned with this decision."""
        self.log("abandoned", f"deciding anew: {why}")
        self._fence()

    def _why_impossible(self, context: RunContext, hosts: list[str]) -> str:
        """Why the hosts that are not ready cannot become so; "" if they can."""
        assert self.decision is not None
        base = self.decision.base
        if base is None:
            return ""
        view = context.view_of(base.snapshot_id)
        if view is None or not view.is_available:
            return f"step {base.step} can no longer be restored"
        for source in self.decision.sources:
            if source.kind is SourceKind.PERSISTED:
                gone = context.storage.problems.get(base.snapshot_id, f"step {base.step} left durable storage")
                problem = "" if view.url else gone
            else:
                problem = self._why_unreadable(context, source, set(view.holders.get(source.rank, ())), set(hosts))
            if problem:
                return problem
        return ""

    def _why_unreadable(self, context: RunContext, source: ShardSource, holders: set[str], hosts: set[str]) -> str:
        """Why some of ``hosts`` cannot get this shard, which ``holders`` have now; "" if all can."""
        assert self.decision is not None
        reader = readers_of(self.decision).get(source.rank)
        readers = hosts & {reader} if reader is not None else hosts
        if readers <= holders or holders & set(source.holders):
            return ""
        if source.kind is not SourceKind.REBUILD:
            return f"{listed(source.holders)} no longer has the shard of rank {source.rank}"
        if holders:
            return f"the shard of rank {source.rank} is back on {listed(sorted(holders))}"
        if not any(name in context.nodes for name in source.holders):
            return f"{listed(source.holders) or 'nobody'} is left to hold the rebuilt shard of rank {source.rank}"
        return ""

    def _staging(self, context: RunContext, host: str) -> Staging | None:
        """The host's answer to the current decision, if it gave one."""
        report = context.reports.get(host)
        if report is None or report.staging is None or self.decision is None:
            return None
        return report.staging if report.staging.decision_id == self.decision.decision_id else None

    def _is_ready(self, context: RunContext, host: str) -> bool:
        staging = self._staging(context, host)
        is_staged = staging is not None and staging.state in (StagingState.READY, StagingState.RECORDED)
        return is_staged or self._is_recorded(context, host)

    def _is_recorded(self, context: RunContext, host: str) -> bool:
        report = context.reports.get(host)
        if report is None or self.decision is None:
            return False
        staging = self._staging(context, host)
        is_said = staging is not None and staging.state is StagingState.RECORDED
        return is_said or (report.decision is not None and report.decision.decision_id == self.decision.decision_id)


def _runs_where_decided(world: World, decision: Decision) -> bool:
    """Whether each rank of the world is on the node that the decision names."""
    return {rank: s.node for rank, s in world.items()} == decision.node_of_rank


def _place(context: RunContext, what: SnapshotView | Base | None) -> tuple[str, int]:
    return (what.snapshot_id if what is not None else "", len(context.quarantined()))


def _base(view: SnapshotView) -> Base:
    return Base(
        attempt=view.key.attempt,
        step=view.key.step,
        snapshot_id=view.snapshot_id,
        world_size=view.world_size,
        url=view.url,
    )


def _sources(context: RunContext, view: SnapshotView, placements: Mapping[int, str]) -> tuple[ShardSource, ...]:
    """Where the world of ``placements`` reads each shard; who will hold what must be rebuilt is settled with it."""
    readers = placements if view.world_size == len(placements) else {}
    targets = choose_targets(
        view,
        placements=readers,
        nodes=context.nodes,
        inventory=context.inventory,
        preferred=frozenset(placements.values()),
    )
    return sources_of(view, readers=readers, targets=targets)


def _describe(decision: Decision) -> str:
    if decision.outcome is Outcome.REFUSED:
        return decision.message
    if decision.base is None:
        return f"attempt {decision.attempt} from scratch: {decision.message}"
    kinds = [f"{kind.value} for {counted(ranks, 'rank')}" for kind, ranks in _by_kind(decision).items() if ranks]
    older = f"; {decision.message}" if decision.outcome is Outcome.EXACT_OLDER else ""
    size = base_size(decision)
    other = f" ({amount(size, 'rank')} then, {decision.world_size} now)" if size != decision.world_size else ""
    return (
        f"{decision.outcome.value}: attempt {decision.attempt} from step {decision.base.step} of attempt "
        f"{decision.base.attempt}{other}, {', '.join(kinds)}{older}"
    )


def _history(decision: Decision) -> str:
    """Which history a decision began. Its message would speak of what was found long ago."""
    if decision.base is None:
        return f"attempt {decision.attempt}, which began from scratch, continues"
    return f"attempt {decision.attempt}, which began from step {decision.base.step}, continues"


def _by_kind(decision: Decision) -> dict[SourceKind, list[int]]:
    kinds: dict[SourceKind, list[int]] = {kind: [] for kind in SourceKind}
    for source in decision.sources:
        kinds[source.kind].append(source.rank)
    return kinds
