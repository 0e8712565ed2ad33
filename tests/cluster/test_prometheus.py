"""A real Prometheus over a real cluster: a training run, a lost node, a recovery, durable copies; and every expression asked.

One cluster and one server for the file. What is asked afterwards are the rules and panels as they lie in deploy/.
"""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from backstay.testing import LocalCluster
from tests.kit import monitoring
from tests.kit.prometheus import Prometheus, aim, configure, prometheus, require
from tests.kit.training import Training

RANKS = 2

# Asked of a healthy cluster these have nothing to say: their conditions are what an alert is about. What is asked instead is
# each side of their comparisons.
QUIET = {alert["alert"] for alert in monitoring.alerts()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("watched")


@pytest.fixture(scope="module")
def cluster(place: Path) -> Iterator[LocalCluster]:
    require("prometheus")
    (place / "storage").mkdir()
    settings = {
        "persist_url": f"file://{place}/storage", "persist_every_s": 20, "persist_every_steps": 20, "persist_keep_last": 2,
    }  # fmt: skip
    with LocalCluster(RANKS, 1, lease_s=1.0, settings=settings, tls=True, keep_logs=place / "logs") as running:
        yield running


@pytest.fixture(scope="module")
def server(cluster: LocalCluster, place: Path) -> Iterator[Prometheus]:
    with prometheus(configure(cluster, place), place) as running:
        yield running


@pytest.fixture(scope="module")
def story(cluster: LocalCluster, server: Prometheus, place: Path) -> Iterator[list[tuple[str, bool]]]:
    """Training, a node pulled, its replacement, the recovery. Yields (alert, whether it fired) in the order seen."""
    training = Training(cluster, place, pause_s=0.1)
    training.start()
    training.wait_protected(5)
    server.wait(lambda: server.value("training_job:backstay_spares:min") == 1, "one spare to be seen")
    seen = [("OneFailureFromLoss", "OneFailureFromLoss" in server.firing())]
    cluster.destroy_node(1)
    server.wait(lambda: "OneFailureFromLoss" in server.firing(), "the alert of a lost spare to fire")
    seen.append(("OneFailureFromLoss", True))
    assert all(process.wait(90) != 0 for process in training.processes)
    cluster.replace_node(1)
    aim(cluster, place / "prometheus")
    training.start()
    first_step = training.wait_restored(2)[0]["step"]
    server.wait(lambda: server.value("training_job:backstay_spares:min") == 1, "the spare to be back")
    server.wait(lambda: "OneFailureFromLoss" not in server.firing(), "the alert to end")
    seen.append(("OneFailureFromLoss", False))
    cluster.wait_until(lambda: cluster.run_status(training.run)["storage"]["step"] > first_step, 60, "a durable copy")
    yield seen
    training.stop()


def test_an_alert_fires_when_a_node_is_pulled_and_ends_when_protection_is_back(story: list[tuple[str, bool]]) -> None:
    assert story == [("OneFailureFromLoss", False), ("OneFailureFromLoss", True), ("OneFailureFromLoss", False)]


def test_every_panel_of_every_dashboard_has_data(story: object, server: Prometheus) -> None:
    waiting = {expression.place: expression.text for expression in monitoring.panel_expressions()}
    _ask_until_answered(server, waiting)


def test_every_recorded_series_has_data(story: object, server: Prometheus) -> None:
    _ask_until_answered(server, {rule["record"]: rule["record"] for rule in monitoring.records()})


def test_every_part_of_every_alert_has_data(story: object, server: Prometheus) -> None:
    parts = {
        f"{alert['alert']}: {part}": part for alert in monitoring.alerts() for part in vectors_of(str(alert["expr"]))
    }
    assert {place.partition(":")[0] for place in parts} == QUIET
    _ask_until_answered(server, parts)


def test_prometheus_evaluates_every_rule_without_an_error(story: object, server: Prometheus) -> None:
    groups = server.get("/api/v1/rules")["data"]["groups"]
    broken = {rule["name"]: rule["lastError"] for group in groups for rule in group["rules"] if rule["health"] != "ok"}
    assert not broken
    assert sum(len(group["rules"]) for group in groups) == len(monitoring.alerts()) + len(monitoring.records())


def test_nothing_else_fires_once_the_job_is_well_again(story: object, server: Prometheus) -> None:
    """The target that was pulled is not listed any more; TrainerBlocked depends on the machine's speed."""
    expected = {"TrainerBlocked"}
    server.wait(lambda: server.firing() <= expected, "no other alert to fire", deadline_s=30)


def test_what_the_daemons_export_pleases_promtool(story: object, cluster: LocalCluster, server: Prometheus) -> None:
    for sample in server.query("up == 1"):
        with urllib.request.urlopen(f"http://{sample['metric']['instance']}/metrics", timeout=10) as answer:
            text = answer.read()
        command = [require("promtool"), "check", "metrics"]
        result = subprocess.run(command, input=text, capture_output=True, timeout=30, check=False)
        assert result.returncode == 0, result.stderr.decode()


def _ask_until_answered(server: Prometheus, waiting: dict[str, str]) -> None:
    """Ask for each expression until it has a sample; rates need two scrapes."""

    def ask() -> bool:
        for place, text in list(waiting.items()):
            if server.query(text):
                del waiting[place]
        return not waiting

    try:
        server.wait(ask, "every expression to have data", deadline_s=45)
    except AssertionError:
        pytest.fail(f"no data for {json.dumps(waiting, indent=2)}")


def vectors_of(expression: str) -> list[str]:
    """What an alert looks at: each metric of it with its selector and range, as an instant vector."""
    found = re.findall(r"(?<![\w:])((?:[a-z_]+:)?(?:backstay_[a-z0-9_]+|up)(?::[a-z0-9_]+)?(?:\{[^}]*\})?)", expression)
    return list(dict.fromkeys(found))
