"""Draining nodes: what stays protected, when they may be stopped, and what no coordinator forgets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from backstay.errors import UsageError
from backstayd.core.drain_orders import DrainState
from backstayd.core.inventory.catalog import take_inventory
from backstayd.core.inventory.nodes import NodeState
from backstayd.core.messages.plans import Quarantined
from backstayd.core.policy import CorePolicy
from tests.kit.wording import refuses, says
from tests.simulation.cluster import Cluster, Job
from tests.simulation.engine import Engine
from tests.simulation.scenario import Scenario

RUN = "default/gpt"


def training(node_count: int, *, seed: int = 1, parity: int | None = None, keep: int = 1) -> Cluster:
    """A job with a rank on every node, protected."""
    engine = Engine(seed)
    policy = CorePolicy(lease_s=1.5, parity=parity, keep=keep)
    cluster = Cluster(engine, node_count=node_count, policy=policy)
    cluster.start_job(Job.on(RUN, node_count))
    assert engine.run_until(lambda: cluster.is_protected(RUN) and cluster.checker.protected_step(RUN) > 2, limit_s=20)
    return cluster


def is_safe(cluster: Cluster, name: str) -> bool:
    verdict = cluster.core().drains.get(name) if cluster.control is not None else None
    return verdict is not None and verdict.state is DrainState.SAFE


def drained(node_count: int, *names: str, **options: Any) -> Cluster:
    """A job with a rank on every node, protected, and nodes that may be stopped."""
    cluster = training(node_count, **options)
    for name in names:
        cluster.drain(name)
    assert cluster.engine.run_until(lambda: all(is_safe(cluster, name) for name in names), limit_s=30)
    return cluster


def spares_without(cluster: Cluster, *names: str) -> int:
    """True spares of the best snapshot if those nodes were gone now."""
    truth = cluster.checker.runs[RUN]
    chain = cluster.checker._live_chain(truth)
    left = set(cluster.nodes) - set(names)
    places = cluster.checker._candidates(RUN, truth, chain)
    return max((cluster.checker._true_spares(RUN, place, left) for place in places), default=-1)


@pytest.mark.parametrize(
    ("count", "parity", "spares"), [(2, None, 0), (3, None, 1), (4, None, 1), (4, 3, 2), (6, None, 2)]
)
def test_a_drained_node_costs_no_redundancy_that_the_others_can_give(
    count: int, parity: int | None, spares: int
) -> None:
    cluster = training(count, parity=parity)
    before = cluster.core().runs[RUN].evaluation
    assert before is not None
    assert cluster.drain("n2")
    lowest = [before.spares]

    def look() -> bool:
        evaluation = cluster.core().runs[RUN].evaluation
        assert evaluation is not None
        lowest[0] = min(lowest[0], evaluation.spares)
        return is_safe(cluster, "n2")

    assert cluster.engine.run_until(look, limit_s=20), cluster.core().drains
    assert spares_without(cluster, "n2") >= spares
    assert lowest[0] == before.spares, "nothing was given up on the way"
    assert says("trainers_stay", cluster.core().drains["n2"].reason, trainers=f"rank 1 of {RUN}")


def test_while_a_node_drains_every_new_snapshot_outlives_its_stop() -> None:
    cluster = drained(4, "n2")
    step = cluster.checker.protected_step(RUN)
    seen: list[int] = []

    def look() -> bool:
        seen.append(spares_without(cluster, "n2"))
        assert is_safe(cluster, "n2"), "it never takes back that the node may be stopped"
        return cluster.checker.protected_step(RUN) > step + 10

    assert cluster.engine.run_until(look, limit_s=30)
    assert min(seen) >= 1


def test_a_new_coordinator_knows_from_the_nodes_who_drains() -> None:
    cluster = training(4)
    cluster.drain("n2")
    assert cluster.engine.run_until(lambda: cluster.nodes["n2"].is_draining, limit_s=5)
    cluster.crash_coordinator(0.1)
    assert cluster.engine.run_until(lambda: is_safe(cluster, "n2"), limit_s=20)
    cluster.restart_daemon("n2", 0.5)
    cluster.engine.run_for(3)
    assert cluster.engine.run_until(lambda: is_safe(cluster, "n2"), limit_s=20), "its next daemon drains, too"


def test_undo_brings_the_node_back_into_the_plans() -> None:
    cluster = drained(4, "n2")

    def members() -> set[str]:
        return {m.node for s in cluster.core().runs[RUN].protection.sets.values() for p in s.plans for m in p.members}

    assert cluster.engine.run_until(lambda: members() == {"n1", "n3", "n4"}, limit_s=20)
    cluster.drain("n2", undo=True)
    assert cluster.engine.run_until(lambda: members() == {"n1", "n2", "n3", "n4"}, limit_s=20)
    assert cluster.core().drains == {}
    assert not cluster.nodes["n2"].is_draining


def test_without_room_elsewhere_the_node_is_not_safe_and_snapshots_are_protected_all_the_same() -> None:
    cluster = training(4)
    for name in ("n1", "n3", "n4"):
        cluster.nodes[name].is_full = True
    cluster.drain("n2")
    step = cluster.checker.protected_step(RUN)
    assert cluster.engine.run_until(lambda: cluster.checker.protected_step(RUN) > step + 5, limit_s=40)
    verdict = cluster.core().drains["n2"]
    assert verdict.state is DrainState.DRAINING
    assert says("no_room_to_drain", verdict.reason, ranks="rank 1")
    for name in ("n1", "n3", "n4"):
        cluster.nodes[name].is_full = False
    cluster.core().runs[RUN]
    assert cluster.engine.run_until(lambda: is_safe(cluster, "n2"), limit_s=40)


@pytest.mark.parametrize(("count", "names"), [(4, ("n2",)), (5, ("n2", "n5"))])
@pytest.mark.parametrize("is_new_coordinator", [False, True])
def test_nodes_called_safe_may_be_stopped_for_a_while_though_the_next_snapshot_finds_no_room(
    count: int, names: tuple[str, ...], is_new_coordinator: bool
) -> None:
    cluster = drained(count, *names, parity=1)
    told_s, step = cluster.engine.now_s, cluster.checker.protected_step(RUN)
    for node in cluster.nodes.values():
        node.is_full = True
    if is_new_coordinator:
        cluster.crash_coordinator(0.1)
    is_taken_back = False
    while cluster.engine.now_s < told_s + 9 * cluster.lease_s:
        cluster.engine.run_for(0.05)
        is_taken_back = is_taken_back or not is_safe(cluster, names[0])
        assert spares_without(cluster, *names) >= 1, "who was told that they are safe may have stopped them"
    assert is_taken_back, "the next snapshot found no room"
    assert cluster.checker.protected_step(RUN) > step + 3, "meanwhile newer ones are protected as before"
    cluster.engine.run_for(3 * cluster.lease_s)
    assert spares_without(cluster, *names) < 1, "in the end the older one goes"


def test_a_node_that_no_other_can_relieve_is_never_called_safe() -> None:
    cluster = training(2)
    cluster.drain("n1")
    cluster.drain("n2")
    cluster.engine.run_for(10)
    assert not is_safe(cluster, "n1")
    assert says("nobody_to_drain_to", cluster.core().drains["n1"].reason)
    step = cluster.checker.protected_step(RUN)
    assert cluster.engine.run_until(lambda: cluster.checker.protected_step(RUN) > step + 3, limit_s=20)


def test_two_nodes_that_drain_may_be_stopped_together() -> None:
    cluster = drained(6, "n2", "n5", parity=2)
    assert spares_without(cluster, "n2", "n5") >= 2


def test_a_stopped_node_that_was_drained_leaves_the_job_protected_at_once() -> None:
    cluster = drained(5, "n3")
    cluster.engine.run_for(6)
    assert cluster.stop_drained("n3", replace_after_s=None)
    assert spares_without(cluster) >= 1
    assert cluster.engine.run_until(lambda: cluster.is_training(cluster.jobs[0]), limit_s=30)
    assert cluster.jobs[0].decided.message.startswith("step")


def test_orders_for_nodes_that_are_unknown_or_lost_are_refused_by_name() -> None:
    cluster = training(4)
    with refuses(UsageError, "unknown_node", "n9", "n1, n2, n3 and n4"):
        cluster.core().drain("n9", undo=False)
    cluster.destroy("n4", replace_after_s=None)
    cluster.engine.run_for(3)
    with refuses(UsageError, "node_lost", "n4"):
        cluster.core().drain("n4", undo=False)


def test_what_a_waiting_rank_has_verified_stays_though_the_plans_do_not_use_it() -> None:
    """Found by seed 21065: a recovery was abandoned and taken up again; the drained host had dropped its shard meanwhile."""
    Scenario(21065, is_harsh=True).run()


def test_an_order_is_taken_back_though_the_node_has_obeyed_and_not_said_so_yet() -> None:
    cluster = training(4)
    cluster.drain("n2")
    assert says("order_not_answered", cluster.core().drains["n2"].reason)
    assert cluster.engine.run_until(lambda: cluster.nodes["n2"].is_draining, limit_s=5)
    assert not cluster.core().nodes.nodes["n2"].report.is_draining
    cluster.drain("n2", undo=True)
    cluster.engine.run_for(5)
    assert not cluster.nodes["n2"].is_draining
    assert cluster.core().drains == {}


def test_a_node_is_not_safe_that_holds_what_absent_nodes_could_make_whole() -> None:
    cluster = training(5, parity=1)
    cluster.cut("n4", 6.0)
    cluster.cut("n5", 6.0)
    cluster.engine.run_for(3)
    cluster.drain("n1")
    cluster.engine.run_for(1)
    assert says("parts_not_reported", cluster.core().drains["n1"].reason)
    assert cluster.engine.run_until(lambda: is_safe(cluster, "n1"), limit_s=40)
    assert spares_without(cluster, "n1") >= 1


def test_a_node_is_not_called_safe_between_copies_that_find_room_now_and_then() -> None:
    cluster = training(4)
    cluster.drain("n2")
    others = [cluster.nodes[name] for name in ("n1", "n3", "n4")]
    for node in others:
        node.is_full = True
    assert cluster.engine.run_until(lambda: says("no_room_to_drain", cluster.core().drains["n2"].reason), limit_s=20)
    for node in others:
        node.is_full = False
        node.work[RUN].failed_copies.clear()
        node.changed()
    assert cluster.engine.run_until(lambda: says("no_room_before", cluster.core().drains["n2"].reason), limit_s=20)
    assert cluster.engine.run_until(lambda: is_safe(cluster, "n2"), limit_s=30)


def test_what_a_leaving_node_found_corrupt_elsewhere_is_not_counted_as_left() -> None:
    cluster = drained(4, "n2")
    context = cluster.core().runs[RUN].context
    assert context is not None
    nodes = context.nodes
    shard = next(shard for shard in nodes["n1"].runs[RUN].shards if shard.rank == 0)
    mark = Quarantined(
        what="shard rank 0", attempt=shard.attempt, step=shard.step, reason="chunk 0", node="n1", rank=shard.rank
    )
    told = NodeState(replace(nodes["n2"].report, runs=(replace(nodes["n2"].runs[RUN], quarantined=(mark,)),)), 0.0)
    staying = [nodes[name] for name in ("n1", "n3", "n4")]
    place = (shard.key, shard.rank, shard.digest)
    assert "n1" in take_inventory(RUN, staying).shards[place]
    assert "n1" not in take_inventory(RUN, staying, readers=[*staying, told]).shards[place]
