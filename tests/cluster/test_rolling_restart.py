"""Every daemon and then the coordinator are restarted under a training job that does not notice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from backstay.testing import LocalCluster
from backstay.testing.cluster import process_environment
from backstay.testing.fixtures import LocalClusterFactory
from backstay.testing.ports import free_port
from backstay.testing.rolling import RedundancyWatch, watched
from tests.kit.documented import write_script

SCRIPT = Path(__file__).parents[1] / "kit" / "trainer_script.py"
RUN_ID = "rolling"
RUN = f"default/{RUN_ID}"
NODES = 4
CONTROL_STEPS = 1500  # with 0.1 s a step the other comes nowhere near
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def _options(directory: Path, rank: int, port: int, **changes: Any) -> str:
    options = {
        "rank": rank,
        "world_size": NODES,
        "port": port,
        "run_id": RUN_ID,
        "log": str(directory / f"rank-{rank}.log"),
        "stop": str(directory / "stop"),
        "last_step": 100_000,
        "pause_s": 0.1,
        "is_attached": True,
    }
    return json.dumps({**options, **changes})


def _lines(directory: Path, rank: int, event: str) -> list[dict[str, Any]]:
    path = directory / f"rank-{rank}.log"
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1].splitlines()
    return [line for line in map(json.loads, whole) if line["event"] == event]


def _last_step(directory: Path) -> int:
    return min(max((line["step"] for line in _lines(directory, rank, "step")), default=0) for rank in range(NODES))


def _wait_protected(cluster: LocalCluster, step: int) -> None:
    cluster.wait_until(lambda: cluster.run_status(RUN)["protected_step"] >= step, 120, f"step {step} to be protected")


def _start_control(directory: Path) -> list[subprocess.Popen[bytes]]:
    """The same training without backstay, as far as the other can get."""
    directory.mkdir()
    port = free_port()
    argv = [
        [
            sys.executable,
            str(SCRIPT),
            _options(directory, r, port, last_step=CONTROL_STEPS, pause_s=0.0, is_attached=False),
        ]
        for r in range(NODES)
    ]
    return [subprocess.Popen(one, env=process_environment() | ENVIRONMENT) for one in argv]


def _check_bits(directory: Path, control: Path) -> None:
    for rank in range(NODES):
        expected = [(line["step"], line["digest"]) for line in _lines(control, rank, "step")]
        found = [(line["step"], line["digest"]) for line in _lines(directory, rank, "step")]
        assert found == expected[: len(found)], f"rank {rank}: each step once, and bit for bit"
        assert len(_lines(directory, rank, "restored")) == 1, "no rank ever restored again"


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
    local_cluster_factory: LocalClusterFactory, tmp_path: Path
) -> None:
    control = _start_control(tmp_path / "control")
    cluster = local_cluster_factory(NODES, 1, lease_s=15.0)  # a daemon starts in less, on a busy machine too
    directory = tmp_path / "rolled"
    directory.mkdir()
    port = free_port()
    trainers = [
        cluster.run_on_node(rank, [sys.executable, str(SCRIPT), _options(directory, rank, port)], ENVIRONMENT)
        for rank in range(NODES)
    ]
    _wait_protected(cluster, 3)
    with watched(cluster, RUN, parity=1) as watch:
        _run_documented_loop(cluster, tmp_path)
        _wait_protected(cluster, _last_step(directory) + 2)
        cluster.stop_coordinator()
        cluster.start_coordinator()
        _wait_protected(cluster, _last_step(directory) + 2)
    (directory / "stop").touch()
    assert [trainer.wait(60) for trainer in trainers] == [0] * NODES, cluster.evidence()
    _check_watch(watch)
    assert [process.wait(120) for process in control] == [0] * NODES
    _check_bits(directory, tmp_path / "control")
