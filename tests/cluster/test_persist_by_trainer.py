"""A durable copy that the trainer asks for, in its code or because its job is told to stop: real torch, real daemons."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backstay.testing import LocalCluster
from backstay.testing.ports import free_port
from tests.kit.storage_world import RUN, cluster_with, records_in, storage_of

SCRIPT = Path(__file__).parents[1] / "kit" / "trainer_script.py"
RANKS = 2
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "storage"
    path.mkdir()
    return path


@pytest.fixture
def cluster(directory: Path, tmp_path: Path) -> Iterator[LocalCluster]:
    """Copies are made on demand only."""
    with cluster_with(f"file://{directory}", tmp_path, nodes=RANKS, every_steps=0) as cluster:
        yield cluster


def start(cluster: LocalCluster, directory: Path, **changes: Any) -> list[subprocess.Popen[bytes]]:
    """Changes may be one for each rank: a list."""
    port, processes = free_port(), []
    for rank in range(RANKS):
        options = {
            "rank": rank, "world_size": RANKS, "port": port, "run_id": RUN.split("/")[1], "is_attached": True,
            "log": str(directory / f"rank-{rank}.log"), "stop": str(directory / "stop"), "last_step": 100_000,
            "pause_s": 0.05,
        }  # fmt: skip
        options |= {name: value[rank] if isinstance(value, list) else value for name, value in changes.items()}
        argv = [sys.executable, str(SCRIPT), json.dumps(options)]
        processes.append(cluster.run_on_node(rank, argv, ENVIRONMENT))
    return processes


def protected(cluster: LocalCluster) -> int:
    return int(cluster.run_status(RUN)["protected_step"])


def wait_protected(cluster: LocalCluster, step: int) -> int:
    def at_least() -> int:
        return protected(cluster) if protected(cluster) >= step else 0

    return cluster.wait_until(at_least, 120, f"step {step} to be protected")


def wait_stored(cluster: LocalCluster, step: int) -> None:
    cluster.wait_until(lambda: storage_of(cluster)["step"] >= step, 60, f"step {step} to be on durable storage")


def test_persist_has_the_newest_protected_snapshot_copied_while_training_goes_on(
    cluster: LocalCluster, directory: Path, tmp_path: Path
) -> None:
    ask = tmp_path / "ask"
    processes = start(cluster, tmp_path, persist=[str(ask), ""])
    step = wait_protected(cluster, 2)
    assert records_in(directory) == []
    ask.touch()
    wait_stored(cluster, step)
    assert [process.poll() for process in processes] == [None, None]
    wait_protected(cluster, storage_of(cluster)["step"] + 2)
    assert len(records_in(directory)) == 1, "one wish, one copy"


def test_sigterm_asks_for_a_copy_and_what_the_signal_did_before_still_happens(
    cluster: LocalCluster, directory: Path, tmp_path: Path
) -> None:
    note = tmp_path / "handled"
    processes = start(cluster, tmp_path, sigterm=[str(note), "default"])
    step = wait_protected(cluster, 2)
    processes[0].send_signal(signal.SIGTERM)
    cluster.wait_until(note.exists, 20, "the handler that was there before to run")
    wait_stored(cluster, step)
    assert [process.poll() for process in processes] == [None, None], "that handler lets it train on"
    first = storage_of(cluster)["step"]
    wait_protected(cluster, first + 1)

    processes[1].send_signal(signal.SIGTERM)
    assert processes[1].wait(30) == -signal.SIGTERM, "nothing was there before: it ends as it would have"
    processes[0].kill()
    wait_stored(cluster, first + 1)
    left = protected(cluster)
    cluster.wait_until(lambda: max(records_in(directory)) >= left, 60, "the newest protected step to be copied")
