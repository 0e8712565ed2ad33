"""The ledger against what truly happened: interruptions, steps lost, time lost, through restarts of the coordinator."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from backstayd.core.policy import CorePolicy
from backstayd.core.status.document import status_document
from tests.simulation.cluster import Cluster, Job, Life
from tests.simulation.scenario import Scenario
from tests.simulation.test_traps import RUN, training

SLACK_S = 1.0  # of simulated time: what messages, heartbeats and a step take


def ledger_of(cluster: Cluster, run: str = RUN) -> dict[str, Any]:
    document = status_document(cluster.core(), cluster.engine.now_s)
    found = next(entry["ledger"] for entry in document["runs"] if entry["run"] == run)
    assert found is not None
    return found  # type: ignore[no-any-return]


def compare(entry: dict[str, Any], before: Life, after: Life, lease_s: float) -> None:
    """One interruption as it is written and as it was."""
    assert entry["attempt"] == before.decision.attempt
    assert entry["new_attempt"] == after.decision.attempt
    assert entry["outcome"] == after.decision.outcome.value
    base = after.decision.base.step if after.decision.base is not None else 0
    assert entry["base_step"] == base
    assert base <= entry["newest_step"] <= before.step
    assert entry["steps_lost"] == entry["newest_step"] - base
    assert entry["noticed_unix_s"] <= before.died_s + lease_s + SLACK_S
    assert entry["down_s"] == pytest.approx(after.released_s - before.died_s, abs=lease_s + SLACK_S)


def test_trainers_and_nodes_that_die_are_written_down_with_what_they_cost() -> None:
    engine, cluster, job = training(6)
    engine.run_for(4)
    cluster.restart(job, 2)
    engine.run_for(4)
    world = job.world_id
    cluster.destroy("n4", replace_after_s=1.0)
    cluster.wait_restarted(job, world)
    engine.run_for(4)
    ledger = ledger_of(cluster)
    assert [entry["cause"] for entry in ledger["interruptions"]] == ["trainer_died", "node_lost"]
    assert [entry["source"] for entry in ledger["interruptions"]] == ["memory", "rebuild"]
    for entry, (before, after) in zip(ledger["interruptions"], pairwise(job.lives), strict=True):
        compare(entry, before, after, cluster.lease_s)
        assert before.step - entry["newest_step"] <= 1, "the step under way is known to nobody else"
        assert entry["step_s"] == pytest.approx(job.step_s * 1.05, rel=0.25)
        assert entry["first_step"] > entry["base_step"]
    died = sum(after.released_s - before.died_s for before, after in pairwise(job.lives))
    elapsed = engine.now_s - job.lives[0].released_s
    lost = died + sum(entry["recompute_s"] for entry in ledger["interruptions"])
    assert ledger["is_whole"]
    assert ledger["goodput"] == pytest.approx(1 - lost / elapsed, abs=2 * cluster.lease_s / elapsed)


def test_a_new_coordinator_knows_what_the_one_before_wrote() -> None:
    engine, cluster, job = training(6)
    engine.run_for(3)
    cluster.restart(job)
    engine.run_for(2)
    before = ledger_of(cluster)
    cluster.crash_coordinator(0.5)
    engine.run_for(5)
    after = ledger_of(cluster)
    assert after["began_unix_s"] == before["began_unix_s"]
    assert after["steps_lost"] == before["steps_lost"]
    assert after["down_s"] == pytest.approx(before["down_s"], abs=0.2), "the release was read off the hosts' records"
    world = job.world_id
    cluster.destroy("n2", replace_after_s=0.5)
    cluster.wait_restarted(job, world)
    entries = ledger_of(cluster)["interruptions"]
    assert [entry["cause"] for entry in entries] == ["trainer_died", "node_lost"]
    for entry, (life, next_life) in zip(entries, pairwise(job.lives), strict=True):
        compare(entry, life, next_life, cluster.lease_s)


def test_a_daemon_that_restarts_interrupts_nothing() -> None:
    engine, cluster, job = training(4)
    cluster.restart_daemon("n3", 0.4)
    engine.run_for(8)
    assert cluster.is_training(job)
    assert ledger_of(cluster)["interruptions"] == []


def test_a_cluster_that_is_lost_whole_is_written_down_by_a_coordinator_that_lives() -> None:
    engine, cluster, job = training(3, policy=CorePolicy(lease_s=1.5))
    engine.run_for(3)
    job.allow_fresh = True
    newest, world = job.step, job.world_id
    for name in list(cluster.nodes):
        cluster.destroy(name, replace_after_s=0.2, new_name=f"{name}x")
    cluster.wait_restarted(job, world)
    (entry,) = ledger_of(cluster)["interruptions"]
    assert (entry["cause"], entry["outcome"], entry["source"]) == ("all_nodes_lost", "NONE", "none")
    assert newest - 1 <= entry["steps_lost"] <= newest


@pytest.mark.parametrize("part", range(4))
def test_random_faults_are_written_down_as_they_were(part: int) -> None:
    compared = 0
    for seed in range(1000 + 6 * part, 1006 + 6 * part):
        cluster = Scenario(seed).run()
        for job in cluster.jobs:
            compared += check_chain(cluster, job, seed)
    assert compared > 0


def check_chain(cluster: Cluster, job: Job, seed: int) -> int:
    """Each entry tells of a life that was, and none of those in the newest history is missing."""
    ledger = ledger_of(cluster, job.run)
    assert 0 <= ledger["goodput"] <= 1, f"seed {seed}"
    truth = {life.decision.attempt: life for life in job.lives}
    written = {entry["new_attempt"] for entry in ledger["interruptions"]}
    assert not ledger["is_whole"] or set(truth) - {job.lives[0].decision.attempt} <= written, f"seed {seed}"
    entries = {entry["new_attempt"]: entry for entry in ledger["interruptions"] if entry["new_attempt"]}
    current = job.lives[-1].decision.attempt
    assert not ledger["is_interrupted"], f"seed {seed}"
    assert ledger["attempt"] == current, f"seed {seed}"
    assert max(entries, default=current) == current, f"seed {seed}: {entries.keys()} {truth.keys()}"
    for entry in entries.values():
        life, ended = truth.get(entry["new_attempt"]), truth.get(entry["attempt"])
        if life is None or ended is None:
            continue  # a world that was released to some ranks only and died at once
        base = life.decision.base.step if life.decision.base is not None else 0
        assert entry["base_step"] == base, f"seed {seed}"
        assert entry["newest_step"] <= ended.step, f"seed {seed}"
        assert entry["steps_lost"] <= max(0, ended.step - base), f"seed {seed}"
        assert 0 <= entry["down_s"] <= life.released_s - ended.died_s + 2 * cluster.lease_s + SLACK_S, f"seed {seed}"
    steps = [entry["newest_step"] for entry in entries.values()]
    assert ledger["steps_lost"] <= sum(steps), f"seed {seed}"
    return len(entries)


def test_a_world_that_ends_because_of_nan_is_told_from_one_that_died() -> None:
    engine, cluster, job = training(4, policy=CorePolicy(lease_s=1.5, keep=2))
    engine.run_for(3)
    cluster.restart(job, 1)
    engine.run_for(2)
    assert cluster.distrust(job)
    engine.run_for(4)
    cluster.kill_trainer(job.trainers[1])
    assert engine.run_until(lambda: ledger_of(cluster)["is_interrupted"], limit_s=10)
    assert [entry["cause"] for entry in ledger_of(cluster)["interruptions"]] == ["trainer_died", "distrusted"]


def test_training_beside_a_dead_daemon_is_behind_and_not_interrupted() -> None:
    engine, cluster, job = training(4)
    run = cluster.core().runs[RUN]
    cluster.restart_daemon("n3", 30.0)
    protected = job.step
    assert engine.run_until(lambda: run.lag.behind is not None, limit_s=4 * cluster.lease_s)
    engine.run_for(15)
    document = status_document(cluster.core(), engine.now_s)["runs"][0]
    assert job.step > protected + 20, "training must go on for this to mean anything"
    assert document["verdict"]["word"] == "behind"
    assert document["behind"]["steps"] >= job.step - protected - 2
    assert document["behind"]["seconds"] > 10
    assert not document["ledger"]["is_interrupted"]
    assert (document["ledger"]["interruptions"], document["ledger"]["down_s"]) == ([], 0)
    assert document["ledger"]["silent_since_unix_s"] > 0
    assert engine.run_until(lambda: run.lag.behind is None, limit_s=40), "it is protected again once the daemon is back"
    after = status_document(cluster.core(), engine.now_s)["runs"][0]
    assert after["verdict"]["word"] == "protected"
    assert after["protected_step"] >= job.step - 3
    assert (after["ledger"]["interruptions"], after["ledger"]["down_s"]) == ([], 0)


def test_a_node_that_takes_its_trainer_along_is_one_interruption_from_its_last_report_on() -> None:
    engine, cluster, job = training(4)
    engine.run_for(3)
    world = job.world_id
    cluster.destroy("n2", replace_after_s=4.0)
    cluster.wait_restarted(job, world)
    (entry,) = ledger_of(cluster)["interruptions"]
    compare(entry, job.lives[0], job.lives[1], cluster.lease_s)
    assert entry["cause"] == "node_lost"
    assert cluster.core().runs[RUN].lag.behind is None
