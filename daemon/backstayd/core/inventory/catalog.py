"""What exists where of one run, and what it is worth: per snapshot its shards, its plans, and the losses it survives now. Pure.

Everything is computed from reports of nodes whose lease has not run out. Invariant: shards of different writers under the same
step are never one snapshot, for digests come from one plan's table or from one world. A world that was fenced off may have
written the same step as the one that trains; a mix of both is a state in which no job ever was.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from backstay.ids import SnapshotKey, snapshot_id
from backstayd.bounded import drop_oldest
from backstayd.core.inventory import geometry
from backstayd.core.inventory.nodes import NodeState, natural
from backstayd.core.messages.decisions import Decision
from backstayd.core.messages.plans import Plan, Quarantined, ShardRecord, VolumeShard
from backstayd.core.messages.report import RunReport

NOT_RECOVERABLE = -1
MAX_LISTED_RANKS = 1 << 16  # of those that lack something: the world size that one shard claims must not cost more
MAX_SHAPES = 4096  # three snapshots of ten jobs on a thousand nodes


@dataclass(frozen=True, slots=True)
class StripeShape:
    """Who contributes what to a stripe."""

    stripe: int
    data: tuple[tuple[int, tuple[int, ...]], ...]  # by data fragment: the member, and its ranks in it; none: all zeros


class ShapeCache:
    """Geometry of plans by plan id; bounded."""

    def __init__(self) -> None:
        self._shapes: dict[str, tuple[StripeShape, ...]] = {}

    def shapes(self, plan: Plan) -> tuple[StripeShape, ...]:
        """The stripes of ``plan`` that hold any bytes."""
        found = self._shapes.get(plan.plan_id)
        if found is None:
            drop_oldest(self._shapes, MAX_SHAPES - 1)
            found = self._shapes[plan.plan_id] = tuple(_shapes(plan))
        return found


def _shapes(plan: Plan) -> Iterable[StripeShape]:
    if plan.m == 0:
        return
    for stripe in range(len(plan.members)):
        if geometry.stripe_chunks(plan, stripe) == 0:
            continue
        data = []
        for member in geometry.data_members(stripe, n=len(plan.members), m=plan.m):
            chunks = geometry.block_range(plan, stripe, member)
            ranks = dict.fromkeys(segment.rank for segment in geometry.segments(plan, member, chunks))
            data.append((member, tuple(ranks)))
        yield StripeShape(stripe, tuple(data))


@dataclass(slots=True)
class Inventory:
    """Reports of one run, turned round: from each thing to the nodes that hold it."""

    shards: dict[tuple[SnapshotKey, int, str], set[str]] = field(default_factory=lambda: defaultdict(set))
    records: dict[tuple[SnapshotKey, int, str], ShardRecord] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    plan_holders: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    fragments: dict[str, dict[tuple[int, int], set[str]]] = field(default_factory=lambda: defaultdict(dict))
    decisions: dict[str, tuple[Decision, set[str]]] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        return not (self.records or self.plans or self.decisions or any(self.fragments.values()))

    def keys(self) -> set[SnapshotKey]:
        return {key for key, _, _ in self.records} | {plan.key for plan in self.plans.values()}

    def holders(self, key: SnapshotKey, rank: int, digest: str) -> set[str]:
        return self.shards.get((key, rank, digest), set())


Suspect = tuple[str, int, int, int, str, int, int]  # node, attempt, step, rank, plan id, stripe, index


def suspects_of(run: str, nodes: Iterable[NodeState]) -> dict[Suspect, Quarantined]:
    """Sources that another node read and found corrupt, by holder and identity."""
    return {
        (mark.node, mark.attempt, mark.step, mark.rank, mark.plan_id, mark.stripe, mark.index): mark
        for node in nodes
        if run in node.runs
        for mark in node.runs[run].quarantined
        if mark.node and mark.node != node.name
    }


def take_inventory(run: str, nodes: Iterable[NodeState], *, readers: Iterable[NodeState] | None = None) -> Inventory:
    """What ``nodes`` report of ``run``, without what a reader found corrupt, until its holder has verified it itself.

    Args:
        readers: Nodes whose reports of corruption count; ``nodes`` if None.
    """
    inventory = Inventory()
    nodes = list(nodes)
    suspects = suspects_of(run, nodes if readers is None else readers)
    for node in nodes:
        report = node.runs.get(run)
        if report is None:
            continue
        for shard in report.shards:
            where = (shard.key, shard.rank, shard.digest)
            if (node.name, shard.attempt, shard.step, shard.rank, "", -1, -1) in suspects:
                continue
            inventory.records[where] = shard
            inventory.shards[where].add(node.name)
        for plan in report.plans:
            inventory.plans[plan.plan_id] = plan
            inventory.plan_holders[plan.plan_id].add(node.name)
        for fragment in report.fragments:
            held = inventory.fragments[fragment.plan_id]
            plan_key = (
                inventory.plans[fragment.plan_id].key if fragment.plan_id in inventory.plans else SnapshotKey(0, 0)
            )
            place = (plan_key.attempt, plan_key.step, -1, fragment.plan_id, fragment.stripe, fragment.index)
            if (node.name, *place) in suspects:
                continue
            held.setdefault((fragment.stripe, fragment.index), set()).add(node.name)
        if report.decision is not None:
            known, holders = inventory.decisions.get(report.decision.decision_id, (report.decision, set()))
            if report.decision.generation.number > known.generation.number:
                known = report.decision  # it was raised above others, and not every node has recorded that yet
            whole = known if known.ledger is not None else report.decision  # a node of an older version keeps no ledger
            inventory.decisions[report.decision.decision_id] = (whole, holders | {node.name})
    return inventory


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanState:
    """A plan, and what is there of it."""

    plan: Plan
    rank_spares: Mapping[int, int]  # by rank: node losses that its shard survives by this plan; -1: it is lost now
    fragment_count: int  # parity fragments that are held
    fragment_total: int
    holder_count: int  # members that store the plan
    is_intact: bool  # as good as it was planned to be: spares = m everywhere


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotView:
    """One snapshot as it is now."""

    key: SnapshotKey
    world_size: int
    snapshot_id: str  # "" until all digests are known
    world_id: str
    digests: Mapping[int, str]
    sizes: Mapping[int, int]
    holders: Mapping[int, tuple[str, ...]]
    plans: tuple[PlanState, ...]
    rank_spares: Mapping[int, int]
    layouts: Mapping[int, str] = field(default_factory=dict)  # by rank, where it is known
    url: str = ""  # its directory on durable storage, if it lies there whole

    @property
    def is_complete(self) -> bool:
        """All digests are known and every shard is held."""
        return self.snapshot_id != "" and all(self.holders.get(rank) for rank in range(self.world_size))

    @property
    def is_restorable(self) -> bool:
        """From memory alone."""
        return self.snapshot_id != "" and self.spares > NOT_RECOVERABLE

    @property
    def is_available(self) -> bool:
        """From memory and durable storage together."""
        return self.is_restorable or (self.snapshot_id != "" and self.url != "")

    @property
    def spares(self) -> int:
        """How many more node losses every shard survives now; -1: some shard is lost."""
        if len(self.rank_spares) < self.world_size:  # before a walk over all ranks that a shard claims there are
            return NOT_RECOVERABLE
        return min((self.rank_spares.get(rank, NOT_RECOVERABLE) for rank in range(self.world_size)), default=-1)

    @property
    def unheld_ranks(self) -> tuple[int, ...]:
        """Ranks whose shard nobody holds; the first MAX_LISTED_RANKS of them."""
        unheld = (rank for rank in range(self.world_size) if not self.holders.get(rank))
        return tuple(itertools.islice(unheld, MAX_LISTED_RANKS))

    @property
    def lost_ranks(self) -> tuple[int, ...]:
        """Ranks whose shard neither is held nor can be rebuilt; the first MAX_LISTED_RANKS of them."""
        lost = (rank for rank in range(self.world_size) if self.rank_spares.get(rank, NOT_RECOVERABLE) < 0)
        return tuple(itertools.islice(lost, MAX_LISTED_RANKS))

    @property
    def size_bytes(self) -> int:
        return sum(self.sizes.values())

    def row(self, rank: int) -> VolumeShard:
        """The shard of ``rank``, which is known, as plans and completion records list it."""
        layout = self.layouts.get(rank, "")
        return VolumeShard(rank=rank, size_bytes=self.sizes[rank], digest=self.digests[rank], layout=layout)


def build_views(inventory: Inventory, shapes: ShapeCache) -> list[SnapshotView]:
    """All snapshots of the inventory, newest first."""
    by_key: dict[SnapshotKey, list[ShardRecord]] = defaultdict(list)
    for record in inventory.records.values():
        by_key[record.key].append(record)
    plans: dict[SnapshotKey, list[Plan]] = defaultdict(list)
    for plan in inventory.plans.values():
        plans[plan.key].append(plan)
    views = []
    for key in sorted({*by_key, *plans}, reverse=True):
        for table in _tables(key, by_key[key], plans[key]):
            views.append(_view(key, table, inventory, shapes))
    return views


class InventoryCache:
    """Inventory and snapshots of one run, not worked out again while every node reports the very same record."""

    def __init__(self) -> None:
        self._reports: Mapping[str, RunReport] = {}
        self._inventory = Inventory()
        self._views: tuple[SnapshotView, ...] = ()

    def look(
        self, run: str, nodes: Mapping[str, NodeState], shapes: ShapeCache
    ) -> tuple[Mapping[str, RunReport], Inventory, tuple[SnapshotView, ...]]:
        """The reports of ``run`` by node, and what follows from them."""
        reports = {name: node.runs[run] for name, node in nodes.items() if run in node.runs}
        known = self._reports
        if reports.keys() != known.keys() or any(known[name] is not report for name, report in reports.items()):
            inventory = take_inventory(run, nodes.values())
            views = tuple(build_views(inventory, shapes))  # may raise: nothing is kept then
            self._reports, self._inventory, self._views = reports, inventory, views
        return reports, self._inventory, self._views


@dataclass(slots=True)
class _Table:
    world_size: int
    world_id: str = ""
    snapshot_id: str = ""
    digests: dict[int, str] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    plans: list[Plan] = field(default_factory=list)
    layouts: dict[int, str] = field(default_factory=dict)

    def add(self, shard: ShardRecord | VolumeShard) -> None:
        """Take in a shard; its digest must be the rank's."""
        self.digests[shard.rank] = shard.digest
        self.sizes[shard.rank] = shard.size_bytes
        self.layouts[shard.rank] = shard.layout or self.layouts.get(shard.rank, "")


def _tables(key: SnapshotKey, records: list[ShardRecord], plans: list[Plan]) -> list[_Table]:
    """Digest tables under ``key``: one per snapshot id that plans name, one per world for the rest."""
    tables: dict[str, _Table] = {}
    for plan in plans:
        table = tables.setdefault(plan.snapshot_id, _Table(plan.world_size, snapshot_id=plan.snapshot_id))
        table.plans.append(plan)
        for member in plan.members:
            for shard in member.shards:
                table.add(shard)
    worlds: dict[tuple[str, int], list[ShardRecord]] = defaultdict(list)
    for record in records:
        worlds[record.world_id, record.world_size].append(record)
    for (world_id, world_size), shards in sorted(worlds.items()):
        loose = _loose_table(key, world_id, world_size, shards, tables)
        if loose is not None:
            tables[loose.snapshot_id or f"incomplete {world_id} {world_size}"] = loose
    return list(tables.values())


def _loose_table(
    key: SnapshotKey, world_id: str, world_size: int, shards: list[ShardRecord], tables: dict[str, _Table]
) -> _Table | None:
    """The table of one world's shards, unless plans name them already; None where a rank has two digests."""
    for table in tables.values():
        if table.plans and any(table.digests.get(shard.rank) == shard.digest for shard in shards):
            table.world_id = world_id
            _complete_from(table, key, shards)
    unplanned = [s for s in shards if not any(t.digests.get(s.rank) == s.digest for t in tables.values())]
    if not unplanned:
        return None
    loose = _Table(world_size, world_id)
    for shard in shards if len(unplanned) == len(shards) else unplanned:
        if not 0 <= shard.rank < world_size or loose.digests.get(shard.rank, shard.digest) != shard.digest:
            return None
        loose.add(shard)
    if len(loose.digests) == world_size:
        digests = [loose.digests[rank] for rank in range(world_size)]
        loose.snapshot_id = snapshot_id(key=key, world_size=world_size, shard_digests=digests)
    return loose


def _complete_from(table: _Table, key: SnapshotKey, shards: list[ShardRecord]) -> None:
    """Fill in the ranks of groups whose plan is not known, if the table then has the snapshot id that the plans name."""
    if len(table.digests) + len(shards) < table.world_size:
        return
    missing = set(range(table.world_size)) - set(table.digests)
    found = {shard.rank: shard for shard in shards if shard.rank in missing}
    if not missing or set(found) != missing:
        return
    digests = [table.digests.get(rank) or found[rank].digest for rank in range(table.world_size)]
    if snapshot_id(key=key, world_size=table.world_size, shard_digests=digests) == table.snapshot_id:
        for shard in found.values():
            table.add(shard)


def _view(key: SnapshotKey, table: _Table, inventory: Inventory, shapes: ShapeCache) -> SnapshotView:
    holders = {
        rank: tuple(sorted(inventory.holders(key, rank, digest), key=natural)) for rank, digest in table.digests.items()
    }
    plans = tuple(plan_state(plan, inventory, shapes) for plan in sorted(table.plans, key=lambda p: p.plan_id))
    spares = {rank: len(nodes) - 1 for rank, nodes in holders.items()}
    for state in plans:
        for rank, value in state.rank_spares.items():
            spares[rank] = max(spares.get(rank, NOT_RECOVERABLE), value)
    is_known = len(table.digests) == table.world_size
    return SnapshotView(
        key=key,
        world_size=table.world_size,
        snapshot_id=table.snapshot_id if is_known else "",
        world_id=table.world_id,
        digests=table.digests,
        sizes=table.sizes,
        holders=holders,
        plans=plans,
        rank_spares=spares,
        layouts=table.layouts,
    )


def data_holder(plan: Plan, member: int, ranks: tuple[int, ...], inventory: Inventory) -> str:
    """A node that holds all of ``ranks``' shards of ``member``'s volume, its own if it does; "" if none."""
    owner = plan.members[member]
    digests = {shard.rank: shard.digest for shard in owner.shards}
    common = set.intersection(*(inventory.holders(plan.key, rank, digests[rank]) for rank in ranks)) if ranks else set()
    return owner.node if owner.node in common else min(common, key=natural, default="")


def parity_holder(plan: Plan, stripe: int, index: int, inventory: Inventory) -> str:
    """A node that holds this parity fragment, the planned one if it does; "" if none."""
    holders = inventory.fragments.get(plan.plan_id, {}).get((stripe, index), set())
    planned = plan.members[geometry.parity_members(stripe, n=len(plan.members), m=plan.m)[index]].node
    return planned if planned in holders else min(holders, key=natural, default="")


def stripe_holders(plan: Plan, shape: StripeShape, inventory: Inventory) -> list[str | None]:
    """By fragment of the stripe: the node that it is read from; "" = none, None = all zeros, which need no node."""
    held: list[str | None] = [
        data_holder(plan, member, ranks, inventory) if ranks else None for member, ranks in shape.data
    ]
    held.extend(parity_holder(plan, shape.stripe, index, inventory) for index in range(plan.m))
    return held


def plan_state(plan: Plan, inventory: Inventory, shapes: ShapeCache) -> PlanState:
    """What is there of ``plan`` now."""
    spares = {shard.rank: plan.m for member in plan.members for shard in member.shards}
    stripes = shapes.shapes(plan)
    for shape in stripes:
        value = stripe_spares(stripe_holders(plan, shape, inventory), plan.k)
        for _, ranks in shape.data:
            for rank in ranks:
                spares[rank] = min(spares[rank], value)
    for member in plan.members:
        for shard in member.shards:
            if shard.size_bytes == 0 or plan.m == 0:
                spares[shard.rank] = len(inventory.holders(plan.key, shard.rank, shard.digest)) - 1
    held = inventory.fragments.get(plan.plan_id, {})
    wanted = [(shape.stripe, index) for shape in stripes for index in range(plan.m)]
    return PlanState(
        plan=plan,
        rank_spares=spares,
        fragment_count=sum(1 for place in wanted if held.get(place)),
        fragment_total=len(wanted),
        holder_count=len(inventory.plan_holders.get(plan.plan_id, ())),
        is_intact=all(value >= plan.m for value in spares.values()),
    )


def stripe_spares(holders: list[str | None], k: int) -> int:
    """Node losses, the worst first, after which the stripe still decodes; -1: it does not decode now."""
    counts: dict[str, int] = defaultdict(int)
    left = 0
    for holder in holders:
        if holder is None:
            left += 1
        elif holder:
            left += 1
            counts[holder] += 1
    spares = NOT_RECOVERABLE
    worst = sorted(counts.values(), reverse=True)
    while left >= k:
        spares += 1
        if not worst:
            break
        left -= worst.pop(0)
    return spares
