"""Orders: what each node should do for one run, worked out once per evaluation for all of them. Pure.

Must not change the run's state, nor read anything that is newer than its last evaluation.

A run's decision is recorded not only by its hosts but also by a few other nodes, its *recorders*. They hold nothing else of the
run and stage nothing. As long as one of them is there, it is known that the run exists, up to which attempt and generation: no
world of it starts from scratch unnoticed, and no attempt is given twice (docs/decisions/0030-recorders.md).
"""

from __future__ import annotations

import heapq
import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from backstay.ids import SnapshotKey
from backstayd.core.evaluation import Evaluation
from backstayd.core.inventory.catalog import SnapshotView, suspects_of
from backstayd.core.inventory.nodes import Liveness, NodeState
from backstayd.core.inventory.run_context import RunContext
from backstayd.core.messages.decisions import Decision
from backstayd.core.messages.desired import Peer, RunDesired
from backstayd.core.messages.durable import StorageDesired
from backstayd.core.messages.plans import Plan, Quarantined, Rebuild, ShardCopy
from backstayd.core.protect.groups import parity_fraction
from backstayd.core.recover.probation import has_both
from backstayd.core.run_state import RunState

RECORDERS = 8  # more nodes than fail together, and few enough that no message grows with the cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """For all nodes of one run."""

    common: RunDesired  # the same for all
    hosts: frozenset[str]
    recorders: frozenset[str]
    plans: Mapping[str, tuple[Plan, ...]]  # by node, as all that follow
    drops: Mapping[str, tuple[str, ...]]
    rebuilds: Mapping[str, tuple[Rebuild, ...]]
    copies: Mapping[str, tuple[ShardCopy, ...]]
    releases: Mapping[str, tuple[SnapshotKey, ...]]  # where that is more than all release
    suspects: Mapping[str, tuple[Quarantined, ...]]
    storage: Mapping[str, StorageDesired]
    peers: Mapping[str, Peer]
    _made: dict[str, RunDesired] = field(default_factory=dict, compare=False)

    def has_work(self, node: str) -> bool:
        return node in self.plans or node in self.rebuilds or node in self.copies or node in self.recorders

    def of(self, node: str) -> RunDesired:
        """The orders of one node; the same record again while these are in effect."""
        made = self._made.get(node)
        if made is None:
            is_host = node in self.hosts
            made = self._made[node] = replace(
                self.common,
                decision=self.common.decision if is_host or node in self.recorders else None,
                gate=self.common.gate if is_host else None,
                plans=self.plans.get(node, ()),
                drop_plans=self.drops.get(node, ()),
                rebuilds=self.rebuilds.get(node, ()),
                copies=self.copies.get(node, ()),
                release=self.releases.get(node, self.common.release),
                suspects=self.suspects.get(node, ()),
                storage=self.storage.get(node),
            )
        return made


def desired_of(state: RunState, orders: Orders | None, node: str) -> RunDesired | None:
    """What ``node`` should do for the run of ``state``; None if it has no part in it."""
    context = state.context
    if context is None:
        return None
    if node in state.strangers:
        return RunDesired(run=state.run, owner=state.owner)
    has_report = node in context.reports
    if state.forgetting.is_under_way:
        is_told = node not in context.nodes or context.nodes[node].report.takes_tombstones
        return RunDesired(run=state.run, forget=True) if has_report and not is_told else None
    if orders is None:
        return None
    return orders.of(node) if has_report or orders.has_work(node) else None


def make_orders(state: RunState, evaluation: Evaluation) -> Orders:
    """The orders that follow from ``evaluation``."""
    context = evaluation.context
    decision, released = state.recovery.decision, state.recovery.released
    return Orders(
        common=_common(state, evaluation),
        hosts=frozenset(state.recovery.placements().values()) if decision is not None else frozenset(),
        recorders=choose_recorders(context, released) if released is not None else frozenset(),
        plans=_plans(state),
        drops=_drops(state, evaluation),
        rebuilds=_rebuilds(state),
        copies=state.draining.copies(context),
        releases=_releases(state, evaluation),
        suspects=_suspects(context),
        storage=state.persisting.desired({*context.nodes}),
        peers=_peers(state, context),
    )


def _common(state: RunState, evaluation: Evaluation) -> RunDesired:
    context, recovery = evaluation.context, state.recovery
    return RunDesired(
        run=state.run,
        world_id=recovery.world_id,
        decision=recovery.decision,
        decision_phase=recovery.phase,
        release=tuple(sorted(evaluation.release)),
        schedule=state.interval.schedule,
        keep=state.policy.keep,
        extra_slots=int(bool(state.held(context)) or has_both(context) or state.draining.is_holding)
        + int(bool(state.persisting.pinned)),
        gate=state.probation.gate.verdict if recovery.decision is not None else None,
        distrusted=state.probation.distrusted,
        trusted=tuple(sorted(state.probation.trust.cleared)),
        probation_steps=state.policy.probation_steps,
        parity_fraction=_parity_fraction(state, evaluation),
        redundancy=evaluation.redundancy,
        protected_step=evaluation.protected_step,
        is_release_possible=_is_release_possible(state, context),
        sealed_step=state.sealed[1] if state.sealed[0] == recovery.world_id else 0,
        complete_step=evaluation.complete_step,
        owner=state.owner,
        missing=state.missing.found,
    )


def _plans(state: RunState) -> dict[str, tuple[Plan, ...]]:
    found: dict[str, list[Plan]] = defaultdict(list)
    for plan_set in state.protection.sets.values():
        for plan in plan_set.plans:
            for member in plan.members:
                found[member.node].append(plan)
    return {node: tuple(plans) for node, plans in found.items()}


def _rebuilds(state: RunState) -> dict[str, tuple[Rebuild, ...]]:
    found: dict[str, dict[str, Rebuild]] = defaultdict(dict)
    for rebuild in state.rebuilds.under_way.values():
        for node in (*(t.node for t in rebuild.targets), *(task.decoder for task in rebuild.tasks)):
            found[node][rebuild.rebuild_id] = rebuild
    return {node: tuple(rebuilds.values()) for node, rebuilds in found.items()}


def _drops(state: RunState, evaluation: Evaluation) -> dict[str, tuple[str, ...]]:
    """Plans whose parity is deleted, by member; none while a world decides."""
    if state.recovery.is_active:
        return {}
    views = evaluation.context.live_views
    wanted = {plan.plan_id for plan_set in state.protection.sets.values() for plan in plan_set.plans}
    surplus = {plan.plan_id: plan for view in views for plan in state.protection.surplus(view, evaluation.target)}
    needed = {s.plan.plan_id for view in views for s in view.plans} - set(surplus)
    surplus |= {plan_id: plan for plan_id, plan in state.protection.dropped.items() if plan_id not in needed}
    found: dict[str, list[str]] = defaultdict(list)
    for plan_id in sorted(set(surplus) - wanted):
        for node in {member.node for member in surplus[plan_id].members}:
            found[node].append(plan_id)
    return {node: tuple(plan_ids) for node, plan_ids in found.items()}


def _releases(state: RunState, evaluation: Evaluation) -> dict[str, tuple[SnapshotKey, ...]]:
    """Where more is deleted than is released everywhere: copies that the protecting plans do not use."""
    if state.recovery.is_active:
        return {}
    hosts, found = _busy_hosts(state, evaluation.context), defaultdict(set)
    for view in evaluation.context.live_views:
        plan_set = state.protection.sets.get(view.snapshot_id)
        is_enough = plan_set is not None and plan_set.was_intact and state.draining.is_enough(view)
        is_alone = sum(1 for other in evaluation.context.views if other.key == view.key) == 1
        if plan_set is None or not is_enough or not is_alone or view.key in evaluation.release:
            continue
        members = {member.node for plan in plan_set.plans for member in plan.members}
        for node in _holders(view, evaluation.context) - members - hosts:
            found[node].add(view.key)
    return {node: tuple(sorted({*evaluation.release, *keys})) for node, keys in found.items()}


def _busy_hosts(state: RunState, context: RunContext) -> set[str]:
    """Where ranks run, or wait for what was staged for them: an abandoned recovery may be resumed."""
    sessions = {session.node for world in context.worlds.values() for session in world.values()}
    return sessions | set(state.hosts(context))


def _holders(view: SnapshotView, context: RunContext) -> set[str]:
    """Nodes that hold a shard of the snapshot, or one of its plans."""
    held = {node for nodes in view.holders.values() for node in nodes}
    return held.union(*(context.inventory.plan_holders.get(state.plan.plan_id, ()) for state in view.plans))


def _suspects(context: RunContext) -> dict[str, tuple[Quarantined, ...]]:
    found: dict[str, list[Quarantined]] = defaultdict(list)
    for mark in suspects_of(context.run, context.nodes.values()).values():
        found[mark.node].append(mark)
    return {node: tuple(marks) for node, marks in found.items()}


def _peers(state: RunState, context: RunContext) -> dict[str, Peer]:
    """Present nodes that have a part in the run."""
    names = set(context.reports)
    names.update(m.node for plan_set in state.protection.sets.values() for p in plan_set.plans for m in p.members)
    names.update(target.node for rebuild in state.rebuilds.under_way.values() for target in rebuild.targets)
    if state.recovery.decision is not None:
        names.update(holder for source in state.recovery.decision.sources for holder in source.holders)
    return {
        name: Peer(name=name, bulk_address=context.nodes[name].identity.bulk_address)
        for name in sorted(names & set(context.nodes))
    }


def _parity_fraction(state: RunState, evaluation: Evaluation) -> float:
    """m / k of the smallest group, which has most parity per byte of state; 0 while nothing is known of the job."""
    count = len(state.hosts(evaluation.context))
    return parity_fraction(count, group_size=state.policy.group_size, m=evaluation.wanted)


def _is_release_possible(state: RunState, context: RunContext) -> bool:
    """Whether slots come free as encoding proceeds: every host reports, every rank trains and takes its snapshots."""
    decision = state.recovery.released
    if decision is None or state.missing.sentence:
        return False
    is_heard = {name: node.liveness is Liveness.LIVE for name, node in context.nodes.items()}
    is_whole = len(state.world(context)) == decision.world_size
    return is_whole and all(is_heard.get(node) for node in state.hosts(context))


def choose_recorders(context: RunContext, decision: Decision) -> frozenset[str]:
    """The nodes that record ``decision`` besides its hosts: those that have it, then others, of other failure domains first.

    None that drains, and none where another user's run has the name.
    """
    hosts = decision.hosts
    others = [node for node in context.nodes.values() if node.name not in hosts and not node.is_draining]
    keepers = [node.name for node in others if _keeps(node, decision)]
    if len(keepers) >= RECORDERS:
        return frozenset(sorted(keepers)[:RECORDERS])
    near = {context.nodes[name].identity.domain for name in hosts & context.nodes.keys()}
    rest = (node for node in others if not _keeps(node, decision))
    order = {node.name: (node.identity.domain in near, _draw(node.name, decision.run), node.name) for node in rest}
    return frozenset([*keepers, *heapq.nsmallest(RECORDERS - len(keepers), order, key=order.__getitem__)])


def _keeps(node: NodeState, decision: Decision) -> bool:
    report = node.runs.get(decision.run)
    kept = report.decision if report is not None else None
    return kept is not None and kept.decision_id == decision.decision_id and kept.generation == decision.generation


def _draw(node: str, run: str) -> int:
    """Orders the nodes differently for each run, and each time alike."""
    return zlib.crc32(f"{run}/{node}".encode())
