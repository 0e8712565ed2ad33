"""Nodes that know a run are out of reach while its world comes up elsewhere, and come back, on the simulated cluster."""

from __future__ import annotations

import pytest

from backstayd.core.messages.decisions import Outcome
from backstayd.core.orders import RECORDERS
from backstayd.core.policy import CorePolicy
from backstayd.core.recover.numbering import LEAP_ATTEMPTS
from tests.kit.wording import says
from tests.simulation.cluster import Cluster, Job
from tests.simulation.engine import Engine
from tests.simulation.test_forgetting import finished

RUN = "default/gpt"
OLD, NEW = ("n1", "n2", "n3", "n4"), ("n5", "n6", "n7", "n8")


def cut_off(engine: Engine, cluster: Cluster, names: tuple[str, ...], for_s: float) -> None:
    """The coordinator restarts while these nodes are out of reach, and all others are not."""
    for name in cluster.nodes:
        cluster.nodes[name].is_cut = False
    for name in names:
        cluster.cut(name, for_s)
    cluster.crash_coordinator(0.1)
    engine.run_for(0.2)


def trained(seed: int, *, stale_from: int) -> tuple[Engine, Cluster, Job]:
    """Eight nodes, of which four train and were restarted a few times; the others hear nothing from some restart on."""
    engine = Engine(seed)
    cluster = Cluster(engine, node_count=8, policy=CorePolicy(lease_s=1.5))
    job = Job(RUN, dict(enumerate(OLD)))
    cluster.start_job(job)
    for attempt in range(3):
        for name in NEW if attempt == stale_from else ():
            cluster.nodes[name].is_cut = True
        cluster.wait_training(job, is_protected=True)
        cluster.restart(job)
    engine.run_for(3)
    return engine, cluster, job


def moved(engine: Engine, cluster: Cluster, job: Job, *, allow_fresh: bool) -> Job:
    """The supervisor takes the old nodes for dead and starts the job on the others; the old trainers go on."""
    job.is_stopped = True
    later = Job(RUN, dict(enumerate(NEW)), allow_fresh=allow_fresh)
    cluster.start_job(later)
    return later


@pytest.mark.parametrize("seed", range(2))
def test_nodes_that_come_back_with_a_higher_generation_do_not_end_the_world_that_trains(seed: int) -> None:
    engine, cluster, job = trained(seed, stale_from=0)
    cut_off(engine, cluster, OLD, 15.0)
    later = moved(engine, cluster, job, allow_fresh=True)
    cluster.wait_training(later, limit_s=12, is_protected=True)
    assert cluster.outcome(later) is Outcome.NONE
    world, step = later.world_id, later.step
    old, new = cluster.nodes["n1"].generation, cluster.nodes["n5"].generation
    assert old.incarnation != new.incarnation
    engine.run_for(15)  # the old nodes are back
    assert not cluster.nodes["n1"].is_cut
    assert (later.world_id, cluster.is_training(later)) == (world, True)
    assert engine.run_until(
        lambda: cluster.is_protected(RUN) and cluster.checker.protected_step(RUN) > step + 5, limit_s=20
    )


@pytest.mark.parametrize("seed", range(2))
def test_a_coordinator_that_starts_after_their_return_follows_the_world_that_trains(seed: int) -> None:
    engine, cluster, job = trained(seed, stale_from=0)
    cut_off(engine, cluster, OLD, 15.0)
    later = moved(engine, cluster, job, allow_fresh=True)
    cluster.wait_training(later, limit_s=12, is_protected=True)
    engine.run_for(15)
    world = later.world_id
    cluster.crash_coordinator(0.1)
    engine.run_for(6)
    assert (later.world_id, cluster.is_training(later)) == (world, True)
    cluster.restart(later)
    assert {source.digest.split("/")[1] for source in later.decided.sources} == {world}


@pytest.mark.parametrize("stale_from", [1, 99])
def test_a_world_that_comes_up_where_nobody_knows_the_run_does_not_start_from_scratch(stale_from: int) -> None:
    engine, cluster, job = trained(1, stale_from=stale_from)
    step = cluster.checker.protected_step(RUN)
    cut_off(engine, cluster, OLD, 15.0)
    later = moved(engine, cluster, job, allow_fresh=False)
    assert engine.run_until(lambda: later.refusals != [], limit_s=12)
    assert says("last_ran_on", later.refusals, nodes="n1, n2, n3 and n4")
    cluster.wait_training(later, limit_s=30)
    assert later.decided.outcome is Outcome.EXACT
    assert later.base.step >= step


def test_who_starts_over_while_the_old_nodes_are_away_writes_above_what_they_may_have_begun() -> None:
    engine, cluster, job = trained(1, stale_from=1)
    cut_off(engine, cluster, OLD, 15.0)
    later = moved(engine, cluster, job, allow_fresh=True)
    cluster.wait_training(later, limit_s=12)
    assert (later.decided.outcome, later.decided.attempt > LEAP_ATTEMPTS) == (Outcome.NONE, True)
    assert all(later.decided.generation.number > cluster.nodes[name].generation.number for name in OLD)


def test_recorders_of_a_run_are_few_and_others_take_their_place() -> None:
    engine = Engine(1)
    cluster = Cluster(engine, node_count=14, policy=CorePolicy(lease_s=1.5))
    job = Job(RUN, {0: "n1", 1: "n2"})
    cluster.start_job(job)
    cluster.wait_training(job)

    def recorders() -> set[str]:
        held = {name for name, node in cluster.nodes.items() if RUN in node.memory and node.memory[RUN].decision}
        return held - {"n1", "n2"}

    assert engine.run_until(lambda: len(recorders()) == RECORDERS, limit_s=2)
    engine.run_for(2)
    assert len(recorders()) == RECORDERS
    first = sorted(recorders())[0]
    cluster.destroy(first, replace_after_s=None)
    assert engine.run_until(lambda: len(recorders()) == RECORDERS, limit_s=10)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("is_alive", [True, False])
def test_an_old_decision_that_was_only_taken_over_does_not_end_a_later_history_that_comes_back(
    seed: int, *, is_alive: bool
) -> None:
    engine = Engine(seed)
    cluster = Cluster(engine, node_count=8, policy=CorePolicy(lease_s=1.5))
    job = Job(RUN, dict(enumerate(OLD)))
    cluster.start_job(job)
    cluster.wait_training(job, is_protected=True)
    for name in OLD:  # they never hear of what follows
        cluster.nodes[name].is_cut = True
        cluster.nodes[name].steady_since_s = engine.now_s + 30
    cluster.stop_job(job)
    engine.run_for(4)
    later = Job(RUN, dict(enumerate(NEW)), allow_fresh=True)
    cluster.start_job(later)
    cluster.wait_training(later, is_protected=True)
    world = later.world_id
    for name in OLD:
        cluster.nodes[name].is_cut = False
    for name in NEW:
        cluster.cut(name, 6.0)
    cluster.crash_coordinator(0.1)
    engine.run_for(5)  # the next one knows nothing but the old decision, and follows it
    taken_over = cluster.core().runs[RUN].recovery.released
    assert taken_over is not None
    assert taken_over.attempt < later.trainers[0].attempt
    if not is_alive:
        cluster.stop_job(later)
    engine.run_for(6)  # the checker holds that what was protected is there
    if is_alive:
        assert (later.world_id, cluster.is_training(later)) == (world, True)
    else:
        later.is_stopped = False
        cluster.start_job(later)
        cluster.wait_training(later)
        assert later.decided.sources[0].digest.split("/")[1] == world


@pytest.mark.parametrize("has_new_coordinator", [False, True])
def test_a_tombstone_that_comes_back_does_not_count_against_a_run_that_was_begun_without_knowing_of_it(
    *, has_new_coordinator: bool
) -> None:
    engine = Engine(2)
    cluster = Cluster(engine, node_count=8, policy=CorePolicy(lease_s=1.5))
    for name in NEW:
        cluster.nodes[name].is_cut = True
    job = Job(RUN, dict(enumerate(OLD)))
    cluster.start_job(job)
    for _ in range(3):
        cluster.wait_training(job, is_protected=True)
        cluster.kill_trainer(job.trainers[0])
    cluster.wait_training(job, is_protected=True)
    finished(engine, cluster, job)
    engine.run_for(2)
    cut_off(engine, cluster, OLD, 1000.0)
    later = Job(RUN, dict(enumerate(NEW)))
    cluster.start_job(later)
    cluster.wait_training(later, limit_s=12, is_protected=True)
    tombstone, decision = cluster.nodes["n1"].tombstones[RUN], later.decision
    assert decision is not None
    assert (decision.attempt < tombstone.attempt, decision.generation.number < tombstone.generation) == (True, True)
    cluster.restart_s = (4.0, 5.0)
    cluster.kill_world(later)  # nobody is there who could show that it lives
    if has_new_coordinator:
        cluster.crash_coordinator(0.5)
    engine.run_for(0.3)
    for name in OLD:
        cluster.nodes[name].is_cut = False
    engine.run_for(3)  # the checker holds that what was protected is there
    cluster.wait_training(later, is_protected=True)
    assert cluster.outcome(later) is Outcome.EXACT
    assert engine.run_until(lambda: not any(node.tombstones for node in cluster.nodes.values()), limit_s=10)
