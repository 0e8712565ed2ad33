"""A run whose first decision is recorded on some of its hosts when world and coordinator die, on the simulated cluster."""

from __future__ import annotations

import pytest

from backstayd.core.messages.decisions import Outcome
from backstayd.core.policy import CorePolicy
from tests.simulation.cluster import Cluster, Job
from tests.simulation.engine import Engine
from tests.simulation.scenario import Scenario
from tests.simulation.test_traps import RUN, cluster_of


def begun(*, policy: CorePolicy | None = None) -> tuple[Engine, Cluster, Job]:
    engine, cluster = cluster_of(4, policy=policy)
    job = Job.on(RUN, 4)
    cluster.start_job(job)
    return engine, cluster, job


def begun_in_part() -> tuple[Engine, Cluster, Job]:
    """Three of four hosts have recorded the first decision when the coordinator dies."""
    engine, cluster, job = begun()
    cluster.nodes["n4"].recording_trouble = "no room to write decision.json"

    def recorded() -> list[str]:
        return [name for name, node in cluster.nodes.items() if RUN in node.memory and node.memory[RUN].decision]

    assert engine.run_until(lambda: len(recorded()) == 3, limit_s=20)
    cluster.crash_coordinator(0.3)
    cluster.nodes["n4"].recording_trouble = ""
    return engine, cluster, job


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_run_whose_first_decision_was_recorded_on_some_hosts_alone_begins_all_the_same(is_replaced: bool) -> None:
    engine, cluster, job = begun_in_part()
    if is_replaced:
        cluster.destroy("n4", replace_after_s=0.05)
    else:
        cluster.kill_trainer(job.trainers[0])
    cluster.wait_training(job)
    assert cluster.outcome(job) is Outcome.NONE
    assert engine.run_until(lambda: cluster.is_protected(RUN), limit_s=20)


@pytest.mark.parametrize("count", [1, 3])
def test_a_run_that_hosts_which_are_away_may_have_seen_more_of_is_not_begun_anew(count: int) -> None:
    engine, cluster, job = begun_in_part()
    for name in ("n4", "n3", "n2")[:count]:
        cluster.destroy(name, replace_after_s=None)
    assert engine.run_until(lambda: job.refusals != [], limit_s=20)
    assert job.lives == [], "nobody has trained"


def test_a_run_of_which_a_host_holds_a_shard_is_not_begun_anew_where_another_lost_its_memory() -> None:
    engine, cluster, job = begun(policy=CorePolicy(lease_s=1.5, parity=0))
    assert engine.run_until(lambda: job.step >= 3 and cluster.is_protected(RUN), limit_s=20)
    cluster.crash_coordinator(0.3)
    cluster.destroy("n4", replace_after_s=0.05)
    assert engine.run_until(lambda: job.refusals != [], limit_s=20)


def test_a_run_that_never_began_is_not_refused_for_ever() -> None:
    """A seed in which a daemon was away when the others recorded, and the coordinator died before the next world."""
    Scenario(9200394, is_harsh=False, has_storage=True).run()
