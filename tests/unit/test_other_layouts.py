"""Deciding and staging for ranks of another layout: who takes whole shards, where each is, when a node is ready."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from backstay.errors import SnapshotNotFoundError, UnavailableError
from backstay.ids import Generation
from backstayd.core.inventory.catalog import ShapeCache, build_views
from backstayd.core.inventory.nodes import NodeState
from backstayd.core.inventory.run_context import RunContext
from backstayd.core.messages.decisions import (
    Base,
    Decision,
    DecisionPhase,
    Outcome,
    Placement,
    ShardSource,
    SourceKind,
    StagingState,
    base_size,
    readers_of,
    takes_whole,
)
from backstayd.core.messages.desired import RunDesired
from backstayd.core.messages.report import SessionPhase, SessionRecord
from backstayd.core.recover.choice import sources_of
from backstayd.core.recover.locate import locate
from backstayd.core.recover.rebuild_plan import choose_targets
from backstayd.node.reconcile.actions import Restoring, StartJob, View
from backstayd.node.reconcile.planner import plan_actions
from backstayd.node.reconcile.staging import staging_of, wanted_ranks
from backstayd.node.reconcile.tasks import TaskKind
from tests.kit.wording import refuses
from tests.unit.test_core_properties import inventory_of, nodes_with, snapshot_plan


def decision(*, base: int, now: int, layouts: tuple[str, ...] = ()) -> Decision:
    """``base`` ranks wrote, ``now`` ranks on n0, n1, ... restore."""
    return Decision(
        decision_id="d" * 32,
        generation=Generation(3, "cc"),
        run="j/r",
        world_id="w2",
        world_size=now,
        attempt=2,
        outcome=Outcome.EXACT,
        base=Base(attempt=1, step=5, snapshot_id="5" * 64, world_size=base),
        placements=tuple(Placement(rank=rank, node=f"n{rank}") for rank in range(now)),
        sources=tuple(
            ShardSource(
                rank=rank,
                size_bytes=100,
                digest=f"{rank:064x}",
                kind=SourceKind.PEER,
                holders=("n9",),
                layout=layouts[rank] if layouts else "",
            )
            for rank in range(base)
        ),
    )


def test_whole_shards_are_taken_by_as_many_ranks_whose_layout_is_the_same_or_not_known() -> None:
    same = decision(base=2, now=2, layouts=("a", "b"))
    assert [takes_whole(same, rank=rank, layout=layout) for rank, layout in ((0, "a"), (1, "b"), (1, ""))] == [True] * 3
    assert not takes_whole(same, rank=0, layout="b")
    assert takes_whole(decision(base=2, now=2), rank=0, layout="a"), "what an older version wrote says nothing"
    assert not takes_whole(decision(base=3, now=2), rank=0, layout="")
    fresh = replace(same, base=None, sources=(), outcome=Outcome.NONE)
    assert takes_whole(fresh, rank=0, layout="a")


def test_a_decision_of_before_restores_as_many_ranks_as_the_world_has() -> None:
    old = decision(base=2, now=2)
    assert old.base is not None
    old = replace(old, base=replace(old.base, world_size=0))
    assert base_size(old) == 2
    assert readers_of(old) == {0: "n0", 1: "n1"}
    assert readers_of(decision(base=4, now=2)) == {}


def view_of(made: Decision, *restoring: Restoring, **more: Any) -> View:
    sessions = tuple(
        SessionRecord(world_id=r.world_id, rank=r.rank, world_size=made.world_size, phase=SessionPhase.RESTORING)
        for r in restoring
    )
    desired = RunDesired(run="j/r", world_id="w2", decision=made, decision_phase=DecisionPhase.PREPARE)
    peers = {"n0": "n0:1", "n9": "n9:1"}
    fields: dict[str, Any] = {"node": "n0", "incarnation": "i", "desired": desired, "peers": peers}
    return View(**fields, sessions=sessions, restoring=restoring, **more)


def state_of(view: View) -> StagingState:
    staging = staging_of(view)
    assert staging is not None
    return staging.state


def test_a_node_is_ready_when_its_ranks_have_said_that_they_have_all_they_need() -> None:
    made = decision(base=3, now=1)
    waiting = Restoring(world_id="w2", rank=0)
    assert plan_actions(view_of(made, waiting)) == [], "chunks are fetched when they are asked for, whole shards never"
    assert state_of(view_of(made, waiting)) is StagingState.STAGING
    assert state_of(view_of(made, replace(waiting, staged="another decision"))) is StagingState.STAGING
    assert state_of(view_of(made, replace(waiting, staged=made.decision_id))) is StagingState.READY
    assert state_of(view_of(made)) is StagingState.STAGING, "a rank that is not there has said nothing"


def test_ranks_of_both_kinds_on_one_node_are_waited_for() -> None:
    made = decision(base=2, now=2, layouts=("rows", "rows"))
    made = replace(made, placements=tuple(Placement(rank=rank, node="n0") for rank in range(2)))
    whole = Restoring(world_id="w2", rank=0, layout="rows")
    other = Restoring(world_id="w2", rank=1, layout="columns")
    now = view_of(made, whole, other)
    assert wanted_ranks(now, made) == {0}
    (action,) = plan_actions(now)
    assert isinstance(action, StartJob)
    assert action.key.kind is TaskKind.FETCH
    verified = frozenset({(made.decision_id, made.sources[0].digest)})
    assert state_of(replace(now, verified=verified)) is StagingState.STAGING
    said = (whole, replace(other, staged=made.decision_id))
    assert state_of(replace(now, restoring=said)) is StagingState.STAGING
    assert state_of(replace(now, restoring=said, verified=verified)) is StagingState.READY


@settings(max_examples=120, deadline=None)
@given(st.integers(2, 8), st.integers(1, 3), st.integers(0, 2**32))
def test_every_shard_of_another_layout_has_holders_or_one_owner_that_is_there(n: int, m: int, seed: int) -> None:
    if m >= n:
        return
    draw = random.Random(seed)
    plan = snapshot_plan(draw, n, m)
    lost = set(draw.sample([member.node for member in plan.members], draw.randint(0, m)))
    nodes = nodes_with(plan, lost)
    inventory = inventory_of(nodes)
    (view,) = build_views(inventory, ShapeCache())
    hosts = set(draw.sample(sorted(nodes), draw.randint(1, len(nodes))))
    targets = choose_targets(view, placements={}, nodes=nodes, inventory=inventory, preferred=hosts)
    sources = sources_of(view, readers={}, targets=targets)
    assert [source.rank for source in sources] == list(range(view.world_size))
    for source in sources:
        assert source.digest == view.digests[source.rank]
        if source.kind is SourceKind.REBUILD:
            assert source.rank in view.unheld_ranks
            assert len(source.holders) == 1
            assert set(source.holders) <= hosts, "who reads it owns it"
        else:
            assert source.kind is SourceKind.PEER
            assert source.holders == view.holders[source.rank]
            assert not set(source.holders) & lost


def context_of(nodes: dict[str, NodeState]) -> RunContext:
    inventory = inventory_of(nodes)
    views = tuple(build_views(inventory, ShapeCache()))
    return RunContext(
        run="j/r",
        now_s=0.0,
        lease_s=1.0,
        nodes=nodes,
        reports={name: node.runs["j/r"] for name, node in nodes.items() if "j/r" in node.runs},
        inventory=inventory,
        shapes=ShapeCache(),
        views=views,
        live=frozenset(range(len(views))),
        lineage=(),
        head=None,
        worlds={},
        generation=Generation(1, "cc"),
        has_long_memory=True,
    )


def test_a_visitor_is_told_where_every_shard_is_or_what_is_missing() -> None:
    plan = snapshot_plan(random.Random(3), 6, 2)
    found = locate(context_of(nodes_with(plan, set())), 0)
    assert (found.base.step, found.base.world_size, len(found.sources)) == (plan.step, plan.world_size, plan.world_size)
    addresses = {peer.name for peer in found.peers}
    assert all(set(source.holders) <= addresses for source in found.sources)
    assert locate(context_of(nodes_with(plan, set())), plan.step) == found
    with refuses(SnapshotNotFoundError, "no_snapshot", "step 7", "step 5"):
        locate(context_of(nodes_with(plan, set())), 7)
    lost = next(member.node for member in plan.members if member.shards)
    with refuses(UnavailableError, "must_be_rebuilt"):
        locate(context_of(nodes_with(plan, {lost})), 0)


def test_the_layout_of_each_rank_is_known_from_shards_and_from_plans() -> None:
    plan = snapshot_plan(random.Random(3), 4, 1)
    members = tuple(
        replace(member, shards=tuple(replace(shard, layout=f"of {shard.rank}") for shard in member.shards))
        for member in plan.members
    )
    plan = replace(plan, members=members).sealed()
    (view,) = build_views(inventory_of(nodes_with(plan, set())), ShapeCache())
    assert view.layouts == {rank: f"of {rank}" for rank in range(plan.world_size)}
