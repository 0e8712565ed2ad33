"""The simulated cluster without surprises: a run begins, is protected, loses a node, goes on."""

from __future__ import annotations

import dataclasses

from backstayd.core.messages.decisions import Outcome
from backstayd.core.status.document import status_document
from tests.kit.wording import says
from tests.simulation.cluster import Cluster, Job
from tests.simulation.engine import Engine


def began(node_count: int, ranks: int | None = None) -> tuple[Engine, Cluster, Job]:
    engine = Engine(1)
    cluster = Cluster(engine, node_count=node_count)
    job = Job("default/gpt", {rank: f"n{rank % node_count + 1}" for rank in range(ranks or node_count)})
    cluster.start_job(job)
    cluster.wait_training(job), status_document(cluster.core(), engine.now_s)
    return engine, cluster, job


def test_a_new_run_starts_from_scratch_and_becomes_protected() -> None:
    engine, cluster, job = began(6)
    assert cluster.outcome(job) is Outcome.NONE
    assert engine.run_until(lambda: cluster.redundancy(job.run) == "PROTECTED(2)", limit_s=20)
    engine.run_for(10)
    assert cluster.redundancy(job.run) == "PROTECTED(2)"
    assert len(cluster.kept_keys(job.run)) <= 2


def test_two_destroyed_nodes_of_six_are_rebuilt_and_the_run_goes_on() -> None:
    engine, cluster, job = began(6)
    assert engine.run_until(lambda: cluster.redundancy(job.run) == "PROTECTED(2)", limit_s=20)
    cluster.restart_s = (3.0, 4.0)
    cluster.destroy("n2", replace_after_s=2.0)
    cluster.destroy("n5", replace_after_s=2.0)
    world = job.world_id
    assert engine.run_until(lambda: job.world_id != world and cluster.is_training(job), limit_s=30)
    assert cluster.outcome(job) is Outcome.EXACT
    assert engine.run_until(lambda: cluster.redundancy(job.run) == "PROTECTED(2)", limit_s=30)


def test_three_destroyed_nodes_of_six_are_refused_with_an_exact_message() -> None:
    engine, cluster, job = began(6)
    assert engine.run_until(lambda: cluster.redundancy(job.run) == "PROTECTED(2)", limit_s=20)
    for name in ("n3", "n4", "n5"):
        cluster.destroy(name, replace_after_s=None)
    assert engine.run_until(lambda: bool(job.refusals), limit_s=30)
    job.is_stopped = True
    assert says("cannot_restore", job.refusals, run="default/gpt"), job.refusals
    assert says(
        "ranks_lost", job.refusals, ranks="ranks 2, 3 and 4 are", why="nodes n3, n4, n5 gone", losses=3, parity=2
    )
    assert says("nothing_older", job.refusals)


def test_keep_may_change_while_a_run_is_held() -> None:
    engine, cluster, job = began(3)
    assert engine.run_until(lambda: cluster.redundancy(job.run) == "PROTECTED(1)", limit_s=20)
    core = cluster.core()
    core.adopt(dataclasses.replace(core.policy, keep=3, probation_steps=9))
    assert engine.run_until(lambda: len(cluster.kept_keys(job.run)) >= 4, limit_s=30), "three protected, one being made"
    desired = next(run for run in core.desired("n1").runs if run.run == job.run)
    assert (desired.keep, desired.probation_steps) == (3, 9)
    core.adopt(dataclasses.replace(core.policy, keep=1))
    assert engine.run_until(lambda: len(cluster.kept_keys(job.run)) <= 2, limit_s=30)


def test_nobody_waits_for_a_slot_while_the_line_to_a_host_is_broken() -> None:
    engine, cluster, job = began(6)
    assert engine.run_until(lambda: cluster.redundancy(job.run) == "PROTECTED(2)", limit_s=20)
    core = cluster.core()

    def can_slots_come() -> bool:
        core.evaluate()
        return next(run for run in core.desired("n1").runs if run.run == job.run).is_release_possible

    assert can_slots_come()
    core.suspect("n3", "an incarnation before this one")
    assert can_slots_come(), "the line of a former incarnation says nothing"
    core.suspect("n3", cluster.nodes["n3"].incarnation)
    assert not can_slots_come()
    assert engine.run_until(can_slots_come, limit_s=5), "its next report takes the suspicion back"
