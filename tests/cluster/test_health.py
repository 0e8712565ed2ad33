"""Alive and ready, as probes see it: a loop that hangs is found out, a coordinator that is away is nobody's illness."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from backstay.testing import LocalCluster
from backstay.testing.wait import wait_until
from tests.kit.notify_socket import NotifySocket
from tests.kit.wording import says

DEADLINE_S = 60.0


def probe(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture
def armed(tmp_path: Path) -> Path:
    """Deleting it makes the loop of whoever comes first hang at its next pulse."""
    marker = tmp_path / "armed"
    marker.touch()
    return marker


@pytest.fixture
def manager() -> Iterator[NotifySocket]:
    with NotifySocket() as manager:
        yield manager


@pytest.fixture
def cluster(armed: Path, manager: NotifySocket) -> Iterator[LocalCluster]:
    faults = {"BACKSTAY_FAULTS": f"pulse,once={armed}:hang"}
    watchdog = {"NOTIFY_SOCKET": manager.name, "WATCHDOG_USEC": "1000000"}
    with LocalCluster(nodes=1, parity=0, env=faults | watchdog) as cluster:
        yield cluster


def test_a_hanging_loop_is_not_alive_and_an_absent_coordinator_is_no_illness(
    cluster: LocalCluster, armed: Path, manager: NotifySocket
) -> None:
    node, coordinator = cluster.nodes[0].http_port, cluster.coordinator_http_port
    status, sentence = probe(coordinator, "/livez")
    assert (status, says("alive", sentence)) == (200, True)
    status, sentence = probe(coordinator, "/readyz")
    assert (status, says("coordinates", sentence, address=cluster.coordinator_address)) == (200, True)
    wait_until(
        lambda: says("node_connected", probe(node, "/readyz")[1]),
        deadline_s=DEADLINE_S,
        why="node and coordinator to meet",
    )

    cluster.kill_coordinator()
    wait_until(
        lambda: says("node_not_connected", probe(node, "/readyz")[1]), deadline_s=DEADLINE_S, why="the node to notice"
    )
    assert probe(node, "/livez")[0] == probe(node, "/readyz")[0] == 200

    daemon = cluster.nodes[0].daemon
    assert daemon is not None
    manager.wait_for(daemon.pid, "WATCHDOG", after=len(manager.of(daemon.pid)))
    armed.unlink()
    wait_until(armed.exists, deadline_s=DEADLINE_S, why="the loop to hang")
    fed = len(manager.of(daemon.pid))
    wait_until(lambda: probe(node, "/livez")[0] == 503, deadline_s=DEADLINE_S, why="the hanging loop to be found out")
    assert says("loop_hangs", probe(node, "/livez")[1], bound=10)
    assert len(manager.of(daemon.pid)) == fed, "the watchdog is not fed for a loop that hangs"
