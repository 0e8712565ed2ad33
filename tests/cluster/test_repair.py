"""Redundancy comes back by itself: a job that waits for a replacement could lose another node meanwhile, and loses nothing."""

from __future__ import annotations

from backstay.testing.fixtures import LocalClusterFactory as NewCluster
from tests.kit.light_world import light_world

RUN = "default/repaired"


def test_a_lost_node_without_replacement_is_repaired_over_those_that_are_left(new_cluster: NewCluster) -> None:
    cluster = new_cluster(4, 1, lease_s=1.0)
    with light_world(cluster, RUN) as world:
        world.start_fresh()
        world.protect(1, 2)
        world.kill()
    seen = set()

    def is_protected_again() -> bool:
        status = cluster.run_status(RUN)
        seen.add(status["redundancy"].partition("(")[0].partition(" ")[0])
        holders = {name for shard in status["snapshots"][0]["shards"] for name in shard["nodes"]}
        return status["redundancy"] == "PROTECTED(1)" and not holders & destroyed

    destroyed: set[str] = set()
    for index in (3, 2):  # one after the other: with m = 1 the second is survived only because of the repair
        destroyed.add(cluster.nodes[index].name)
        cluster.destroy_node(index)
        cluster.wait_until(is_protected_again, 60, f"protection without {sorted(destroyed)}")
    assert seen & {"AT_RISK", "REBUILDING", "DEGRADED"}, f"the loss was never visible: {seen}"

    with light_world(cluster, RUN, nodes=(0, 1, 0, 1)) as again:
        again.restore_exactly(2)
