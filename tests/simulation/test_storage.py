"""A cluster that lost everything goes on from durable storage, whatever its old nodes bring back. All simulated."""

from __future__ import annotations

from dataclasses import replace

import pytest

from backstay.ids import SnapshotKey
from backstayd.core.policy import CorePolicy
from tests.simulation.cluster import Cluster, Job
from tests.simulation.engine import Engine
from tests.simulation.scenario import Scenario
from tests.simulation.storage import URL
from tests.simulation.test_traps import RUN, training

POLICY = CorePolicy(lease_s=1.5, persist_url=URL, persist_every_steps=1, persist_keep_last=2)


def stored_step(cluster: Cluster) -> int:
    return max((record.step for record in cluster.storage.records(RUN)), default=0)


def recover(engine: Engine, cluster: Cluster, job: Job) -> int:
    """Kill a rank; the step that the next world begins from."""
    cluster.restart(job)
    return job.base.step if job.decided.base is not None else 0


def spoil(cluster: Cluster, job: Job, step: int) -> None:
    """An operator says that what the world began from leads to NaN."""
    cluster.core().distrust(RUN, step, "nan")
    cluster.checker.distrusted(RUN, job.world_id)


@pytest.mark.parametrize("seed", range(6))
def test_nodes_of_a_lost_cluster_that_return_with_newer_decisions_bring_no_dead_history_back(seed: int) -> None:
    engine, cluster, job = training(4, seed=seed, policy=POLICY)
    assert engine.run_until(lambda: stored_step(cluster) >= 2, limit_s=20)
    cluster.disturb_storage(1000.0)  # the lost cluster decides on without a copy
    for _ in range(3):
        step = recover(engine, cluster, job)
        assert engine.run_until(lambda step=step: cluster.checker.protected_step(RUN) > step, limit_s=30)
    lost_generation = cluster.core().generation.number
    cluster.black_out(survivors=1 + seed % 2)
    cluster.disturb_storage(0.0)
    world = job.world_id
    cluster.wait_restarted(job, world)
    assert job.decided.generation.number > lost_generation
    begun = job.decided
    assert engine.run_until(lambda: cluster.checker.protected_step(RUN) > begun.base.step + 1, limit_s=30)  # type: ignore[union-attr]
    cluster.bring_back()
    engine.run_for(6.0)
    assert job.decision == begun, "the world that trains is left alone"
    newest = cluster.checker.protected_step(RUN)
    assert recover(engine, cluster, job) >= newest - 1
    assert job.decided.lineage[1].attempt == begun.attempt, "it goes on with the new cluster's history"


@pytest.mark.parametrize("seed", [500195, 700019])
def test_a_surveyor_that_is_replaced_under_its_name_keeps_no_run_waiting(seed: int) -> None:
    """Two seeds that waited for ever for a node that had been asked before it was an empty one."""
    Scenario(seed, is_harsh=seed % 3 == 2, has_storage=True).run()


def test_distrust_has_the_older_copy_restored_when_memory_has_nothing_older() -> None:
    engine, cluster, job = training(4, policy=POLICY)
    assert engine.run_until(lambda: len(cluster.storage.records(RUN)) >= 2, limit_s=20)
    step = recover(engine, cluster, job)
    assert cluster.distrust(job)
    engine.run_for(4.0)
    older = recover(engine, cluster, job)
    assert 0 < older < step
    assert cluster.checker.protected_step(RUN) >= older


def test_a_node_that_is_cut_off_with_an_old_order_removes_no_copy_that_became_the_last_sound_one() -> None:
    engine, cluster, job = training(4, policy=replace(POLICY, probation_steps=2))
    assert engine.run_until(lambda: len(cluster.storage.records(RUN)) >= 2, limit_s=20)
    restored = recover(engine, cluster, job)
    upkeep = cluster.core().runs[RUN].persisting.upkeep
    assert engine.run_until(lambda: bool(upkeep.prunes), limit_s=30)
    old = upkeep.prunes[0]
    assert old.step < restored, "the older copy is to go, because newer ones are there"
    cluster.disturb_storage(1000.0)
    engine.run_for(0.3)  # the order arrives and cannot be carried out
    cluster.cut(upkeep.node, 1000.0)
    engine.run_for(2 * cluster.lease_s)
    spoil(cluster, job, restored)
    cluster.disturb_storage(0.0)
    engine.run_for(3 * cluster.lease_s)
    assert old.key in cluster.storage.runs[RUN], "the node does not know that the newer ones lead to NaN"
    cluster.black_out(survivors=0)
    cluster.wait_restarted(job, job.world_id)
    assert SnapshotKey(job.base.attempt, job.base.step) == old.key


def test_what_is_distrusted_while_it_is_copied_is_not_restored_after_the_loss_of_everything() -> None:
    engine, cluster, job = training(4, policy=replace(POLICY, persist_every_steps=3, probation_steps=2))
    assert engine.run_until(lambda: stored_step(cluster) >= 3, limit_s=20)
    sound = stored_step(cluster)
    assert engine.run_until(lambda: cluster.checker.protected_step(RUN) > sound, limit_s=20)
    restored = recover(engine, cluster, job)
    persisting = cluster.core().runs[RUN].persisting

    def is_copied() -> bool:
        return persisting.transfer is not None and len(persisting.transfer.done) >= 1

    assert engine.run_until(is_copied, limit_s=30)
    assert persisting.transfer is not None
    copied = persisting.transfer.snapshot
    assert copied.step > restored > sound
    spoil(cluster, job, restored)
    assert engine.run_until(lambda: bool(cluster.storage.marks.get(RUN)), limit_s=20), "it is marked there"
    engine.run_for(4 * cluster.lease_s)
    assert copied not in cluster.storage.records(RUN), "its copy was given up"
    cluster.black_out(survivors=0)
    cluster.wait_restarted(job, job.world_id)
    assert job.base.step <= sound
    engine.run_for(2.0)
    cluster.trust()
    assert engine.run_until(lambda: not cluster.storage.marks[RUN], limit_s=20), "trusted again, it is struck out there"
