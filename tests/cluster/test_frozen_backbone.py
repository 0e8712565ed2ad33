"""Training with a frozen backbone on real daemons: a node lost after many kept snapshots is rebuilt bit for bit."""

from __future__ import annotations

import http.client
from pathlib import Path

from backstay.testing import LocalCluster
from backstay.testing.fixtures import LocalClusterFactory as NewCluster
from tests.kit.training import Training

RANKS = 3


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
    new_cluster: NewCluster, tmp_path: Path
) -> None:
    cluster = new_cluster(RANKS, 1, lease_s=1.0)
    training = Training(cluster, tmp_path, ranks=RANKS, pause_s=0.1, frozen=60_000)  # 30 MiB for each rank
    training.start()
    training.wait_protected(12)
    cluster.wait_until(lambda: _kept_bytes(cluster) > 3 * 15e6, 60, "parity to be kept")
    cluster.destroy_node(1)
    assert all(process.wait(90) != 0 for process in training.processes)
    cluster.replace_node(1)
    training.start()
    again = training.wait_restored(2)
    step = again[0]["step"]
    training.wait_protected(step + 5)
    training.stop()
    for rank, restored in enumerate(again):
        assert restored["outcome"].startswith("EXACT")
        assert restored["step"] == step >= 12
        assert restored["digest"] == next(digest for at, digest in training.steps(rank) if at == step)
