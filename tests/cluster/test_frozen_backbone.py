"""Training with a frozen backbone on real daemons: a node lost after many kept snapshots is rebuilt bit for bit."""

from __future__ import annotations

import http.client
import json
import sys
from pathlib import Path
from typing import Any

from backstay.testing import LocalCluster
from backstay.testing.fixtures import LocalClusterFactory
from backstay.testing.ports import free_port

SCRIPT = Path(__file__).parents[1] / "kit" / "trainer_script.py"
RUN_ID = "frozen-backbone"
RUN = f"default/{RUN_ID}"
RANKS = 3
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def _start(cluster: LocalCluster, directory: Path) -> list[Any]:
    port = free_port()
    options = {
        "world_size": RANKS,
        "port": port,
        "run_id": RUN_ID,
        "stop": str(directory / "stop"),
        "last_step": 100_000,
    }
    options |= {"pause_s": 0.1, "is_attached": True, "frozen": 60_000}  # 30 MiB for each rank
    argvs = [
        [sys.executable, str(SCRIPT), json.dumps({**options, "rank": rank, "log": str(directory / f"{rank}.log")})]
        for rank in range(RANKS)
    ]
    return [cluster.run_on_node(rank, argv, ENVIRONMENT) for rank, argv in enumerate(argvs)]


def _lines(directory: Path, rank: int, event: str) -> list[dict[str, Any]]:
    path = directory / f"{rank}.log"
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1].splitlines()
    return [line for line in map(json.loads, whole) if line["event"] == event]


def _kept_bytes(cluster: LocalCluster) -> float:
    """Parity taken over from older plans, all nodes."""
    total = 0.0
    for node in cluster.nodes:
        connection = http.client.HTTPConnection(node.host, node.http_port, timeout=5)
        connection.request("GET", "/metrics")
        for line in connection.getresponse().read().decode().splitlines():
            if line.startswith("backstay_protect_bytes_total{") and 'what="kept"' in line:
                total += float(line.rpartition(" ")[2])
        connection.close()
    return total


def test_a_node_lost_after_many_snapshots_of_a_frozen_backbone_is_rebuilt_bit_for_bit(
    local_cluster_factory: LocalClusterFactory, tmp_path: Path
) -> None:
    cluster = local_cluster_factory(RANKS, 1, lease_s=1.0)
    trainers = _start(cluster, tmp_path)
    cluster.wait_until(lambda: cluster.run_status(RUN)["protected_step"] >= 12, 120, "twelve steps to be protected")
    cluster.wait_until(lambda: _kept_bytes(cluster) > 3 * 15e6, 60, "parity to be kept")
    cluster.destroy_node(1)
    for trainer in trainers:
        assert trainer.wait(90) != 0
    cluster.replace_node(1)
    trainers = _start(cluster, tmp_path)
    cluster.wait_until(
        lambda: all(len(_lines(tmp_path, rank, "restored")) == 2 for rank in range(RANKS)), 120, "the ranks to restore"
    )
    step = _lines(tmp_path, 0, "restored")[1]["step"]
    cluster.wait_until(lambda: cluster.run_status(RUN)["protected_step"] >= step + 5, 120, "the run to go on")
    (tmp_path / "stop").touch()
    assert [trainer.wait(60) for trainer in trainers] == [0] * RANKS, cluster.evidence()
    for rank in range(RANKS):
        restored = _lines(tmp_path, rank, "restored")[1]
        assert restored["outcome"].startswith("EXACT")
        assert restored["step"] == step >= 12
        before = next(line["digest"] for line in _lines(tmp_path, rank, "step") if line["step"] == step)
        assert restored["digest"] == before
