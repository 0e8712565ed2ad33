"""A real Prometheus over a real cluster: a training run, a lost node, a recovery, durable copies; and every expression asked.

One cluster and one server for the file. What is asked afterwards are the rules and panels as they lie in deploy/.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from backstay.testing import LocalCluster
from backstay.testing.ports import free_port
from tests.kit import monitoring
from tests.kit.prometheus import Prometheus, aim, configure, prometheus, require

SCRIPT = Path(__file__).parents[1] / "kit" / "trainer_script.py"
RUN = "default/watched"
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
    trainers = _start(cluster, place)
    cluster.wait_until(lambda: cluster.run_status(RUN)["protected_step"] >= 5, 120, "five steps to be protected")
    server.wait(lambda: server.value("training_job:backstay_spares:min") == 1, "one spare to be seen")
    seen = [("OneFailureFromLoss", "OneFailureFromLoss" in server.firing())]
    cluster.destroy_node(1)
    server.wait(lambda: "OneFailureFromLoss" in server.firing(), "the alert of a lost spare to fire")
    seen.append(("OneFailureFromLoss", True))
    for trainer in trainers:
        assert trainer.wait(90) != 0
    cluster.replace_node(1)
    aim(cluster, place / "prometheus")
    trainers = _start(cluster, place)
    cluster.wait_until(lambda: _restored(place) == 2 * RANKS, 120, "the ranks to restore")
    server.wait(lambda: server.value("training_job:backstay_spares:min") == 1, "the spare to be back")
    server.wait(lambda: "OneFailureFromLoss" not in server.firing(), "the alert to end")
    seen.append(("OneFailureFromLoss", False))
    cluster.wait_until(lambda: cluster.run_status(RUN)["storage"]["step"] > _first_step(place), 60, "a durable copy")
    yield seen
    (place / "stop").touch()
    for trainer in trainers:
        assert trainer.wait(60) == 0, cluster.evidence()


def _start(cluster: LocalCluster, place: Path) -> list[subprocess.Popen[bytes]]:
    port = free_port()
    options = {
        "world_size": RANKS, "port": port, "run_id": RUN.partition("/")[2], "stop": str(place / "stop"),
        "last_step": 100_000, "pause_s": 0.1, "is_attached": True,
    }  # fmt: skip
    return [
        cluster.run_on_node(
            rank,
            [sys.executable, str(SCRIPT), json.dumps({**options, "rank": rank, "log": str(place / f"{rank}.log")})],
            name=f"trainer-{rank}",
        )
        for rank in range(RANKS)
    ]


def _events(place: Path) -> list[dict[str, object]]:
    lines = [line for path in place.glob("?.log") for line in path.read_text().splitlines(keepends=True)]
    return [json.loads(line) for line in lines if line.endswith("\n") and '"restored"' in line]


def _restored(place: Path) -> int:
    return len(_events(place))


def _first_step(place: Path) -> int:
    """The step that the second world began from."""
    return max(int(str(event["step"])) for event in _events(place))


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
        text = _metrics(sample["metric"]["instance"])
        command = [require("promtool"), "check", "metrics"]
        result = subprocess.run(command, input=text, capture_output=True, timeout=30, check=False)
        assert result.returncode == 0, result.stderr.decode()


def _metrics(address: str) -> bytes:
    import urllib.request

    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        return bytes(answer.read())


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
