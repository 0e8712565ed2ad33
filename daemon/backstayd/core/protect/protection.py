"""Which plans should be encoded: one set of plans, one per group of nodes, for each complete snapshot to protect. Pure.

Invariants:

- Each rank of a snapshot is in exactly one plan of its set. In none, its shard is lost with its node; in two, which parity
  counts would depend on who looks.
- A plan is immutable, and its id is a hash of all of it, with the incarnation of each member. A set that loses a member before
  it protects is dropped and planned anew under other ids, never mended: fragments of two geometries look alike, and a stripe
  decoded from both is garbage.
- What a set has written stays until another one protects the snapshot as well (:meth:`Protection.surplus`). Even parity that
  survives the loss of few nodes survives those.
- A set that protected once and lost a fragment is replaced, not completed (``once_intact``): over the nodes that are left there
  is a better one.

docs/architecture.md has the diagram.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from backstay.format.manifest import CHUNK_BYTES
from backstayd.bounded import drop_oldest
from backstayd.core.inventory.catalog import PlanState, SnapshotView, plan_state
from backstayd.core.inventory.nodes import NodeState, natural
from backstayd.core.inventory.run_context import RunContext
from backstayd.core.messages.plans import Member, Plan
from backstayd.core.policy import CorePolicy
from backstayd.core.protect.draining import Draining
from backstayd.core.protect.groups import form_groups

SETS_UNDER_WAY = 2  # the repair of the restored snapshot and the first new one; more would only slow each other
STALL_LEASES = 10  # without a single fragment: a slow network makes some in that time, a stuck coder none
DROPPED_KEPT = 64  # some dozen repairs of a thousand groups are never under way at once
MOVES_TRIED = 3  # times that a snapshot is encoded without the draining nodes; then they take part again


@dataclass(slots=True)
class PlanSet:
    """The plans of one snapshot, one per group, and how far they are."""

    snapshot_id: str
    plans: tuple[Plan, ...]
    progress: tuple[int, int] = (0, 0)  # fragments held, and members that store their plan
    progress_s: float = 0.0  # when that changed
    was_intact: bool = False  # it has protected the snapshot


@dataclass(slots=True)
class Protection:
    """State of one run."""

    policy: CorePolicy
    sets: dict[str, PlanSet] = field(default_factory=dict)  # by snapshot id
    dropped: dict[str, Plan] = field(default_factory=dict)  # by plan id: given up before they protected
    failures: dict[str, int] = field(default_factory=dict)  # by snapshot id: sets of it that were dropped
    retry_s: dict[str, float] = field(default_factory=dict)  # by snapshot id: not planned again before
    once_intact: dict[str, None] = field(default_factory=dict)  # plan ids
    serial: int = 0  # of the newest plan

    def target(self, *, host_count: int, present_count: int) -> int:
        """Losses that a job on ``host_count`` nodes should survive, as far as there are nodes."""
        return max(0, min(self.policy.wanted_parity(host_count), present_count - 1))

    def update(
        self,
        context: RunContext,
        views: Sequence[SnapshotView],
        *,
        target: int,
        placements_of: Callable[[int], Mapping[int, str]],
        draining: Draining,
    ) -> list[str]:
        """Drop sets that cannot finish, adopt those that a former coordinator began, begin new ones.

        Args:
            views: live snapshots that are wanted and whose digests are all known, newest first.
            placements_of: where the ranks of a snapshot of so many ranks run now.

        Returns:
            One sentence per set that was dropped.
        """
        nodes, now_s = context.nodes, context.now_s
        by_id = {view.snapshot_id: view for view in views}
        reasons = {
            snapshot_id: self._why_drop(context, by_id[snapshot_id], target)
            for snapshot_id in self.sets
            if snapshot_id in by_id
        }
        notes = self._drop_sets(reasons, now_s)
        for snapshot_id, plan_set in list(self.sets.items()):
            if plan_set.was_intact and draining.replaces(plan_set.plans, by_id[snapshot_id]):
                del self.sets[snapshot_id]
        for view in views:
            if view.snapshot_id not in self.sets:
                adopted = self._adoptable(view, nodes, target, draining)
                if adopted:
                    self._begin(view, adopted, now_s)
        under_way = sum(1 for s in self.sets.values() if not s.was_intact)
        for view in views:
            if under_way >= SETS_UNDER_WAY or target == 0:
                break
            if not view.is_complete or draining.is_enough(view) or view.snapshot_id in self.sets:
                continue
            if now_s < self.retry_s.get(view.snapshot_id, now_s):
                continue
            encoders = draining.encoders(view, nodes)
            if self.failures.get(view.snapshot_id, 0) >= MOVES_TRIED and view.spares < target:
                encoders = nodes
            plans = self._plan(context.run, view, target, placements_of(view.world_size), encoders)
            if plans:
                self._begin(view, plans, now_s)
                under_way += 1
        return notes

    def _drop_sets(self, reasons: Mapping[str, str], now_s: float) -> list[str]:
        """Drop the sets that have a reason, and those of snapshots that are not wanted any more; returns what to log."""
        notes = []
        for snapshot_id in list(self.sets):
            reason = reasons.get(snapshot_id)
            if reason == "":
                continue
            dropped = self.sets.pop(snapshot_id)
            if not dropped.was_intact:
                self._remember_dropped(dropped.plans)
            if reason:
                notes.append(f"plan of step {dropped.plans[0].step} dropped: {reason}")
                self._note_failure(snapshot_id, now_s)
        return notes

    def surplus(self, view: SnapshotView, target: int) -> list[Plan]:
        """Plans of ``view`` that nothing needs, because another set protects it as well as can be."""
        current = self.sets.get(view.snapshot_id)
        if current is None or not current.was_intact or view.spares < target:
            return []
        current_ids = {plan.plan_id for plan in current.plans}
        return [state.plan for state in view.plans if state.plan.plan_id not in current_ids]

    def check_invariants(self) -> None:
        """Raise AssertionError for a mistake of ours."""
        for snapshot_id, plan_set in self.sets.items():
            ranks = [shard.rank for plan in plan_set.plans for member in plan.members for shard in member.shards]
            assert all(plan.snapshot_id == snapshot_id and plan.is_sealed() for plan in plan_set.plans)
            assert sorted(ranks) == list(range(plan_set.plans[0].world_size)), "each rank in one group of a set"
            for plan in plan_set.plans:
                assert len({member.node for member in plan.members}) == len(plan.members)
                assert 0 < plan.m < len(plan.members)

    def _why_drop(self, context: RunContext, view: SnapshotView, target: int) -> str:
        """Why the set of ``view`` is given up; "" if it is not."""
        plan_set, now_s = self.sets[view.snapshot_id], context.now_s
        states = [plan_state(plan, context.inventory, context.shapes) for plan in plan_set.plans]
        is_intact = all(state.is_intact for state in states)
        if is_intact:
            plan_set.was_intact = True
            self.once_intact.update(dict.fromkeys(plan.plan_id for plan in plan_set.plans))
            drop_oldest(self.once_intact, DROPPED_KEPT)
            self.failures.pop(view.snapshot_id, None)
            return "more nodes are available than it uses" if plan_set.plans[0].m < target else ""
        if plan_set.was_intact:
            return "it lost a fragment or a shard"
        for plan in plan_set.plans:
            reason = _why_impossible(plan, context.nodes)
            if reason:
                return reason
        progress = (sum(s.fragment_count for s in states), sum(s.holder_count for s in states))
        if progress != plan_set.progress:
            plan_set.progress, plan_set.progress_s = progress, now_s
        elif now_s - plan_set.progress_s > STALL_LEASES * self.policy.lease_s:
            return f"no progress for {STALL_LEASES * self.policy.lease_s:g} s"
        return ""

    def _adoptable(
        self, view: SnapshotView, nodes: Mapping[str, NodeState], target: int, draining: Draining
    ) -> tuple[Plan, ...]:
        """Plans that nodes report, if together they cover each rank once and protect, or can still do so."""
        usable = [
            state
            for state in view.plans
            if state.plan.plan_id not in self.dropped
            and state.plan.m >= target
            and not draining.replaces((state.plan,), view)
            and (
                state.is_intact
                or (state.plan.plan_id not in self.once_intact and not _why_impossible(state.plan, nodes))
            )
        ]
        usable.sort(key=lambda s: (not s.is_intact, -s.plan.serial, -s.fragment_count, s.plan.plan_id))
        chosen: list[PlanState] = []
        covered: set[int] = set()
        for state in usable:
            ranks = set(state.rank_spares)
            if not ranks & covered:
                chosen.append(state)
                covered |= ranks
        return tuple(state.plan for state in chosen) if covered == set(range(view.world_size)) else ()

    def _begin(self, view: SnapshotView, plans: tuple[Plan, ...], now_s: float) -> None:
        self.sets[view.snapshot_id] = PlanSet(view.snapshot_id, plans, progress_s=now_s)
        self.retry_s.pop(view.snapshot_id, None)
        self.serial = max([self.serial, *(plan.serial for plan in plans)])

    def _note_failure(self, snapshot_id: str, now_s: float) -> None:
        count = self.failures[snapshot_id] = self.failures.get(snapshot_id, 0) + 1
        self.retry_s[snapshot_id] = now_s + min(self.policy.lease_s * 2, 0.02 * 2 ** min(count, 12))
        drop_oldest(self.failures, DROPPED_KEPT)
        drop_oldest(self.retry_s, DROPPED_KEPT)

    def _remember_dropped(self, plans: tuple[Plan, ...]) -> None:
        self.dropped.update({plan.plan_id: plan for plan in plans})
        drop_oldest(self.dropped, DROPPED_KEPT)

    def _plan(
        self,
        run: str,
        view: SnapshotView,
        target: int,
        placements: Mapping[int, str],
        nodes: Mapping[str, NodeState],
    ) -> tuple[Plan, ...]:
        owner = _owners(view, placements, nodes)
        if len(owner) < view.world_size:
            return ()
        members = set(owner.values())
        idle = sorted(set(nodes) - members, key=lambda name: (-nodes[name].free_bytes, natural(name)))
        members.update(idle[: max(0, target + 1 - len(members))])
        if len(members) <= target:
            return ()
        domains = {name: nodes[name].identity.domain for name in members}
        groups = form_groups(domains, group_size=self.policy.group_size, m=target)
        if all(plan.snapshot_id != view.snapshot_id for plan in self.dropped.values()) and not view.plans:
            serial = 0
        else:
            serial = self.serial = self.serial + 1
        return tuple(_make_plan(view, group, owner, nodes, m=target, run=run, serial=serial) for group in groups)


def _why_impossible(plan: Plan, nodes: Mapping[str, NodeState]) -> str:
    for member in plan.members:
        node = nodes.get(member.node)
        if node is None:
            return f"its member {member.node} is lost"
        if node.identity.incarnation != member.incarnation:
            return f"its member {member.node} was restarted"
        report = node.runs.get(plan.run)
        if report is not None and plan.plan_id in report.failed_plans:
            return f"{member.node} could not encode its stripe (see its log)"
    return ""


def _owners(view: SnapshotView, placements: Mapping[int, str], nodes: Mapping[str, NodeState]) -> dict[int, str]:
    """One holder for each rank: where the rank runs, else the holder that has least so far."""
    owner: dict[int, str] = {}
    count: dict[str, int] = {}
    for rank in range(view.world_size):
        holders = [name for name in view.holders.get(rank, ()) if name in nodes]
        if holders:
            preferred = placements.get(rank, "")
            least = min(holders, key=lambda name: (count.get(name, 0), natural(name)))
            owner[rank] = preferred if preferred in holders else least
            count[owner[rank]] = count.get(owner[rank], 0) + 1
    return owner


def _make_plan(
    view: SnapshotView,
    group: tuple[str, ...],
    owner: Mapping[int, str],
    nodes: Mapping[str, NodeState],
    *,
    m: int,
    run: str,
    serial: int,
) -> Plan:
    members = tuple(
        Member(
            node=name,
            incarnation=nodes[name].identity.incarnation,
            bulk_address=nodes[name].identity.bulk_address,
            shards=tuple(view.row(rank) for rank in range(view.world_size) if owner[rank] == name),
        )
        for name in group
    )
    plan = Plan(
        run=run,
        snapshot_id=view.snapshot_id,
        attempt=view.key.attempt,
        step=view.key.step,
        world_size=view.world_size,
        m=m,
        chunk_bytes=CHUNK_BYTES,
        members=members,
        serial=serial,
    )
    return plan.sealed()
