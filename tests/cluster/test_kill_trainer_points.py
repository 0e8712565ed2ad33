"""SIGKILL of a real trainer at each of its fault points: the next world restores a step whose bytes were whole.

One run walks through all of them, so that each recovery starts from the history the one before left.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from backstay.testing import LocalCluster
from backstay.testing.fixtures import LocalClusterFactory
from backstay.testing.ports import free_port
from tests.cluster.test_kill_points import TRAINER_POINTS

SCRIPT = Path(__file__).parents[1] / "kit" / "trainer_script.py"
RUN_ID = "trainer-points"
RANKS = 2


class Training:
    """The ranks of one run on nodes 0 and up, restarted after each death; what they logged is kept."""

    def __init__(self, cluster: LocalCluster, directory: Path) -> None:
        self._cluster = cluster
        self._directory = directory
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, fault: str = "") -> None:
        port = free_port()
        self.processes = []
        for rank in range(RANKS):
            options = {
                "rank": rank, "world_size": RANKS, "port": port, "run_id": RUN_ID, "last_step": 100_000, "pause_s": 0.03,
                "log": str(self._directory / f"rank-{rank}.log"), "stop": str(self._directory / "stop"), "is_attached": True,
            }  # fmt: skip
            environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "BACKSTAY_FAULTS": fault if rank else ""}
            self.processes.append(
                self._cluster.run_on_node(rank, [sys.executable, str(SCRIPT), json.dumps(options)], environment)
            )

    def lines(self, rank: int, event: str) -> list[dict[str, Any]]:
        path = self._directory / f"rank-{rank}.log"
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1].splitlines()
        return [line for line in map(json.loads, whole) if line["event"] == event]

    def wait_restored(self, count: int) -> list[dict[str, Any]]:
        self._cluster.wait_until(
            lambda: all(len(self.lines(rank, "restored")) >= count for rank in range(RANKS)), 90, f"restore {count}"
        )
        return [self.lines(rank, "restored")[count - 1] for rank in range(RANKS)]


def test_a_trainer_killed_at_any_of_its_points_comes_back_to_bytes_that_were_whole(
    local_cluster_factory: LocalClusterFactory, tmp_path: Path
) -> None:
    cluster = local_cluster_factory(RANKS, 1, lease_s=1.0)
    training = Training(cluster, tmp_path)
    training.start(_fault(0))
    assert {line["outcome"] for line in training.wait_restored(1)} == {"NONE"}
    for index, point in enumerate(TRAINER_POINTS):
        cluster.wait_until(lambda: training.processes[1].poll() is not None, 90, f"rank 1 to die at {point}")
        assert training.processes[1].returncode == -9, f"something else than {point} ended rank 1: {cluster.evidence()}"
        assert training.processes[0].wait(90) != 0, "a rank cannot go on without the other"

        training.start(_fault(index + 1))
        restored = training.wait_restored(index + 2)
        steps = {line["step"] for line in restored}
        assert len(steps) == 1, f"{point}: ranks restored different steps: {restored}"
        assert _step(index) - 4 <= max(steps) <= _step(index), f"{point} at step {_step(index)}: {restored}"
        for rank, line in enumerate(restored):
            written = {entry["step"]: entry["digest"] for entry in training.lines(rank, "step")}
            assert line["digest"] == written[line["step"]], f"{point}: rank {rank} restored other bytes: {line}"
    (tmp_path / "stop").touch()
    assert [process.wait(60) for process in training.processes] == [0] * RANKS, cluster.evidence()


def _step(index: int) -> int:
    return 10 * (index + 1)


def _fault(index: int) -> str:
    return f"{TRAINER_POINTS[index]},step={_step(index)}:kill" if index < len(TRAINER_POINTS) else ""
