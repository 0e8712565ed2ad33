"""Recomputing lost shards: who decodes which stripe from what, and who holds the result. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from backstayd.core.inventory.catalog import Inventory, ShapeCache, SnapshotView, StripeShape, stripe_holders
from backstayd.core.inventory.nodes import NodeState, natural
from backstayd.core.messages.plans import FragmentSource, Plan, Rebuild, RebuildTarget, RebuildTask, seal_rebuild


def choose_targets(
    view: SnapshotView,
    *,
    placements: Mapping[int, str],
    nodes: Mapping[str, NodeState],
    inventory: Inventory,
    preferred: Collection[str] = (),
) -> dict[int, str]:
    """A node for every shard that nobody holds.

    It is where the rank that wrote it runs now. Else, among ``preferred`` (nodes that will read it) if one has room, it is the
    node that holds least of this snapshot, because its shards and parity share stripes with the lost one; then the one with
    most room.
    """
    weight: Counter[str] = Counter()
    for holders in view.holders.values():
        weight.update(holders)
    for state in view.plans:
        for holders_of_fragment in inventory.fragments.get(state.plan.plan_id, {}).values():
            weight.update(holders_of_fragment)
    room = {name: node.free_bytes for name, node in nodes.items()}
    targets: dict[int, str] = {}
    for rank in view.unheld_ranks:
        size = view.sizes.get(rank, 0)
        owner = placements.get(rank, "")
        if owner not in nodes:
            fitting = [name for name in nodes if room[name] >= size] or list(nodes)
            fitting = [name for name in fitting if name in preferred] or fitting
            owner = min(fitting, key=lambda name: (weight[name], -room[name], natural(name)), default="")
        if owner:
            targets[rank] = owner
            weight[owner] += len(view.digests)
            room[owner] -= size
    return targets


def plan_rebuilds(
    view: SnapshotView,
    *,
    targets: Mapping[int, str],
    nodes: Mapping[str, NodeState],
    inventory: Inventory,
    shapes: ShapeCache,
) -> tuple[Rebuild, ...]:
    """One rebuild for each plan that still decodes some of the lost shards; each shard is in one of them."""
    rebuilds = []
    left = [rank for rank in view.unheld_ranks if rank in targets]
    load: Counter[str] = Counter()
    for state in sorted(view.plans, key=lambda s: (-min(s.rank_spares.values(), default=-1), s.plan.plan_id)):
        ranks = [rank for rank in left if state.rank_spares.get(rank, -1) >= 0]
        if ranks:
            rebuild = _rebuild(state.plan, {rank: targets[rank] for rank in ranks}, nodes, inventory, shapes, load)
            if rebuild is not None:
                rebuilds.append(rebuild)
                left = [rank for rank in left if rank not in ranks]
    return tuple(rebuilds)


def _rebuild(
    plan: Plan,
    targets: Mapping[int, str],
    nodes: Mapping[str, NodeState],
    inventory: Inventory,
    shapes: ShapeCache,
    load: Counter[str],
) -> Rebuild | None:
    decoders = sorted((set(nodes) & inventory.plan_holders.get(plan.plan_id, set())), key=natural)
    if not decoders:
        return None
    tasks = []
    for shape in shapes.shapes(plan):
        if any(rank in targets for _, ranks in shape.data for rank in ranks):
            encoder = plan.members[shape.stripe].node
            decoder = encoder if encoder in decoders else min(decoders, key=lambda name: (load[name], natural(name)))
            load[decoder] += 1
            sources = _sources(plan, shape, nodes, inventory)
            tasks.append(RebuildTask(stripe=shape.stripe, decoder=decoder, sources=sources))
    owners = tuple(
        RebuildTarget(
            member_index=index,
            rank=shard.rank,
            digest=shard.digest,
            node=targets[shard.rank],
            bulk_address=nodes[targets[shard.rank]].identity.bulk_address,
        )
        for index, member in enumerate(plan.members)
        for shard in member.shards
        if shard.rank in targets
    )
    return seal_rebuild(Rebuild(rebuild_id="", plan=plan, targets=owners, tasks=tuple(tasks)))


def _sources(
    plan: Plan, shape: StripeShape, nodes: Mapping[str, NodeState], inventory: Inventory
) -> tuple[FragmentSource, ...]:
    """Every fragment of the stripe that is left: the decoder reads k of them, and others where one fails."""
    sources = []
    for index, holder in enumerate(stripe_holders(plan, shape, inventory)):
        if holder is None:  # all zeros: listed, never read
            member = plan.members[shape.data[index][0]]
            node, address = member.node, member.bulk_address
        elif holder in nodes:
            node, address = holder, nodes[holder].identity.bulk_address
        else:
            continue
        sources.append(FragmentSource(stripe=shape.stripe, index=index, node=node, bulk_address=address))
    return tuple(sources)


def is_still_possible(
    rebuild: Rebuild, *, nodes: Mapping[str, NodeState], inventory: Inventory, shapes: ShapeCache
) -> bool:
    """Whether every decoder and target of a rebuild is still there, and k sources of each stripe."""
    addresses = {node.name: node.identity.bulk_address for node in nodes.values()}
    if any(addresses.get(target.node) != target.bulk_address for target in rebuild.targets):
        return False
    plan, holders = rebuild.plan, inventory.plan_holders.get(rebuild.plan.plan_id, set())
    stripes = {shape.stripe: shape for shape in shapes.shapes(plan)}
    return all(
        task.decoder in holders
        and sum(_is_held(plan, stripes[task.stripe], source, addresses, inventory) for source in task.sources) >= plan.k
        for task in rebuild.tasks
    )


def _is_held(
    plan: Plan, shape: StripeShape, source: FragmentSource, addresses: Mapping[str, str], inventory: Inventory
) -> bool:
    is_reachable = addresses.get(source.node) == source.bulk_address
    if source.index >= plan.k:
        holders = inventory.fragments.get(plan.plan_id, {}).get((shape.stripe, source.index - plan.k), set())
        return is_reachable and source.node in holders
    member, ranks = shape.data[source.index]
    digests = {shard.rank: shard.digest for shard in plan.members[member].shards}
    is_held = all(source.node in inventory.holders(plan.key, rank, digests[rank]) for rank in ranks)
    return not ranks or (is_reachable and is_held)


def open_targets(rebuild: Rebuild, inventory: Inventory) -> Sequence[RebuildTarget]:
    """Targets that do not hold their shard yet."""
    key = rebuild.plan.key
    return [t for t in rebuild.targets if t.node not in inventory.holders(key, t.rank, t.digest)]
