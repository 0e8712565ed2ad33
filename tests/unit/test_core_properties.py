"""Properties of the core's arithmetic: groups, spares, rebuild plans, lineages, release, interval."""

from __future__ import annotations

import itertools
import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from backstay.ids import SnapshotKey, snapshot_id
from backstayd.core.inventory import geometry
from backstayd.core.inventory.catalog import Inventory, ShapeCache, SnapshotView, build_views, plan_state, stripe_spares
from backstayd.core.inventory.lineage import extend, is_live
from backstayd.core.inventory.nodes import NodeState, natural
from backstayd.core.messages.decisions import Lineage
from backstayd.core.messages.plans import FragmentRecord, Member, Plan, ShardRecord, VolumeShard
from backstayd.core.messages.report import NodeIdentity, NodeReport, RunReport, SessionPhase, SessionRecord
from backstayd.core.protect.groups import form_groups
from backstayd.core.protect.interval import Interval
from backstayd.core.protect.retention import releasable
from backstayd.core.recover.rebuild_plan import choose_targets, plan_rebuilds

CHUNK = 1024
KEY = SnapshotKey(1, 5)


@given(
    st.dictionaries(st.from_regex(r"n[0-9]{1,3}", fullmatch=True), st.sampled_from(["", "a", "b", "c"]), min_size=1),
    st.integers(1, 16),
    st.integers(0, 4),
)
def test_groups_cover_each_node_once_are_even_and_can_hold_their_parity(
    domains: dict[str, str], group_size: int, m: int
) -> None:
    groups = form_groups(domains, group_size=group_size, m=m)
    assert sorted(name for group in groups for name in group) == sorted(domains)
    sizes = {len(group) for group in groups}
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) > m or len(groups) == 1
    for domain in {d for d in domains.values() if d}:
        counts = [sum(1 for name in group if domains[name] == domain) for group in groups]
        assert max(counts) - min(counts) <= 1, "a domain is spread as evenly as can be"


def test_names_sort_as_people_count() -> None:
    assert sorted(["node-10", "node-9", "node-1x", "a", "node-1"], key=natural) == [
        "a", "node-1", "node-1x", "node-9", "node-10",
    ]  # fmt: skip


@given(st.lists(st.sampled_from([None, "", "a", "b", "c", "d", "e"]), min_size=1, max_size=7), st.integers(1, 6))
def test_spares_of_a_stripe_are_what_trying_every_loss_says(holders: list[str | None], k: int) -> None:
    nodes = sorted({h for h in holders if h})

    def decodes(lost: set[str]) -> bool:
        return sum(1 for h in holders if h is None or (h and h not in lost)) >= k

    expected = -1
    for count in range(len(nodes) + 1):
        if not all(decodes(set(lost)) for lost in itertools.combinations(nodes, count)):
            break
        expected = count
    assert stripe_spares(holders, k) == expected


def snapshot_plan(draw: random.Random, n: int, m: int) -> Plan:
    """One plan over n members with random, possibly empty volumes of one or two shards."""
    members, rank = [], 0
    for index in range(n):
        shards = []
        for _ in range(draw.choice([0, 1, 1, 1, 2])):
            size = draw.choice([1, CHUNK - 1, CHUNK, 3 * CHUNK + 5, 11 * CHUNK])
            shards.append(VolumeShard(rank=rank, size_bytes=size, digest=f"d{rank}"))
            rank += 1
        members.append(Member(node=f"n{index}", incarnation="i", bulk_address=f"n{index}:1", shards=tuple(shards)))
    if rank == 0:
        first = VolumeShard(rank=0, size_bytes=7 * CHUNK, digest="d0")
        members[0] = Member(node="n0", incarnation="i", bulk_address="n0:1", shards=(first,))
        rank = 1
    identity = snapshot_id(key=KEY, world_size=rank, shard_digests=[f"d{r}" for r in range(rank)])
    return Plan(
        run="j/r",
        snapshot_id=identity,
        attempt=KEY.attempt,
        step=KEY.step,
        world_size=rank,
        m=m,
        chunk_bytes=CHUNK,
        members=tuple(members),
    ).sealed()


def nodes_with(plan: Plan, lost: set[str]) -> dict[str, NodeState]:
    """The nodes that are left, holding all that the plan gives them."""
    nodes = {}
    for index, member in enumerate(plan.members):
        if member.node in lost:
            continue
        n = len(plan.members)
        fragments = tuple(
            FragmentRecord(plan_id=plan.plan_id, stripe=stripe, index=parity)
            for stripe in range(n)
            for parity, holder in enumerate(geometry.parity_members(stripe, n=n, m=plan.m))
            if holder == index
        )
        shards = tuple(
            ShardRecord(
                attempt=plan.attempt,
                step=plan.step,
                rank=s.rank,
                world_size=plan.world_size,
                size_bytes=s.size_bytes,
                digest=s.digest,
                world_id="w",
            )
            for s in member.shards
        )
        run = RunReport(run=plan.run, shards=shards, plans=(plan,), fragments=fragments)
        identity = NodeIdentity(name=member.node, incarnation="i", bulk_address=member.bulk_address)
        nodes[member.node] = NodeState(NodeReport(node=identity, sequence=1, runs=(run,)), 0.0)
    return nodes


def inventory_of(nodes: dict[str, NodeState]) -> Inventory:
    from backstayd.core.inventory.catalog import take_inventory

    return take_inventory("j/r", nodes.values())


@settings(max_examples=120, deadline=None)
@given(st.integers(2, 8), st.integers(1, 3), st.integers(0, 2**32))
def test_after_any_m_losses_every_lost_shard_is_rebuilt_from_k_present_fragments(n: int, m: int, seed: int) -> None:
    if m >= n:
        return
    draw = random.Random(seed)
    plan = snapshot_plan(draw, n, m)
    lost = set(draw.sample([member.node for member in plan.members], draw.randint(1, m)))
    nodes, shapes = nodes_with(plan, lost), ShapeCache()
    inventory = inventory_of(nodes)
    (view,) = build_views(inventory, shapes)
    assert view.snapshot_id == plan.snapshot_id
    assert view.spares >= m - len(lost)
    targets = choose_targets(view, placements={}, nodes=nodes, inventory=inventory)
    assert set(targets) == set(view.unheld_ranks)
    rebuilds = plan_rebuilds(view, targets=targets, nodes=nodes, inventory=inventory, shapes=shapes)
    assert {t.rank for rebuild in rebuilds for t in rebuild.targets} == set(view.unheld_ranks)
    for rebuild in rebuilds:
        stripes = {task.stripe for task in rebuild.tasks}
        assert len(stripes) == len(rebuild.tasks), "both lost blocks of a stripe come from one read"
        for target in rebuild.targets:
            for stripe in geometry.member_stripes(target.member_index, n=n, m=m):
                chunks = geometry.block_range(plan, stripe, target.member_index)
                if any(s.rank == target.rank for s in geometry.segments(plan, target.member_index, chunks)):
                    assert stripe in stripes
        for task in rebuild.tasks:
            assert task.decoder not in lost
            assert len({source.index for source in task.sources}) == len(task.sources) >= plan.k
            order = geometry.data_members(task.stripe, n=n, m=m)
            parity = geometry.parity_members(task.stripe, n=n, m=m)
            left = {plan.k + index for index, member in enumerate(parity) if plan.members[member].node not in lost}
            assert left <= {source.index for source in task.sources}, "what is left over is a spare"
            for source in task.sources:
                is_empty = source.index < plan.k and not geometry.block_range(plan, task.stripe, order[source.index])
                assert is_empty or source.node not in lost


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 7), st.integers(1, 3), st.integers(0, 2**32))
def test_the_catalogue_counts_spares_as_trying_every_loss_does(n: int, m: int, seed: int) -> None:
    if m >= n:
        return
    draw = random.Random(seed)
    plan = snapshot_plan(draw, n, m)
    lost = set(draw.sample([member.node for member in plan.members], draw.randint(0, m)))
    nodes, shapes = nodes_with(plan, lost), ShapeCache()
    (view,) = build_views(inventory_of(nodes), shapes)

    def survives(more: set[str]) -> bool:
        left = {name: node for name, node in nodes.items() if name not in more}
        views = build_views(inventory_of(left), shapes)
        return bool(views) and views[0].is_restorable

    for extra in itertools.combinations(sorted(nodes), max(view.spares, 0)):
        assert survives(set(extra)), f"{extra} more were said to be survived"


def test_an_intact_plan_has_m_spares_and_says_so() -> None:
    plan = snapshot_plan(random.Random(1), 6, 2)
    state = plan_state(plan, inventory_of(nodes_with(plan, set())), ShapeCache())
    assert state.is_intact
    assert set(state.rank_spares.values()) == {2}
    assert state.fragment_count == state.fragment_total


def view_of(attempt: int, step: int, *, spares: int, world_id: str = "w") -> SnapshotView:
    return SnapshotView(
        key=SnapshotKey(attempt, step),
        world_size=1,
        snapshot_id=f"s{attempt}-{step}" if spares >= 0 else "",
        world_id=world_id,
        digests={0: "d"} if spares >= 0 else {},
        sizes={0: 1},
        holders={0: ("n1",)} if spares >= 0 else {},
        plans=(),
        rank_spares={0: spares},
    )


def test_steps_above_the_base_in_older_attempts_are_dead() -> None:
    first = extend((), attempt=1, base=(0, 0), world_id="w1")
    second = extend(first, attempt=2, base=(1, 10), world_id="w2")
    third = extend(second, attempt=3, base=(1, 8), world_id="w3")
    assert third == (
        Lineage(attempt=3, base_attempt=1, base_step=8, world_id="w3"),
        Lineage(attempt=1, base_attempt=0, base_step=0, world_id="w1"),
    )
    alive = [(3, 9, "w3"), (1, 8, "w1"), (1, 3, "w1")]
    dead = [(2, 11, "w2"), (1, 9, "w1"), (1, 11, "w1"), (3, 9, "another world of the same number")]
    assert [is_live(view_of(a, s, spares=1, world_id=w), third) for a, s, w in alive] == [True] * 3
    assert [is_live(view_of(a, s, spares=1, world_id=w), third) for a, s, w in dead] == [False] * 4


def released(spares: list[int], *, target: int, keep: int = 1, dead: frozenset[int] = frozenset()) -> set[int]:
    """Steps len(spares), ..., 1, newest first, with these spares."""
    views = [view_of(1, len(spares) - i, spares=value) for i, value in enumerate(spares)]
    live = set(range(len(views))) - dead
    return set(releasable(views, live=live, dead=dead, keep=keep, target=target, abandoned=()))


def test_a_protected_snapshot_goes_only_when_a_newer_one_is_as_well_protected() -> None:
    assert released([0, 2], target=2) == set()
    assert released([1, 2], target=2) == set()
    assert released([2, 2], target=2) == {1}
    assert released([2, 1, 2], target=2) == {1, 2}
    assert released([0, 0], target=1) == set(), "what protects nothing does not push out what is being protected"
    assert released([0, 0], target=0) == {1}, "without parity, complete is enough"
    assert released([2, 2, 2], target=2, keep=2) == {2}
    assert released([2, 1, 1], target=2, keep=2) == {2}, "two that lost a spare and are not whole would fill all slots"
    assert released([1, 0, 1], target=1, keep=2) == {1}, "nor does one between two that protect"
    assert released([2, 0, 1], target=2, keep=2) == set()
    assert released([0, 1, 1], target=1, keep=2) == set()
    assert released([1, 1, 1], target=2, keep=2) == set()
    assert released([0, -1], target=2) == {1}, "an incomplete older one has no worth beside a whole one"
    assert released([-1, 2], target=2) == set(), "an incomplete newer one may still become whole"


def test_a_dead_snapshot_that_protects_goes_only_when_a_live_one_is_as_good() -> None:
    assert released([2, 1], target=2, dead=frozenset({0})) == set()
    assert released([2, 2], target=2, dead=frozenset({0})) == {0}
    assert released([-1, 0], target=2, dead=frozenset({0})) == {0}, "remnants only fill slots"
    assert released([-1, -1], target=2, dead=frozenset({0, 1})) == {0, 1}
    for spares, worse in (([2, 2], 1), ([2, 0], 1), ([0, 2], 0)):
        assert released(spares, target=2, dead=frozenset({0, 1})) == {worse}, "two of them fill all slots (seed 50003)"


def sessions_at(last_step: int, skipped_step: int = 0) -> list[SessionRecord]:
    return [
        SessionRecord(
            world_id="w",
            rank=rank,
            world_size=2,
            phase=SessionPhase.TRAINING,
            last_step=last_step - rank,
            skipped_step=skipped_step if rank == 0 else 0,
            is_short_of_slots=rank == 0,
        )
        for rank in range(2)
    ]


def test_a_skip_raises_the_interval_once_at_a_step_announced_ahead() -> None:
    interval = Interval()
    assert interval.update(sessions_at(10), is_protected=True, lease_s=3, now_s=1) is None
    note = interval.update(sessions_at(11, skipped_step=11), is_protected=True, lease_s=3, now_s=2)
    assert note is not None
    assert interval.schedule.interval_steps == 2
    assert interval.schedule.from_step >= 11 + 2 * 2
    assert interval.schedule.from_step % 2 == 0
    assert interval.update(sessions_at(11, skipped_step=11), is_protected=True, lease_s=3, now_s=3) is None
    assert interval.update(sessions_at(12, skipped_step=12), is_protected=True, lease_s=3, now_s=4) is None, (
        "a skip before the change takes effect says nothing of the new interval"
    )


def test_skips_while_nothing_of_this_world_is_protected_do_not_raise_the_interval() -> None:
    interval = Interval()
    assert interval.update(sessions_at(5, skipped_step=5), is_protected=False, lease_s=3, now_s=1) is None
    assert interval.schedule.interval_steps == 1


def test_after_a_smooth_while_the_interval_is_lowered_again_announced_ahead() -> None:
    interval = Interval()
    interval.update(sessions_at(4, skipped_step=4), is_protected=True, lease_s=3, now_s=1)
    step, notes = 4, []
    while interval.schedule.interval_steps > 1:
        step += 1
        assert step < 1000
        before = interval.schedule
        note = interval.update(sessions_at(step, skipped_step=4), is_protected=True, lease_s=3, now_s=float(step))
        if note:
            notes.append(note)
            assert interval.schedule.from_step > step
            assert interval.schedule.previous_interval_steps == before.interval_steps
    assert len(notes) == 1


def test_targets_of_a_rebuild_are_where_the_rank_runs_else_spread_over_those_that_hold_least() -> None:
    plan = snapshot_plan(random.Random(3), 6, 2)
    lost = {member.node for member in plan.members if member.shards}
    lost = set(sorted(lost)[:2])
    nodes = nodes_with(plan, lost)
    inventory = inventory_of(nodes)
    (view,) = build_views(inventory, ShapeCache())
    home = sorted(nodes)[0]
    placed = choose_targets(view, placements=dict.fromkeys(view.unheld_ranks, home), nodes=nodes, inventory=inventory)
    assert set(placed.values()) == {home}
    spread = Counter(choose_targets(view, placements={}, nodes=nodes, inventory=inventory).values())
    assert max(spread.values()) - min(spread.values()) <= 1 or len(view.unheld_ranks) < 2
