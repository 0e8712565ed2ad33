"""LocalCluster does to real daemons what it says, and its reading of the state is the truth."""

from __future__ import annotations

import signal
import sys

import pytest

from backstay.errors import ConfigError, UnavailableError, UsageError
from backstay.testing import DeadlineError, LocalCluster
from backstay.testing.daemons import DAEMON_ROLE
from backstay.testing.fixtures import LocalClusterFactory as NewCluster
from tests.kit.wording import refuses

CLUSTER = {"nodes": 3, "parity": 1, "lease_s": 1.0}
SLEEPER = [sys.executable, "-c", "import time; time.sleep(300)"]


def _state(cluster: LocalCluster, name: str) -> str:
    return next((str(entry["state"]) for entry in cluster.status()["nodes"] if entry["name"] == name), "unknown")


def _incarnation(cluster: LocalCluster, index: int) -> str:
    return str(cluster.node_status(index)["node"]["incarnation"])


def test_a_killed_daemon_takes_its_coders_with_it_and_comes_back_as_another_incarnation(cluster: LocalCluster) -> None:
    before = _incarnation(cluster, 1)
    assert len(cluster.keeper.pids(node="node-1", role=DAEMON_ROLE)) >= 2, "a supervisor and a coder at least"
    cluster.kill_daemon(1)
    assert cluster.keeper.pids(node="node-1") == []
    with pytest.raises(UnavailableError):
        cluster.node_status(1)
    cluster.restart_daemon(1)
    cluster.wait_live()
    assert _incarnation(cluster, 1) != before


def test_a_frozen_daemon_is_lost_to_the_coordinator_until_it_thaws(cluster: LocalCluster) -> None:
    cluster.freeze(2)
    cluster.wait_until(lambda: _state(cluster, "node-2") == "lost", 30, "node-2 to be given up")
    daemon = cluster.nodes[2].daemon
    assert daemon is not None
    assert daemon.poll() is None
    cluster.thaw(2)
    cluster.wait_live()


def test_a_destroyed_node_takes_trainers_and_memory_along_and_its_replacement_is_empty(cluster: LocalCluster) -> None:
    old = cluster.nodes[0]
    trainer = cluster.run_on_node(0, SLEEPER)
    (old.memory_dir / "mark").write_text("x")
    assert "mark" in cluster.files(0)
    cluster.destroy_node(0)
    assert trainer.wait(10) == -signal.SIGKILL
    assert not old.directory.exists()
    cluster.wait_until(lambda: _state(cluster, old.name) in ("lost", "unknown"), 30, f"{old.name} to be given up")
    new = cluster.replace_node(0)
    cluster.wait_live()
    assert new.name != old.name
    assert "mark" not in cluster.files(0)


def test_a_restarted_coordinator_hears_of_every_node_again(cluster: LocalCluster) -> None:
    before = cluster.status()["generation"]
    cluster.kill_coordinator()
    with pytest.raises(UnavailableError):
        cluster.status()
    cluster.restart_coordinator()
    cluster.wait_live()
    cluster.wait_until(lambda: cluster.status()["is_settled"], 30, "the coordinator to settle")
    after = cluster.status()["generation"]
    assert after["incarnation"] != before["incarnation"]
    assert after["number"] > before["number"]


def test_a_condition_that_never_comes_true_fails_with_the_status_and_the_logs(cluster: LocalCluster) -> None:
    with pytest.raises(DeadlineError) as caught:
        cluster.wait_until(lambda: False, 0.2, "the-impossible")
    text = str(caught.value)
    assert "0.2 s" in text
    assert "the-impossible" in text
    assert '"nodes"' in text
    assert "coordinator.log" in text


def test_parts_that_are_not_there_are_refused_by_name(cluster: LocalCluster) -> None:
    with refuses(UsageError, "node_exists", "node-1"):
        cluster.replace_node(1)
    with refuses(UsageError, "unknown_part", "node-1"):
        cluster.freeze("node-1")


def test_nothing_is_left_of_a_closed_cluster(new_cluster: NewCluster) -> None:
    cluster = new_cluster(1, 0, lease_s=1.0)
    cluster.run_on_node(0, SLEEPER)
    with pytest.raises(AssertionError, match="left"):
        cluster.assert_nothing_left()
    cluster.close()
    cluster.assert_nothing_left()
    assert not cluster.root.exists()


def test_a_cluster_whose_start_fails_leaves_nothing_behind_without_being_closed() -> None:
    cluster = LocalCluster(1, parity=0, settings={"nosuch": 3})
    with pytest.raises(ConfigError, match="BACKSTAYD_COORDINATOR_NOSUCH"):
        cluster.start()
    cluster.assert_nothing_left()
