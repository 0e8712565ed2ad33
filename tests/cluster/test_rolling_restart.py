"""Every daemon and then the coordinator are restarted under a training job that does not notice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from backstay.testing import LocalCluster
from backstay.testing.fixtures import LocalClusterFactory as NewCluster
from backstay.testing.rolling import RedundancyWatch, watched
from tests.kit.documented import write_script
from tests.kit.training import Training

NODES = 4
CONTROL_STEPS = 1500  # with 0.1 s a step the other comes nowhere near


def _run_documented_loop(cluster: LocalCluster, directory: Path) -> None:
    """What docs/upgrade.md tells operators to run; the command that restarts a daemon asks this process to."""
    script = write_script("upgrade.md", "rolling-restart.sh", directory)
    for name, text in (
        ("backstay", f'exec {sys.executable} -m backstayd.cli "$@"'),
        ("restart", f"touch {directory}/$1.asked; while [ -e {directory}/$1.asked ]; do sleep 0.05; done"),
    ):
        (directory / name).write_text(f"#!/bin/sh\n{text}\n")
        (directory / name).chmod(0o755)
    environment = cluster.operator_environment | {"RESTART": str(directory / "restart")}
    environment["PATH"] = f"{directory}:{environment['PATH']}"
    loop = subprocess.Popen([str(script)], env=environment, start_new_session=True)
    restarted: list[str] = []

    def is_over() -> bool:
        for node in cluster.nodes:
            asked = directory / f"{node.name}.asked"
            if asked.exists():
                assert cluster.stop_daemon(node.index) == 0
                cluster.restart_daemon(node.index)
                restarted.append(node.name)
                asked.unlink()
        return loop.poll() is not None

    try:
        cluster.wait_until(is_over, 400, "the loop to be through all nodes")
    finally:
        if loop.poll() is None:
            os.killpg(loop.pid, signal.SIGKILL)
        loop.wait()
    assert loop.returncode == 0
    assert restarted == [node.name for node in cluster.nodes]


def _check_watch(watch: RedundancyWatch) -> None:
    assert watch.complaints() == []
    assert len(watch.samples) > 50
    assert all(sample.away == () for sample in watch.samples), "a restart takes less than a lease"


def test_a_rolling_restart_of_everything_costs_no_step_no_snapshot_and_no_redundancy(
    new_cluster: NewCluster, tmp_path: Path
) -> None:
    control = Training(None, tmp_path / "control", ranks=NODES, last_step=CONTROL_STEPS, pause_s=0.0)
    control.start()
    cluster = new_cluster(NODES, 1, lease_s=15.0)  # a daemon starts in less, on a busy machine too
    rolled = Training(cluster, tmp_path / "rolled", ranks=NODES, pause_s=0.1)
    rolled.start()
    rolled.wait_protected(3)
    with watched(cluster, rolled.run, parity=1) as watch:
        _run_documented_loop(cluster, tmp_path)
        rolled.wait_protected(rolled.last_step() + 2)
        cluster.stop_coordinator()
        cluster.start_coordinator()
        rolled.wait_protected(rolled.last_step() + 2)
    rolled.stop()
    _check_watch(watch)
    control.wait_ended(120)
    for rank in range(NODES):
        found = rolled.steps(rank)
        assert found == control.steps(rank)[: len(found)], f"rank {rank}: each step once, and bit for bit"
        assert len(rolled.lines(rank, "restored")) == 1, "no rank ever restored again"
