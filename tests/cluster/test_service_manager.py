"""What the daemons tell systemd, heard on a real socket: ready, alive, how it stands, stopping."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from backstay.testing import LocalCluster
from backstayd.telemetry.systemd import ServiceManager
from tests.kit.notify_socket import NotifySocket
from tests.kit.wording import says


@pytest.fixture(scope="module")
def manager() -> Iterator[NotifySocket]:
    with NotifySocket() as manager:
        yield manager


@pytest.fixture(scope="module")
def cluster(manager: NotifySocket) -> Iterator[LocalCluster]:
    environment = {"NOTIFY_SOCKET": manager.name, "WATCHDOG_USEC": "1000000"}
    with LocalCluster(nodes=1, parity=0, env=environment) as cluster:
        yield cluster


def node_pid(cluster: LocalCluster) -> int:
    daemon = cluster.nodes[0].daemon
    assert daemon is not None
    return daemon.pid


def coordinator_pid(cluster: LocalCluster) -> int:
    assert cluster.coordinator_process is not None
    return cluster.coordinator_process.pid


def test_a_daemon_asks_for_time_until_it_serves_and_then_feeds_the_watchdog(
    cluster: LocalCluster, manager: NotifySocket
) -> None:
    pid = node_pid(cluster)
    asked = manager.wait_for(pid, "EXTEND_TIMEOUT_USEC")
    assert says("adopting", asked.fields["STATUS"])
    ready = manager.wait_for(pid, "READY", "1")
    assert manager.of(pid).index(asked) < manager.of(pid).index(ready)
    manager.wait_for(pid, "STATUS", key="node_connected")
    beats = [manager.wait_for(pid, "WATCHDOG", "1", after=count) for count in (0, len(manager.of(pid)))]
    assert beats[0] is not beats[1]


def test_a_coordinator_says_how_many_nodes_it_sees(cluster: LocalCluster, manager: NotifySocket) -> None:
    manager.wait_for(coordinator_pid(cluster), "READY", "1")
    manager.wait_for(coordinator_pid(cluster), "STATUS", key="nodes_counted")


def test_a_daemon_that_is_told_to_end_says_so_first(cluster: LocalCluster, manager: NotifySocket) -> None:
    pid = node_pid(cluster)
    assert cluster.stop_daemon(0) == 0
    last = manager.of(pid)[-1].fields
    assert last["STOPPING"] == "1"
    cluster.restart_daemon(0)
    assert node_pid(cluster) != pid


def test_without_a_manager_nothing_is_sent_and_nothing_needs_to_be() -> None:
    manager = ServiceManager({"WATCHDOG_USEC": "1000000"})
    manager.ready("serving")
    assert manager.watchdog_s == 0.0


def test_a_watchdog_of_another_process_is_not_fed(tmp_path: Path) -> None:
    environment = {"NOTIFY_SOCKET": str(tmp_path / "socket"), "WATCHDOG_USEC": "3000000"}
    assert ServiceManager(environment | {"WATCHDOG_PID": str(os.getpid())}).watchdog_s == 3.0
    assert ServiceManager(environment | {"WATCHDOG_PID": "1"}).watchdog_s == 0.0


def test_a_message_that_could_not_be_sent_goes_with_the_next(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGHUP)
    socket = NotifySocket(tmp_path / "socket")
    manager = ServiceManager({"NOTIFY_SOCKET": socket.name})
    manager.reloading()  # nobody listens yet
    manager.ready("a\nb")
    with socket:
        manager.alive("a\nb")
        message = socket.wait_for(os.getpid(), "READY")
        assert message.fields == {
            "MONOTONIC_USEC": message.fields["MONOTONIC_USEC"],
            "READY": "1",
            "STATUS": "a b",
        }
        manager.alive("a\nb")  # nothing new: nothing sent
        manager.stopping("ending")
        assert socket.wait_for(os.getpid(), "STOPPING").fields == {"STOPPING": "1", "STATUS": "ending"}
        assert len(socket.messages) == 2
    assert signal.getsignal(signal.SIGHUP) is before, "only a daemon's process takes signals"
