"""All tombstones that a coordinator knows: gathered from reports, sent to nodes that need them, lifted where wrong. Pure.

Invariant: what is not covered by a tombstone is never deleted as a whole, and what is covered is invisible to every decision
(:meth:`Tombstones.visible`), so that it is neither restored nor counted before each node has deleted it. Nothing is kept here
that nodes do not keep as a file: a new coordinator gathers the same from their reports. A tombstone that names what lives is
*lifted*; that one must not come back by the late report of a node that still keeps it, hence ``lifted``.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from backstay.ids import SnapshotKey
from backstayd.bounded import drop_oldest
from backstayd.core.inventory.nodes import NodeState, natural
from backstayd.core.messages.report import NodeReport, RunReport, SessionPhase
from backstayd.core.messages.tombstone import MAX_TOMBSTONES, Cause, Tombstone, trimmed

KEEPERS = 8  # nodes that keep each tombstone, as far as there are any: it outlives the nodes on which the run was


@dataclass(frozen=True, slots=True)
class TombstoneOrders:
    """Tombstones to keep or to drop, by node; the same object again while nothing changes."""

    keep: Mapping[str, tuple[Tombstone, ...]] = field(default_factory=dict)
    lift: Mapping[str, tuple[Tombstone, ...]] = field(default_factory=dict)


@dataclass(slots=True)
class Tombstones:
    """At most one tombstone per run."""

    known: dict[str, Tombstone] = field(default_factory=dict)
    lifted: dict[str, Tombstone] = field(default_factory=dict)
    orders: TombstoneOrders = field(default_factory=TombstoneOrders)
    _held: dict[str, tuple[Tombstone, ...]] = field(default_factory=dict)  # by node, as it last reported
    _marks: dict[str, dict[str, Tombstone]] = field(default_factory=dict)  # the same, by node and run
    #: By node and run: a report, the tombstone it was held against, and what that does not cover.
    _left: dict[tuple[str, str], tuple[RunReport, Tombstone, RunReport]] = field(default_factory=dict)

    def get(self, run: str) -> Tombstone | None:
        return self.known.get(run)

    def take(self, report: NodeReport) -> None:
        """Gather what a node keeps."""
        name = report.node.name
        if self._held.get(name, ()) is report.tombstones:
            return
        self._held[name] = report.tombstones
        self._marks[name] = {one.run: one for one in report.tombstones}
        for one in report.tombstones:
            known, lifted = self.known.get(one.run), self.lifted.get(one.run)
            is_newer = all(other is None or one.order > other.order for other in (known, lifted))
            if is_newer and one.is_possible:
                self.known[one.run] = one

    def bury(self, tombstone: Tombstone) -> None:
        """Have nodes keep it, and delete what it covers.

        Where a start under the name came to nothing, the tombstone of what was forgotten before covers it, too.
        """
        before = self.known.get(tombstone.run)
        if tombstone.cause is Cause.UNUSED and before is not None and before.cause is not Cause.UNUSED:
            newest = tombstone if tombstone.attempt > before.attempt else before
            tombstone = replace(
                before, attempt=newest.attempt, world_id=newest.world_id, generation=tombstone.generation
            )
        self.known[tombstone.run] = tombstone
        self.lifted.pop(tombstone.run, None)

    def lift(self, run: str) -> None:
        """The run's tombstone names what lives: no node may act on it any more."""
        tombstone = self.known.pop(run, None)
        if tombstone is not None:
            self.lifted[run] = tombstone
            drop_oldest(self.lifted, MAX_TOMBSTONES)

    def as_known_to(self, run: str, owner: str) -> Tombstone | None:
        """The run's tombstone as user ``owner`` may know it: that of another user's run says nothing."""
        found = self.known.get(run)
        if found is not None and found.owner and owner and found.owner != owner:
            return replace(found, cause=Cause.UNUSED)
        return found

    def visible(self, run: str, nodes: Mapping[str, NodeState]) -> tuple[Mapping[str, NodeState], bool]:
        """``nodes`` as if they did not hold what is forgotten of ``run``, and whether that is all they have of it."""
        holders = [node for node in nodes.values() if run in node.runs and self.is_left(node.name, node.runs[run])]
        if not holders:
            return nodes, False
        seen = {name: self._visible(run, node) for name, node in nodes.items()}
        parts = [node.runs[run] for node in seen.values() if run in node.runs]
        is_used = any(part.sessions or part.shards or part.plans or part.decision is not None for part in parts)
        return seen, not is_used

    def _visible(self, run: str, node: NodeState) -> NodeState:
        report = node.runs.get(run)
        if report is None or not self.is_left(node.name, report):
            return node
        changed = copy.copy(node)
        changed.runs = {**node.runs, run: self._left[node.name, run][2]}
        return changed

    def is_left(self, name: str, report: RunReport) -> bool:
        """Whether ``report`` of node ``name`` shows anything that the run's tombstone covers."""
        tombstone = self.known.get(report.run)
        if tombstone is None:
            return False
        found = self._left.get((name, report.run))
        if found is None or found[0] is not report or found[1] is not tombstone:
            found = self._left[name, report.run] = (report, tombstone, stripped(report, tombstone))
        return found[2] is not report

    def arrange(self, present: Mapping[str, NodeState], unsure: AbstractSet[str], *, now_unix_s: float) -> None:
        """Work out the orders; none about runs that are ``unsure``, as they were not evaluated yet."""
        for name in self._held.keys() - present.keys():
            self._held.pop(name)
            self._marks.pop(name, None)
        if not self.known and not self.lifted:
            self.orders = self.orders if not (self.orders.keep or self.orders.lift) else TombstoneOrders()
            self._left.clear()
            return
        self.known = {one.run: one for one in trimmed(self.known.values(), now_unix_s=now_unix_s)}
        self._left = {
            place: found for place, found in self._left.items() if place[0] in present and place[1] in self.known
        }
        orders = TombstoneOrders(keep=self._keep(present, unsure), lift=self._lift())
        self.orders = self.orders if orders == self.orders else orders

    def _keep(self, present: Mapping[str, NodeState], unsure: AbstractSet[str]) -> dict[str, tuple[Tombstone, ...]]:
        wanted: dict[str, dict[str, Tombstone]] = defaultdict(dict)
        for name, node in present.items():
            for run in node.runs:
                one = self.known.get(run)
                if one is None or run in unsure:
                    continue
                if self.is_left(name, node.runs[run]) or not (one.cause is Cause.UNUSED or self._keeps(name, one)):
                    wanted[name][run] = one
        first = sorted(present, key=natural)[:KEEPERS]
        for run, one in list(self.known.items()):
            if one.cause is Cause.UNUSED and not any(run in runs for runs in wanted.values()):
                del self.known[run]  # nothing is left of it
            if one.cause is Cause.UNUSED or run in unsure:
                continue
            for name in (*first, *(name for name in one.absent if name in present)):
                if not self._keeps(name, one):
                    wanted[name][run] = one
        return {name: tuple(runs[run] for run in sorted(runs)) for name, runs in wanted.items()}

    def _keeps(self, name: str, tombstone: Tombstone) -> bool:
        mark = self._marks.get(name, {}).get(tombstone.run)
        return mark is not None and mark.order >= tombstone.order

    def _lift(self) -> dict[str, tuple[Tombstone, ...]]:
        wanted: dict[str, list[Tombstone]] = defaultdict(list)
        for name, marks in self._marks.items():
            for run in marks.keys() & self.lifted.keys():
                if marks[run].order <= self.lifted[run].order:
                    wanted[name].append(marks[run])
        return {name: tuple(sorted(marks, key=lambda one: one.run)) for name, marks in wanted.items()}


def stripped(report: RunReport, tombstone: Tombstone) -> RunReport:
    """``report`` without what ``tombstone`` covers; ``report`` itself if that is nothing."""
    decision = report.decision
    is_decided = decision is not None and tombstone.covers_decision(decision.attempt, decision.generation)
    plans = tuple(plan for plan in report.plans if not tombstone.covers(plan.key))
    held = {plan.plan_id for plan in report.plans} - {plan.plan_id for plan in plans}
    found = replace(
        report,
        sessions=tuple(
            one
            for one in report.sessions
            if not (one.phase is SessionPhase.ENDED and one.world_id == tombstone.world_id)
        ),
        shards=tuple(shard for shard in report.shards if not tombstone.covers(shard.key, shard.world_id)),
        plans=plans,
        fragments=tuple(fragment for fragment in report.fragments if fragment.plan_id not in held),
        decision=None if is_decided else decision,
        quarantined=tuple(m for m in report.quarantined if not tombstone.covers(SnapshotKey(m.attempt, m.step))),
    )
    return report if found == report else found
