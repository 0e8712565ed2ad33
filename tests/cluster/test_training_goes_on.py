"""A real torch training beside daemons that freeze and die: it never stops, comes back where it was, and ends bit for bit as a
run that never imported backstay.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from backstay.testing import LocalCluster
from backstay.testing.cluster import process_environment
from backstay.testing.fixtures import LocalClusterFactory
from backstay.testing.ports import free_port

SCRIPT = Path(__file__).parents[1] / "kit" / "trainer_script.py"
RUN_ID = "goes-on"
RUN = f"default/{RUN_ID}"
RANKS = 2
LEASE_S = 1.0
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def _options(directory: Path, rank: int, port: int, **changes: Any) -> str:
    options = {
        "rank": rank,
        "world_size": RANKS,
        "port": port,
        "run_id": RUN_ID,
        "log": str(directory / f"rank-{rank}.log"),
        "stop": str(directory / "stop"),
        "last_step": 100_000,
        "pause_s": 0.03,
        "is_attached": True,
    }
    return json.dumps({**options, **changes})


def _start(cluster: LocalCluster, directory: Path) -> list[subprocess.Popen[bytes]]:
    port = free_port()
    return [
        cluster.run_on_node(rank, [sys.executable, str(SCRIPT), _options(directory, rank, port)], ENVIRONMENT)
        for rank in range(RANKS)
    ]


def _lines(directory: Path, rank: int, event: str) -> list[dict[str, Any]]:
    path = directory / f"rank-{rank}.log"
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1].splitlines()
    return [line for line in map(json.loads, whole) if line["event"] == event]


def _last_step(directory: Path) -> int:
    """The newest step every rank logged."""
    return min(max((line["step"] for line in _lines(directory, rank, "step")), default=0) for rank in range(RANKS))


def _wait_step(cluster: LocalCluster, directory: Path, step: int) -> None:
    cluster.wait_until(lambda: _last_step(directory) >= step, 90, f"every rank to reach step {step}")


def _wait_protected(cluster: LocalCluster, step: int) -> None:
    cluster.wait_until(lambda: cluster.run_status(RUN)["protected_step"] >= step, 90, f"step {step} to be protected")


def _control(directory: Path, last_step: int) -> None:
    """The same training without backstay."""
    directory.mkdir()
    port = free_port()
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                str(SCRIPT),
                _options(directory, rank, port, last_step=last_step, pause_s=0.0, is_attached=False),
            ],
            env=process_environment() | ENVIRONMENT,
        )
        for rank in range(RANKS)
    ]
    assert [process.wait(120) for process in processes] == [0] * RANKS


def test_training_survives_its_daemons_and_ends_as_if_nothing_had_happened(
    local_cluster_factory: LocalClusterFactory, tmp_path: Path
) -> None:
    cluster = local_cluster_factory(RANKS, 1, lease_s=LEASE_S)
    faulted = tmp_path / "faulted"
    faulted.mkdir()
    trainers = _start(cluster, faulted)
    _wait_protected(cluster, 5)

    cluster.freeze(0)
    frozen_at = _last_step(faulted)
    _wait_step(cluster, faulted, frozen_at + 60)
    assert "T" in Path(f"/proc/{cluster.nodes[0].daemon.pid}/stat").read_text().split(")")[1], "it must still be frozen"  # type: ignore[union-attr]
    cluster.thaw(0)
    _wait_protected(cluster, _last_step(faulted) + 2)

    cluster.kill_daemon(1)
    _wait_step(cluster, faulted, _last_step(faulted) + 20)
    cluster.restart_daemon(1)
    _wait_protected(cluster, _last_step(faulted) + 2)

    trainers[1].kill()
    assert trainers[0].wait(90) != 0, "a rank cannot go on without the other"
    trainers = _start(cluster, faulted)
    cluster.wait_until(
        lambda: all(len(_lines(faulted, rank, "restored")) == 2 for rank in range(RANKS)), 90, "the ranks to restore"
    )
    _wait_step(cluster, faulted, _last_step(faulted) + 10)
    (faulted / "stop").touch()
    assert [trainer.wait(60) for trainer in trainers] == [0] * RANKS, cluster.evidence()

    _control(tmp_path / "control", _last_step(faulted))
    for rank in range(RANKS):
        expected = {line["step"]: line["digest"] for line in _lines(tmp_path / "control", rank, "step")}
        seen = [(line["step"], line["digest"]) for line in _lines(faulted, rank, "step")]
        assert len(seen) > 90
        assert [step for step, digest in seen if digest != expected[step]] == []
        first, second = _lines(faulted, rank, "restored")
        assert (first["outcome"], first["step"]) == ("NONE", 0)
        assert second["outcome"] == "EXACT"
        assert second["digest"] == expected[second["step"]]
