"""Draining nodes, which will be stopped: who takes over what they hold of one run, and what is lost if they stop now. Pure.

Asks for copies of shards and says over which nodes to encode; must not give up any snapshot, nor count on a leaving node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from backstayd.core.inventory.catalog import NOT_RECOVERABLE, SnapshotView, build_views, take_inventory
from backstayd.core.inventory.nodes import NodeState, natural
from backstayd.core.inventory.run_context import RunContext
from backstayd.core.messages.plans import Plan, ShardCopy
from backstayd.core.sentences import counted, listed

CALM_LEASES: Final = 10  # after a shard found no home no node is called safe: the next shard may not find one either
PROMISE_LEASES: Final = 10  # after "safe" what made it true is kept: the time that an operator has to act on it


@dataclass(slots=True)
class Draining:
    """State of one run. Invariant: a shard is copied only to a node that stays, or that new plans still use.

    Where so few nodes stay that ``goal`` is less than ``target``, some leaving ones stay in the plans: their stop costs the
    spares that it must, and no more.
    """

    leaving: frozenset[str] = frozenset()
    keepers: Mapping[str, NodeState] = field(default_factory=dict)  # nodes that new plans and copies use
    target: int = 0  # the spares wanted now
    goal: int = NOT_RECOVERABLE  # the spares wanted once every leaving node has stopped
    left: Mapping[str, int] = field(default_factory=dict)  # by snapshot id: its spares once they have stopped
    homes: dict[tuple[str, int], str] = field(default_factory=dict)  # by snapshot id and rank: who copies the shard
    homeless: dict[str, tuple[int, ...]] = field(default_factory=dict)  # by snapshot id: ranks that nobody can take
    is_frozen: bool = False  # a world decides: inventories hold still
    now_s: float = 0.0
    calm_s: float = 0.0  # until then the next snapshot may find no room either
    promise_s: float = 0.0  # until then an operator may act on "safe"

    def update(self, context: RunContext, *, wanted: int, target: int, is_busy: bool) -> None:
        """See who leaves and what is left without them."""
        self.target, self.is_frozen, self.now_s = target, is_busy, context.now_s
        leaving = sorted((name for name, node in context.nodes.items() if node.is_draining), key=natural)
        staying = {name: node for name, node in context.nodes.items() if name not in leaving}
        if not leaving or not staying:  # where no node stays, everything stays where it is
            self.leaving, self.keepers, self.left = frozenset(leaving), context.nodes, {}
            self.goal = NOT_RECOVERABLE
            self.homes, self.homeless, self.calm_s = {}, {}, 0.0
            return
        self.leaving = frozenset(leaving)
        self.goal = max(0, min(wanted, len(staying) - 1))
        kept = sorted(leaving, key=lambda name: (name not in context.reports, natural(name)))
        self.keepers = staying | {name: context.nodes[name] for name in kept[: target - self.goal]}
        inventory = take_inventory(context.run, staying.values(), readers=context.nodes.values())
        views = build_views(inventory, context.shapes)
        self.left = {view.snapshot_id: view.spares for view in views if view.snapshot_id}

    @property
    def is_on(self) -> bool:
        """Whether some node leaves and another one stays that can take over."""
        return self.goal > NOT_RECOVERABLE

    def spares_left(self, view: SnapshotView) -> int:
        """Spares of ``view`` once every leaving node has stopped."""
        return self.left.get(view.snapshot_id, NOT_RECOVERABLE) if self.is_on else view.spares

    def promise(self, context: RunContext) -> None:
        """They are called safe: for a while, what outlives their stop is not given up for what does not."""
        self.promise_s = context.now_s + PROMISE_LEASES * context.lease_s

    @property
    def is_holding(self) -> bool:
        """Whether a snapshot that outlives the stop is kept beside newer ones for which there is no room elsewhere.

        Not for ever, for it takes a slot that they need.
        """
        return self.is_on and bool(self.homeless) and self.now_s < self.promise_s

    def is_enough(self, view: SnapshotView) -> bool:
        """Whether ``view`` is as well protected as it can be, now and once the leaving nodes have stopped."""
        return view.spares >= self.target and (not self.is_on or self.spares_left(view) >= self.goal)

    def encoders(self, view: SnapshotView, nodes: Mapping[str, NodeState]) -> Mapping[str, NodeState]:
        """Nodes over which ``view`` is encoded now; none: copies of its shards are on their way, or cannot be made."""
        if not self.is_on:
            return nodes
        if not self._uncopied(view):
            return self.keepers
        return nodes if view.snapshot_id in self.homeless and view.spares < self.target else {}

    def replaces(self, plans: Collection[Plan], view: SnapshotView) -> bool:
        """Whether ``view`` can be encoded anew without the leaving nodes, and must be."""
        if not self.is_on or self.is_frozen or self.is_enough(view) or self._uncopied(view):
            return False
        return not all(self.is_of_keepers(plan) for plan in plans)

    def is_of_keepers(self, plan: Plan) -> bool:
        return all(member.node in self.keepers for member in plan.members)

    def place(self, context: RunContext, views: Sequence[SnapshotView]) -> None:
        """Choose a home for each shard of ``views`` that only leaving nodes hold; homes once chosen are kept."""
        before, self.homes, self.homeless = self.homes, {}, {}
        if not self.is_on or self.is_frozen:
            return
        room = {name: node.free_bytes for name, node in self.keepers.items()}
        for view in views:
            if self.is_enough(view) or not view.is_complete:
                continue
            weight = Counter(name for holders in view.holders.values() for name in holders)
            for rank in self._uncopied(view):
                home = before.get((view.snapshot_id, rank), "")
                fitting = [name for name in self._fitting(context, view, rank) if room[name] >= view.sizes[rank]]
                if home not in fitting:
                    home = min(fitting, key=lambda name: (weight[name], -room[name], natural(name)), default="")
                if home:
                    self.homes[view.snapshot_id, rank] = home
                    weight[home] += 1
                    room[home] -= view.sizes[rank]
                else:
                    self.homeless[view.snapshot_id] = (*self.homeless.get(view.snapshot_id, ()), rank)
            if view.snapshot_id in self.homeless:  # the others' copies alone would only take room
                self.calm_s = context.now_s + CALM_LEASES * context.lease_s
                self.homes = {place: home for place, home in self.homes.items() if place[0] != view.snapshot_id}

    def copies(self, context: RunContext) -> dict[str, tuple[ShardCopy, ...]]:
        """Shards that nodes should copy, by node."""
        views = {view.snapshot_id: view for view in context.live_views}
        found: dict[str, list[ShardCopy]] = {}
        for (snapshot_id, rank), home in self.homes.items():
            view = views.get(snapshot_id)
            if view is not None:
                copy = ShardCopy(
                    attempt=view.key.attempt,
                    step=view.key.step,
                    rank=rank,
                    world_size=view.world_size,
                    size_bytes=view.sizes[rank],
                    digest=view.digests[rank],
                    holders=view.holders[rank],
                )
                found.setdefault(home, []).append(copy)
        return {node: tuple(copies) for node, copies in found.items()}

    def missing(self, kept: Sequence[SnapshotView], broken: Sequence[SnapshotView] = ()) -> str:
        """What is missing before the leaving nodes can stop without loss; "" if nothing is.

        Args:
            kept: what is restorable and not released, newest first.
            broken: whole snapshots of which too much is away to restore them, newest first.
        """
        if self.leaving and not self.is_on:
            return "no other node remains that could take over what it holds"
        protected = [view for view in kept if view.spares >= self.target]
        if kept and not protected:
            return "no snapshot is protected yet"
        if broken and not kept:
            return (
                f"parts of step {broken[0].key.step} are on nodes that have not reported, and there is no other snapshot: if "
                "they come back, what is held here is needed (`backstay forget` gives the run up)"
            )
        lacking = next((view for view in protected if self.spares_left(view) < self.goal), None)
        if lacking is None:
            is_calm = self.now_s >= self.calm_s
            return "" if is_calm else "a moment ago the other nodes had no room for a copy of a new snapshot"
        step, homeless = lacking.key.step, self.homeless.get(lacking.snapshot_id)
        if homeless:
            size = max(lacking.sizes[rank] for rank in homeless)
            most = max(node.free_bytes for node in self.keepers.values())
            return (
                f"no other node can take the shards of {counted(homeless, 'rank')} of step {step} ({size} bytes; {most} "
                f"are free where most is): stopped now, {_spares(self.spares_left(lacking))}, with room {_spares(self.goal)}"
            )
        ranks = sorted(rank for snapshot_id, rank in self.homes if snapshot_id == lacking.snapshot_id)
        if ranks:
            return f"the shards of {counted(ranks, 'rank')} of step {step} are being copied to other nodes"
        names = sorted(self.keepers, key=natural)
        return f"step {step} is being encoded over {listed(names)}"

    def check_invariants(self) -> None:
        """Raise AssertionError for a mistake of ours."""
        assert all(home in self.keepers for home in self.homes.values())
        assert not self.is_on or self.goal <= self.target

    def _uncopied(self, view: SnapshotView) -> tuple[int, ...]:
        """Ranks whose shard no keeper holds."""
        return tuple(
            rank
            for rank in range(view.world_size)
            if not any(name in self.keepers for name in view.holders.get(rank, ()))
        )

    def _fitting(self, context: RunContext, view: SnapshotView, rank: int) -> list[str]:
        """Keepers that obey orders to copy and have not reported that they cannot take the shard."""
        digest = view.digests[rank]
        return [
            name
            for name, node in self.keepers.items()
            if node.report.takes_copies
            and (name not in context.reports or digest not in context.reports[name].failed_copies)
        ]


def _spares(count: int) -> str:
    if count < 0:
        return "it is lost"
    return f"it survives {count or 'no'} further loss{'es' if count > 1 else ''}"
