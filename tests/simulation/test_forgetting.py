"""Runs that are over, and runs that only seem to be: what is deleted, what is never, and what a restart is told."""

from __future__ import annotations

import pytest

from backstay.errors import UsageError
from backstayd.core.messages.decisions import Outcome
from backstayd.core.messages.report import SessionPhase
from backstayd.core.messages.tombstone import Cause, Tombstone
from backstayd.core.policy import CorePolicy
from backstayd.core.status.document import status_document
from tests.kit.wording import refuses, says
from tests.simulation.cluster import Cluster, Job
from tests.simulation.engine import Engine
from tests.simulation.node import Node
from tests.simulation.test_traps import RUN, cluster_of, training


def finish(engine: Engine, cluster: Cluster, job: Job, *, unheard: str = "") -> None:
    """Every rank calls finish(); node ``unheard`` is away from when the coordinator knows, before it is told."""
    job.is_stopped = True
    engine.run_for(0.5)  # what is captured is committed
    cluster.checker.forget(RUN)
    for trainer in job.trainers.values():
        trainer.phase = SessionPhase.ENDED
        cluster.nodes[trainer.node].changed()
    assert engine.run_until(lambda: RUN in cluster.core().tombstones.known, limit_s=20)
    if unheard:
        cluster.nodes[unheard].is_cut = True


def finished(engine: Engine, cluster: Cluster, job: Job) -> None:
    """Every rank called finish(), and nothing is left but on nodes that are away."""
    finish(engine, cluster, job)
    assert engine.run_until(lambda: not held(cluster, away=True), limit_s=20)


def held(cluster: Cluster, *, away: bool = False) -> set[str]:
    """Nodes that hold anything of the run; ``away``: of those that the coordinator hears."""
    return {
        name
        for name, node in cluster.nodes.items()
        if (memory := node.memory.get(RUN)) is not None
        and (memory.shards or memory.plans or memory.decision)
        and not (away and node.is_cut)
    }


def asks(engine: Engine, cluster: Cluster, job: Job) -> str:
    """The job starts; "" if it trains, else why it was refused."""
    cluster.start_job(job)
    assert engine.run_until(lambda: bool(job.refusals) or cluster.is_training(job), limit_s=30)
    job.is_stopped = bool(job.refusals)
    return job.refusals[0] if job.refusals else ""


def test_a_finished_run_is_forgotten_everywhere_and_its_name_can_be_used_again() -> None:
    engine, cluster, job = training(4)
    finished(engine, cluster, job)
    engine.run_for(2)
    later = Job.on(RUN, 4, allow_fresh=True)
    assert asks(engine, cluster, later) == ""
    assert cluster.outcome(later) is Outcome.NONE
    assert later.decided.attempt == 2, "above what is forgotten"


def test_a_restart_of_a_finished_run_is_told_so_and_starts_over_only_if_it_may() -> None:
    engine, cluster, job = training(4)
    engine.run_for(2)
    finished(engine, cluster, job)
    cluster.crash_coordinator(0.2)  # the next one knows it from the nodes
    engine.run_for(4)
    refusal = asks(engine, cluster, Job(RUN, {0: "n2"}))
    assert says("run_finished", refusal, run=RUN, step=job.step, day="1970-01-01"), refusal
    assert says("start_over", refusal)
    assert asks(engine, cluster, Job(RUN, {0: "n2"}, allow_fresh=True)) == ""


def test_a_run_that_nobody_comes_back_to_is_forgotten_and_not_before() -> None:
    engine, cluster, job = training(4, policy=CorePolicy(lease_s=1.5, job_ttl_s=20.0))
    engine.run_for(25)  # it trains for longer than that
    job.is_stopped = True
    for trainer in [job.trainers[rank] for rank in (0, 1, 2)]:
        cluster.kill_trainer(trainer)
    engine.run_for(25)
    assert cluster.core().runs[RUN].forgotten_in_s() is None, "one trainer is still connected"
    cluster.kill_trainer(job.trainers[3])
    engine.run_for(10)
    left_s = status_document(cluster.core(), engine.now_s)["runs"][0]["forgotten_in_s"]
    assert 8 < left_s < 11
    assert cluster.kept_keys(RUN)
    cluster.checker.forget(RUN)
    assert engine.run_until(lambda: not cluster.kept_keys(RUN), limit_s=15)
    engine.run_for(2)
    refusal = asks(engine, cluster, Job(RUN, {0: "n1"}))
    assert says("run_freed", refusal, run=RUN, idle="20 s")


def test_a_node_that_was_away_when_its_run_was_forgotten_forgets_it_when_it_comes_back() -> None:
    engine, cluster, job = training(4)
    finish(engine, cluster, job, unheard="n4")
    engine.run_for(3.0)
    assert held(cluster) == {"n4"}
    cluster.nodes["n4"].is_cut = False
    assert engine.run_until(lambda: not held(cluster), limit_s=20)


@pytest.mark.parametrize("how", ["finished", "forgotten"])
@pytest.mark.parametrize("has_new_coordinator", [False, True])
def test_what_a_node_brings_back_of_a_forgotten_run_is_never_restored_under_its_name(
    how: str, *, has_new_coordinator: bool
) -> None:
    engine, cluster, job = training(4)
    if how == "finished":
        finish(engine, cluster, job, unheard="n4")
    else:
        job.is_stopped = True
        cluster.nodes["n4"].is_cut = True
        cluster.checker.forget(RUN)
        cluster.kill_world(job)
        engine.run_for(3)
        cluster.core().forget(RUN)
    engine.run_for(2)
    assert held(cluster) == {"n4"}, "prove that it was away"
    if has_new_coordinator:
        cluster.crash_coordinator(0.2)
        engine.run_for(3)
    later = Job(RUN, {0: "n1", 1: "n2"}, allow_fresh=how == "finished")
    assert asks(engine, cluster, later) == ""
    assert cluster.outcome(later) is Outcome.NONE
    world = later.world_id
    cluster.nodes["n4"].is_cut = False  # while the new history trains
    engine.run_for(6)
    assert cluster.is_training(later)
    assert later.world_id == world
    assert all(key.attempt > 1 for key in cluster.kept_keys(RUN)), "what it brought went"
    cluster.restart(later)
    assert cluster.outcome(later) is Outcome.EXACT


def test_a_start_that_came_to_nothing_does_not_blot_out_what_was_finished_under_its_name() -> None:
    engine, cluster, job = training(4)
    finish(engine, cluster, job, unheard="n4")
    engine.run_for(3)
    later = Job(RUN, {0: "n1", 1: "n2"}, allow_fresh=True, step_s=1000.0)
    assert asks(engine, cluster, later) == ""
    finished(engine, cluster, later)
    engine.run_for(2)
    cluster.nodes["n4"].is_cut = False
    assert engine.run_until(lambda: not held(cluster), limit_s=10), "what it brought went"
    assert says("run_finished", asks(engine, cluster, Job(RUN, {0: "n4", 1: "n2"})))


def test_a_job_that_asks_while_a_node_brings_back_a_forgotten_run_is_not_given_it() -> None:
    engine, cluster, job = training(1)
    cluster.nodes["n2"] = type(cluster.nodes["n1"])(cluster, "n2")
    cluster.nodes["n2"].start()
    engine.run_for(1)
    finish(engine, cluster, job, unheard="n1")
    engine.run_for(4)
    assert held(cluster) == {"n1"}, "prove that a whole snapshot is still there"
    cluster.nodes["n1"].is_cut = False
    refusal = asks(engine, cluster, Job(RUN, {0: "n2"}))
    assert says("run_finished", refusal)
    assert engine.run_until(lambda: not held(cluster), limit_s=10)


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("seed", range(4))  # whoever is heard first
def test_a_tombstone_that_names_an_earlier_history_does_not_touch_the_one_that_lives(
    seed: int, *, is_training: bool
) -> None:
    engine, cluster = cluster_of(5, seed=seed)
    job = Job.on(RUN, 4)
    cluster.start_job(job)
    cluster.wait_training(job, is_protected=True)
    world, kept = job.world_id, cluster.kept_keys(RUN)
    stale = Tombstone(run=RUN, attempt=3, generation=0, cause=Cause.FORGOTTEN, step=900, world_id="another")
    cluster.nodes["n5"].tombstones[RUN] = stale
    cluster.crash_coordinator(0.2)
    if not is_training:  # nobody is there who could show that it lives
        cluster.restart_s = (4.0, 5.0)
        cluster.kill_world(job)
    engine.run_for(3)
    assert cluster.kept_keys(RUN)
    assert max(cluster.kept_keys(RUN)) >= max(kept)
    cluster.wait_training(job, is_protected=True)
    assert (job.world_id == world) == is_training, "a live world goes on"
    assert cluster.outcome(job) is (Outcome.NONE if is_training else Outcome.EXACT)
    assert engine.run_until(lambda: not cluster.nodes["n5"].tombstones, limit_s=10), "it was lifted"


def test_a_run_that_only_could_not_be_seen_lives_on_when_its_trainers_are_seen_again() -> None:
    engine, cluster, job = training(4, policy=CorePolicy(lease_s=1.5, job_ttl_s=8.0))
    job.is_stopped = True  # nobody restarts the world that lost a rank
    cluster.kill_trainer(job.trainers[3])
    for name in ("n1", "n2", "n3"):
        cluster.cut(name, 16.0)
    engine.run_for(13)
    assert held(cluster) == {"n1", "n2", "n3"}, "the time ran out where a part could be seen"
    assert not cluster.core().runs
    engine.run_for(8)
    assert {name for name in ("n1", "n2", "n3") if cluster.nodes[name].memory[RUN].shards} == {"n1", "n2", "n3"}
    assert not any(node.tombstones for node in cluster.nodes.values()), "it was lifted everywhere"
    cluster.kill_world(job)
    later = Job.on(RUN, 4)
    assert asks(engine, cluster, later) == ""
    assert cluster.outcome(later) is Outcome.EXACT


def test_a_run_name_that_never_held_a_snapshot_leaves_every_memory() -> None:
    engine, cluster = cluster_of(3)
    cluster.nodes["n3"].is_full = True
    job = Job(RUN, {0: "n1", 1: "n2"}, step_s=1000.0)
    cluster.start_job(job)
    cluster.wait_training(job)
    job.is_stopped = True
    cluster.checker.forget(RUN)
    cluster.kill_world(job)
    engine.run_for(10)
    assert held(cluster) == {"n1", "n2", "n3"}, "who comes back soon finds his name; n3 is a recorder"
    assert engine.run_until(lambda: not held(cluster), limit_s=120)
    engine.run_for(2)
    assert RUN not in cluster.core().runs
    assert not cluster.core().tombstones.known
    assert not any(node.tombstones for node in cluster.nodes.values())


def test_a_tombstone_is_not_older_than_what_it_names_by_the_clock_of_any_node() -> None:
    engine, cluster, job = training(4)
    for node in cluster.nodes.values():
        node.memory[RUN].recorded_s += 600.0  # clocks that are ahead
        node.changed()
    engine.run_for(0.5)
    finished(engine, cluster, job)
    assert cluster.core().tombstones.known[RUN].unix_s > engine.now_s + 500.0


def test_an_operator_frees_the_name_of_a_finished_run() -> None:
    engine, cluster, job = training(2)
    finished(engine, cluster, job)
    engine.run_for(2)
    cluster.core().forget(RUN)
    engine.run_for(2)
    later = Job(RUN, {0: "n1", 1: "n2"})
    assert asks(engine, cluster, later) == ""
    assert cluster.outcome(later) is Outcome.NONE
    with refuses(UsageError, "run_is_active"):
        cluster.core().forget(RUN)


@pytest.mark.parametrize("node_count", [4, 6])  # with and without nodes that keep its decision
def test_a_run_whose_nodes_are_all_gone_does_not_stay_for_ever(node_count: int) -> None:
    engine, cluster = cluster_of(node_count, policy=CorePolicy(lease_s=1.5, job_ttl_s=20.0))
    job = Job.on(RUN, 4)
    cluster.start_job(job)
    cluster.wait_training(job, is_protected=True)
    job.is_stopped = True
    cluster.checker.forget(RUN)
    for rank in range(4):
        cluster.destroy(f"n{rank + 1}", replace_after_s=None)
    cluster.nodes["n9"] = Node(cluster, "n9")
    cluster.nodes["n9"].start()
    engine.run_for(10)
    assert RUN in cluster.core().runs
    assert engine.run_until(lambda: RUN not in cluster.core().runs and not held(cluster), limit_s=30)
    refusal = asks(engine, cluster, Job(RUN, {0: "n9"}))
    assert says("run_freed", refusal)


def test_a_new_run_is_told_which_names_like_its_own_exist() -> None:
    engine, cluster, _ = training(2, run="default/llama-7b")
    engine.run_for(2)
    typo = Job("default/llama-7B", {0: "n1", 1: "n2"})
    assert asks(engine, cluster, typo) == ""
    assert says("similar_names", typo.decided.message, name="default/llama-7b")
    other = Job("default/vision", {0: "n1"})
    assert asks(engine, cluster, other) == ""
    assert not says("similar_names", other.decided.message)
