"""What a daemon takes beside the memory it holds, within a generous bound; ``make bench ARGS="--parts rest"`` measures it."""

from __future__ import annotations

from backstay.testing import LocalCluster
from backstay.testing.daemons import COORDINATOR
from bench.idle_cost import hold_a_run, memory_bytes

MOST_BYTES = 150 * 1024**2  # the aim is 100 MiB


def test_daemons_that_hold_a_run_take_little_beside_it() -> None:
    with LocalCluster(nodes=2, parity=1, group_size=2) as cluster:
        hold_a_run(cluster, size_bytes=8 * 1024**2)
        for name in (cluster.nodes[0].name, COORDINATOR):
            assert 0 < memory_bytes(cluster, name) < MOST_BYTES, name
