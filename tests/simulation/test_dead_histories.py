"""When a history is dead, and when what is dead may be deleted, on the simulated cluster."""

from __future__ import annotations

import pytest

from backstayd.core.messages.decisions import Outcome
from backstayd.core.policy import CorePolicy
from backstayd.core.recover.recovery import Stage
from tests.simulation.cluster import Cluster, Job
from tests.simulation.engine import Engine
from tests.simulation.storage import URL

RUN = "default/gpt"


def with_an_older_copy_on_storage(*, seed: int) -> tuple[Engine, Cluster, Job]:
    """Four ranks train; memory is ahead of the newest copy on durable storage."""
    engine = Engine(seed)
    policy = CorePolicy(lease_s=1.5, persist_url=URL, persist_every_steps=1)
    cluster = Cluster(engine, node_count=4, policy=policy)
    job = Job.on(RUN, 4)
    cluster.start_job(job)
    assert engine.run_until(lambda: bool(cluster.storage.records(RUN)) and cluster.is_protected(RUN), limit_s=20)
    cluster.disturb_storage(4.0)
    stored = max(record.step for record in cluster.storage.records(RUN))
    assert engine.run_until(lambda: cluster.checker.protected_step(RUN) > stored + 1, limit_s=4)
    return engine, cluster, job


def silence_half(engine: Engine, cluster: Cluster) -> None:
    """Two nodes are not heard for a while, by a coordinator that never saw them: neither is rebuilt with the other's help."""
    cluster.crash_coordinator(0.1)
    cluster.cut("n3", 25.0)
    cluster.cut("n4", 25.0)
    engine.run_for(2 * cluster.lease_s)


def abandoned_after_it_was_recorded_on_some(engine: Engine, cluster: Cluster, job: Job) -> int:
    """Half of the nodes are silent, a smaller world decides on the older copy, and a rank dies before its release.

    Returns:
        The newest step that was protected, of which the silent nodes hold a part.
    """
    cluster.stop_job(job)
    newest = cluster.checker.protected_step(RUN)
    silence_half(engine, cluster)
    smaller = Job(RUN, {0: "n1", 1: "n2"})
    cluster.start_job(smaller)
    recovery = cluster.core().runs[RUN].recovery

    def is_recorded_on_some() -> bool:
        decision = recovery.decision
        held = [cluster.nodes[name].memory[RUN].decision for name in ("n1", "n2")]
        return recovery.stage is Stage.RECORD and decision in held

    assert engine.run_until(is_recorded_on_some, limit_s=30)
    decision = recovery.decision
    assert decision is not None
    assert decision.base is not None
    assert decision.base.step < newest, "prove that the newest is out of reach"
    cluster.stop_job(smaller)
    engine.run_for(20)  # the silent nodes are back
    return newest


@pytest.mark.parametrize("seed", range(3))
def test_what_a_decision_left_behind_is_restored_if_no_trainer_ever_returned_with_it(seed: int) -> None:
    engine, cluster, job = with_an_older_copy_on_storage(seed=seed)
    newest = abandoned_after_it_was_recorded_on_some(engine, cluster, job)
    assert newest in {key.step for key in cluster.kept_keys(RUN)}, "nothing was deleted"
    later = Job.on(RUN, 4)
    cluster.start_job(later)
    cluster.wait_training(later, limit_s=30)
    assert later.decided.outcome is Outcome.EXACT
    assert later.base.step >= newest


def test_a_new_coordinator_deletes_nothing_for_a_decision_with_which_no_trainer_returned() -> None:
    engine, cluster, job = with_an_older_copy_on_storage(seed=1)
    newest = abandoned_after_it_was_recorded_on_some(engine, cluster, job)
    cluster.crash_coordinator(0.1)
    engine.run_for(6)
    assert newest in {key.step for key in cluster.kept_keys(RUN)}


def test_a_dead_history_goes_once_a_trainer_has_returned_with_the_decision_that_ended_it() -> None:
    engine, cluster, job = with_an_older_copy_on_storage(seed=2)
    cluster.stop_job(job)
    silence_half(engine, cluster)
    smaller = Job(RUN, {0: "n1", 1: "n2"})
    cluster.start_job(smaller)
    cluster.wait_training(smaller, limit_s=30)
    assert engine.run_until(lambda: len({k.attempt for k in cluster.kept_keys(RUN)}) == 1, limit_s=30)
    assert engine.run_until(lambda: cluster.is_protected(RUN), limit_s=10)
