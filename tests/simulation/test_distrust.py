"""What leads to NaN is not restored again, whoever dies meanwhile; a loop of identical restores ends. All simulated."""

from __future__ import annotations

import pytest

from backstay.ids import SnapshotKey
from backstayd.core.policy import CorePolicy
from tests.kit.wording import says
from tests.simulation.cluster import Cluster, Job
from tests.simulation.engine import Engine
from tests.simulation.scenario import Scenario
from tests.simulation.storage import URL
from tests.simulation.test_traps import RUN, training


def restarted(cluster: Cluster, engine: Engine, job: Job) -> SnapshotKey:
    """Kill a rank, wait for the next world to train; what it restored."""
    cluster.restart(job)
    return restored(job)


def restored(job: Job) -> SnapshotKey:
    return SnapshotKey(job.base.attempt, job.base.step)


def nodes_that_know(cluster: Cluster) -> int:
    return sum(1 for node in cluster.nodes.values() if RUN in node.memory and node.memory[RUN].distrusted)


def spread(cluster: Cluster, engine: Engine, job: Job) -> None:
    assert cluster.distrust(job)
    assert engine.run_until(lambda: nodes_that_know(cluster) == len(cluster.nodes), limit_s=10), "every host is told"


@pytest.mark.parametrize("seed", range(6))
def test_the_next_restart_takes_the_next_older_snapshot_whoever_dies_meanwhile(seed: int) -> None:
    engine, cluster, job = training(4, seed=seed, policy=CorePolicy(lease_s=1.5, keep=2))
    assert engine.run_until(lambda: job.step > 4, limit_s=20)
    base = restarted(cluster, engine, job)
    assert len({key for key in cluster.kept_keys(RUN) if key <= base}) >= 2
    spread(cluster, engine, job)
    if seed % 3 == 2:
        cluster.destroy("n4", replace_after_s=0.5)  # and so the world restarts
        cluster.wait_restarted(job, job.world_id)
        assert restored(job) < base
        return
    if seed % 3 == 1:
        cluster.crash_coordinator(0.5)
    engine.run_for(5)
    assert restarted(cluster, engine, job) < base


def test_with_nothing_older_the_run_is_refused_until_an_operator_trusts_it() -> None:
    engine, cluster, job = training(4)
    base = restarted(cluster, engine, job)
    spread(cluster, engine, job)
    cluster.kill_trainer(job.trainers[0])
    assert engine.run_until(lambda: bool(job.refusals), limit_s=20)
    assert says("distrusted", job.refusals[0], reason="nan")
    assert says("keep_an_older_one", job.refusals[0], run=RUN)
    cluster.trust()
    cluster.wait_training(job, limit_s=30)
    assert engine.run_until(lambda: nodes_that_know(cluster) == 0, limit_s=10)
    assert job.base.step >= base.step


def test_what_is_on_probation_is_not_released_and_its_slot_is_given_back_afterwards() -> None:
    engine, cluster, job = training(4, policy=CorePolicy(lease_s=1.5, probation_steps=6))
    base = restarted(cluster, engine, job)
    assert engine.run_until(lambda: cluster.checker.protected_step(RUN) > base.step + 2, limit_s=20)
    assert job.step <= base.step + 6
    assert base in cluster.kept_keys(RUN), "newer ones are as well protected, and yet it stays"
    interval = cluster.core().runs[RUN].interval.schedule.interval_steps
    assert engine.run_until(lambda: base not in cluster.kept_keys(RUN), limit_s=30)
    assert interval == cluster.core().runs[RUN].interval.schedule.interval_steps == 1
    assert engine.run_until(lambda: len(cluster.kept_keys(RUN)) <= 2, limit_s=10)


def test_identical_restores_are_counted_across_coordinators_and_end_with_a_refusal() -> None:
    engine, cluster, job = training(3, policy=CorePolicy(lease_s=1.5, restore_loop_limit=4))
    job.step_s = 1000.0  # it dies before anything new is captured
    base = restarted(cluster, engine, job)
    for _ in range(2):
        cluster.crash_coordinator(0.1)
        assert restarted(cluster, engine, job) == base
    assert restarted(cluster, engine, job) == base
    cluster.kill_trainer(job.trainers[0])
    assert engine.run_until(lambda: bool(job.refusals), limit_s=20)
    assert says("restore_loop", job.refusals[0], step=base.step, tries=4)
    cluster.trust()
    cluster.wait_training(job, limit_s=30)
    assert job.decided.tries == 0


def test_progress_begins_the_count_anew() -> None:
    engine, cluster, job = training(3, policy=CorePolicy(lease_s=1.5, restore_loop_limit=3))
    for _ in range(5):
        base = restarted(cluster, engine, job)
        assert engine.run_until(lambda base=base: cluster.checker.protected_step(RUN) > base.step, limit_s=30)
    assert job.refusals == []


def marked(engine: Engine, cluster: Cluster, job: Job) -> None:
    """Distrust what the world restored, until every node and durable storage know it."""
    restarted(cluster, engine, job)
    spread(cluster, engine, job)
    assert engine.run_until(lambda: bool(cluster.storage.marks.get(RUN)), limit_s=10)


def cut_off(engine: Engine, cluster: Cluster) -> None:
    """Durable storage stops answering once the coordinator knows of the mark there."""
    engine.run_for(1.0)
    cluster.disturb_storage(1000.0)


def trusted(engine: Engine, cluster: Cluster) -> None:
    """The operator trusts the run again, and every node hears it, and the coordinator that they did."""
    cluster.trust()
    engine.run_for(1.0)
    assert nodes_that_know(cluster) == 0


def assert_stays_trusted(engine: Engine, cluster: Cluster, job: Job) -> None:
    """Durable storage answers again: its mark goes, and what trains is protected."""
    cluster.wait_training(job, limit_s=60)
    cluster.disturb_storage(0.0)
    assert engine.run_until(lambda: not cluster.storage.marks[RUN], limit_s=30), "the mark is struck out"
    engine.run_for(5.0)
    assert nodes_that_know(cluster) == 0
    assert cluster.is_protected(RUN)


STORED = CorePolicy(lease_s=1.5, persist_url=URL, persist_every_steps=1, persist_keep_last=2)


def test_what_is_trusted_again_stays_so_when_a_world_decides_before_storage_has_struck_its_mark_out() -> None:
    engine, cluster, job = training(4, policy=STORED)
    marked(engine, cluster, job)
    cut_off(engine, cluster)
    cluster.trust()
    assert engine.run_until(lambda: nodes_that_know(cluster) == 0, limit_s=10)
    restarted(cluster, engine, job)
    assert_stays_trusted(engine, cluster, job)


def test_what_is_trusted_again_stays_so_when_its_mark_is_only_found_later() -> None:
    engine, cluster, job = training(4, policy=STORED)
    marked(engine, cluster, job)
    cut_off(engine, cluster)
    cluster.crash_coordinator(0.1)
    engine.run_for(5.0)
    assert not cluster.core().runs[RUN].persisting.surveying.marks, "this coordinator has not listed storage yet"
    trusted(engine, cluster)
    assert_stays_trusted(engine, cluster, job)


def test_what_is_trusted_again_stays_so_although_its_mark_was_on_its_way_to_storage() -> None:
    engine, cluster, job = training(4, policy=STORED)
    marked(engine, cluster, job)
    assert not cluster.core().runs[RUN].persisting.surveying.marks, "the coordinator has not heard of it yet"
    trusted(engine, cluster)
    restarted(cluster, engine, job)
    assert_stays_trusted(engine, cluster, job)


def test_what_is_distrusted_anew_counts_although_its_former_mark_waits_to_be_struck_out() -> None:
    engine, cluster, job = training(4, policy=STORED)
    marked(engine, cluster, job)
    cut_off(engine, cluster)
    trusted(engine, cluster)
    spread(cluster, engine, job)
    cluster.disturb_storage(0.0)
    engine.run_for(5.0)
    assert nodes_that_know(cluster) == len(cluster.nodes)
    assert cluster.storage.marks[RUN], "and the mark stays"


@pytest.mark.parametrize(("seed", "has_mishaps"), [(9200164, False), (9400128, True)])
def test_a_run_that_an_operator_trusts_again_becomes_protected(seed: int, has_mishaps: bool) -> None:
    """Two seeds in which a decision made the coordinator count a mark again that storage had not yet struck out."""
    Scenario(seed, is_harsh=seed % 3 == 2, has_storage=True, has_mishaps=has_mishaps).run()
