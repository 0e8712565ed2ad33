"""Recoveries as metrics count them, against what truly happened on the simulated cluster."""

from __future__ import annotations

import pytest

from backstayd.coordinator.gauges import Gauges
from backstayd.core.messages.decisions import Outcome
from backstayd.core.recover.recovery import Stage
from backstayd.telemetry.metrics import CoordinatorMetrics, registry
from backstayd.telemetry.metrics.coordinator import OUTCOMES, SOURCES
from tests.simulation.cluster import Cluster, Job
from tests.simulation.engine import Engine

RUN = "default/gpt"
NODES = 4


class Watched:
    """A job on a cluster whose coordinator's metrics are kept in step after every event, as the coordinator does."""

    def __init__(self, seed: int = 1) -> None:
        self.engine = Engine(seed)
        self.cluster = Cluster(self.engine, node_count=NODES)
        self.job = Job.on(RUN, NODES)
        self.check = self.engine.after_event
        self.engine.after_event = self._after_event
        self.observe()
        self.cluster.start_job(self.job)
        self.until_training("")

    def observe(self) -> None:
        """Begin with the metrics of the coordinator that is there now."""
        self.core = self.cluster.core()
        self.metrics = CoordinatorMetrics(version="0")
        self.gauges = Gauges(self.metrics, self.core.policy)

    def until_training(self, world_id: str) -> None:
        """Until the job trains, and is protected, in another world than ``world_id``."""
        cluster, job = self.cluster, self.job
        assert self.engine.run_until(
            lambda: job.world_id != world_id and cluster.is_training(job) and cluster.is_protected(RUN), limit_s=40
        ), job.refusals

    def value(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"backstay_{name}", labels) or 0.0

    def of_run(self, name: str, **labels: str) -> float:
        return self.value(name, training_job=RUN, **labels)

    def outcomes(self) -> dict[tuple[str, str], int]:
        """Every outcome counted so far, by (source, outcome)."""
        found = {
            (source, outcome): int(self.of_run("recoveries_total", source=source, outcome=outcome))
            for source in SOURCES
            for outcome in OUTCOMES
        }
        return {place: count for place, count in found.items() if count}

    def phase(self, name: str) -> tuple[float, float]:
        """How often it was seen, and how long it took altogether."""
        return (
            self.value("recovery_phase_seconds_count", phase=name),
            self.value("recovery_phase_seconds_sum", phase=name),
        )

    def _after_event(self) -> None:
        if self.check is not None:
            self.check()
        self.gauges.update(self.core, now_s=self.engine.now_s, unix_s=1e9 + self.engine.now_s)


def test_a_trainer_that_dies_is_one_recovery_from_memory() -> None:
    watched = Watched()
    assert watched.outcomes() == {("none", "none"): 1}
    world = watched.job.world_id
    watched.cluster.kill_trainer(watched.job.trainers[0])
    watched.until_training(world)
    outcome = watched.job.decided.outcome
    assert watched.outcomes() == {("none", "none"): 1, ("local", outcome.value.lower()): 1}
    assert watched.of_run("recovery_shards_total", source="local") == NODES
    assert [watched.phase(name)[0] for name in ("detect", "restart", "decide", "stage", "release")] == [1, 1, 2, 2, 2]
    assert (
        watched.of_run("steps_lost_total")
        == watched.core.runs[RUN].accounts.document(watched.engine.now_s)["steps_lost"]
    )  # type: ignore[index]


def test_a_run_that_was_above_the_limit_has_every_series_once_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched()
    once = ("first_seen_timestamp_seconds", "complete_timestamp_seconds", "protected_timestamp_seconds")
    monkeypatch.setattr(registry, "MAX_RUNS", 0)
    watched.observe()
    watched.engine.run_for(1.0)
    assert [watched.of_run(name) for name in (*once, "run_seconds_total")] == [0, 0, 0, 0]
    began = watched.phase("restart")
    world = watched.job.world_id
    watched.cluster.kill_trainer(watched.job.trainers[0])
    watched.until_training(world)
    assert watched.phase("restart")[0] == began[0] + 1, "what is counted over all runs is complete"
    monkeypatch.setattr(registry, "MAX_RUNS", 1)
    watched.engine.run_for(1.0)
    assert all(watched.of_run(name) >= 1e9 for name in once)
    assert watched.of_run("run_seconds_total", part="productive") > 0


def test_a_lost_node_is_stated_after_its_lease_and_its_shard_is_rebuilt() -> None:
    watched = Watched()
    world, lease_s = watched.job.world_id, watched.core.policy.lease_s
    watched.cluster.destroy("n2", replace_after_s=1.0)
    watched.until_training(world)
    assert watched.job.decided.outcome in (Outcome.EXACT, Outcome.EXACT_OLDER)
    assert watched.of_run("recovery_shards_total", source="rebuild") >= 1
    count, seconds = watched.phase("detect")
    assert count == 1
    assert 0 <= seconds <= 1.5 * lease_s


def test_a_recovery_that_ends_with_the_death_of_a_rank_is_abandoned_and_the_next_is_another() -> None:
    watched = Watched()
    state, world = watched.core.runs[RUN], watched.job.world_id
    watched.cluster.kill_trainer(watched.job.trainers[0])
    assert watched.engine.run_until(lambda: state.recovery.stage is Stage.PREPARE, limit_s=20)
    watched.cluster.kill_trainer(watched.job.trainers[2])
    watched.until_training(world)
    found = watched.outcomes()
    assert found.pop(("none", "abandoned")) == 1
    assert watched.of_run("recoveries_started_total") == 3
    assert sum(found.values()) == 2


def test_what_a_former_coordinator_released_is_no_recovery_of_the_next() -> None:
    watched = Watched()
    watched.cluster.crash_coordinator(0.3)
    watched.engine.run_for(0.5)
    watched.observe()
    watched.engine.run_for(5)
    assert watched.core.is_settled
    assert watched.of_run("recoveries_started_total") == 0
    assert watched.outcomes() == {}
    assert watched.of_run("spares") == 1
