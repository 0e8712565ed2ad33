"""Metrics as they are declared and exported: Prometheus' rules, bounded series, and that nothing of a gone run stays."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.exposition import generate_latest

from backstay.ids import SnapshotKey
from backstay.protocol import messages
from backstayd.coder.jobs import JobResult, VerifyShard
from backstayd.config.schema import NodeConfig
from backstayd.coordinator.gauges import Gauges
from backstayd.core.policy import CorePolicy
from backstayd.core.timeline import Event
from backstayd.node import job_metrics
from backstayd.store.paths import ShardRef
from backstayd.telemetry.heartbeat_margin import WINDOW_S, LeastMargin
from backstayd.telemetry.metrics import CoordinatorMetrics, DaemonMetrics, NodeMetrics, reference, registry

ROOT = Path(__file__).parents[2]
RUN = "default/gpt"


def _all() -> list[DaemonMetrics]:
    return [NodeMetrics(version="0.1.0"), CoordinatorMetrics(version="0.1.0")]


def _value(metrics: DaemonMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


@pytest.mark.parametrize("metrics", _all(), ids=["node", "coordinator"])
def test_names_and_labels_keep_the_rules(metrics: DaemonMetrics) -> None:
    for family in metrics.registry.collect():
        assert family.name.startswith(("backstay_", "process_"))
        assert not family.name.endswith("_total"), "prometheus-client adds _total to counters itself"
        for sample in family.samples:
            assert not {"job", "rank", "step", "run", "instance"} & set(sample.labels), sample


@pytest.mark.parametrize("metrics", _all(), ids=["node", "coordinator"])
def test_promtool_has_nothing_to_say_about_them(metrics: DaemonMetrics) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    text = generate_latest(metrics.registry)
    result = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, timeout=30, check=False)
    assert result.returncode == 0, result.stderr.decode()


def test_the_reference_is_what_the_code_exports() -> None:
    page = ROOT / "docs" / "metrics.md"
    assert page.read_text(encoding="utf-8") == reference.reference(), (
        "run `python -m backstayd.telemetry.metrics.reference > docs/metrics.md`"
    )


def test_a_run_is_exported_at_zero_from_its_first_sight_and_not_at_all_when_it_is_gone() -> None:
    metrics = NodeMetrics(version="0.1.0")
    metrics.sessions.of(RUN).set(1)
    assert _value(metrics, "backstay_shards_total", training_job=RUN, result="torn") == 0
    assert _value(metrics, "backstay_committed_step", training_job=RUN) is None, "0 would be a step"
    metrics.storage_failures.of(RUN, reason="timeout").inc()
    metrics.shards.of("default/stays", result="committed").inc()
    metrics.keep_runs({"default/stays", "default/never-known"})
    runs = {sample.labels.get("training_job") for family in metrics.registry.collect() for sample in family.samples}
    assert runs == {None, "default/stays"}


def test_runs_above_the_limit_are_counted_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "MAX_RUNS", 3)
    metrics = NodeMetrics(version="0.1.0")
    for index in range(10):
        metrics.shards.of(f"default/r{index}", result="committed").inc()
    found = {s.labels.get("training_job") for f in metrics.registry.collect() for s in f.samples} - {None}
    assert found == {"default/r0", "default/r1", "default/r2"}
    metrics.keep_runs({"default/r0"})
    metrics.shards.of("default/r9", result="committed").inc()
    assert _value(metrics, "backstay_shards_total", training_job="default/r9", result="committed") == 1


def test_runs_above_the_limit_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "MAX_RUNS", 1)
    metrics = NodeMetrics(version="0.1.0")
    metrics.sessions.of(RUN).set(1)
    several = {id(metrics.shards.of(f"default/r{index}", result="committed")) for index in range(10)}
    assert len(several) == 1, "they share one"
    assert metrics.shards.of(RUN, result="committed") is not metrics.shards.of("default/r0", result="committed")


def test_what_a_trainer_says_of_its_costs_is_bounded() -> None:
    metrics = NodeMetrics(version="0.1.0")
    job_metrics.note_cost(
        metrics, RUN, messages.TrainerCost(snapshot_s=0.5, fence_s=-3.0, capture_s=1e300, copied_bytes=-7)
    )
    blocked = "backstay_trainer_blocked_seconds_total"
    assert _value(metrics, blocked, training_job=RUN, where="snapshot") == 0.5
    assert _value(metrics, blocked, training_job=RUN, where="fence") == 0
    assert _value(metrics, "backstay_stage_bytes_total", training_job=RUN, stage="capture") == 0
    assert _value(metrics, "backstay_stage_seconds_sum", stage="capture") == job_metrics.MAX_COST_S


def test_a_job_that_failed_is_an_attempt_as_well() -> None:
    metrics = NodeMetrics(version="0.1.0")
    job = VerifyShard(shard=ShardRef(run=RUN, key=SnapshotKey(1, 1), rank=0, world_size=1, digest="ab"), deadline_s=600)
    job_metrics.note_job(metrics, job, JobResult(job_id=1, done_bytes=10, seconds={"read": 0.1}), 0.2)
    job_metrics.note_job(metrics, job, JobResult(job_id=2, error_class="IntegrityError", flipped_in_flight=2), 0.2)
    assert _value(metrics, "backstay_stage_runs_total", stage="verify", result="ok") == 1
    assert _value(metrics, "backstay_stage_runs_total", stage="verify", result="failed") == 1
    assert _value(metrics, "backstay_stage_seconds_count", stage="verify") == 2
    assert _value(metrics, "backstay_verified_bytes_total") == 10
    assert _value(metrics, "backstay_corrupt_total", where="in_flight") == 2


def test_daemons_that_are_configured_alike_have_one_hash() -> None:
    one = NodeConfig(name="n1", http="127.0.0.1:1")
    metrics = NodeMetrics(version="0.1.0")
    metrics.set_config(one)
    metrics.set_config(replace(one, lease_s=5.0))
    (family,) = [f for f in metrics.registry.collect() if f.name == "backstay_config_info"]
    assert [s.labels["hash"] for s in family.samples] == [_hash(replace(one, name="n2", lease_s=5.0))]
    assert _value(metrics, "backstay_lease_seconds") == 5.0


def _hash(config: NodeConfig) -> str:
    metrics = NodeMetrics(version="0.1.0")
    metrics.set_config(config)
    (family,) = [f for f in metrics.registry.collect() if f.name == "backstay_config_info"]
    return family.samples[0].labels["hash"]


def test_the_least_margin_is_forgotten_after_a_window() -> None:
    margin = LeastMargin(3.0)
    assert margin.least_s(0.0) == 3.0
    margin.note(2.5, 1.0)
    margin.note(0.5, 2.0)
    margin.note(2.4, 3.0)
    assert margin.least_s(10.0) == 0.5
    assert margin.least_s(WINDOW_S / 2 + 2.0) == 0.5
    margin.note(2.2, WINDOW_S / 2 + 3.0)
    assert margin.least_s(WINDOW_S + 5.0) == 2.2
    assert margin.least_s(3 * WINDOW_S) == 3.0


def test_a_coordinator_that_stands_back_says_nothing_of_runs_any_more() -> None:
    metrics = CoordinatorMetrics(version="0.1.0")
    board = Gauges(metrics, CorePolicy(persist_url="file:///mnt", persist_every_s=60.0))
    board.count(Event(at_s=0.0, run=RUN, kind="complete", message="step 1 of attempt 1 is complete"))
    metrics.spares.of(RUN).set(2)
    metrics.coordinator_settled.set(1)
    assert _value(metrics, "backstay_snapshots_complete_total", training_job=RUN) == 1
    assert _value(metrics, "backstay_persist_interval_seconds") == 60
    board.close()
    assert not [s for f in metrics.registry.collect() for s in f.samples if s.labels.get("training_job")]
    assert _value(metrics, "backstay_coordinator_settled") == 0
