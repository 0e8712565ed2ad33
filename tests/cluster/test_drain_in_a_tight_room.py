"""A node that was called safe is stopped a moment later, though the next snapshot found no room on the other nodes."""

from __future__ import annotations

from backstay.testing.fixtures import LocalClusterFactory as NewCluster
from backstay.testing.rolling import drain
from tests.kit.light_world import light_world
from tests.kit.wording import says

RUN = "default/tight"
SIZE_BYTES = 6 << 20
QUOTA_BYTES = 33 * SIZE_BYTES // 10  # two slots, parity, and room for one copy of another node's shard


def test_who_is_told_that_a_node_is_safe_loses_nothing_below_what_made_it_so(new_cluster: NewCluster) -> None:
    cluster = new_cluster(4, 1, lease_s=2.0, quota=str(QUOTA_BYTES))
    with light_world(cluster, RUN, size_bytes=SIZE_BYTES) as world:
        world.start_fresh()
        world.publish(1)
        world.protect(2)
        assert "node-1: drained" in drain(cluster, 1)
        world.protect(3)

        def is_taken_back() -> bool:
            node = next(node for node in cluster.status()["nodes"] if node["name"] == "node-1")
            return node["draining"] == "draining" and says("no_room_to_drain", node["drain_reason"])

        cluster.wait_until(is_taken_back, 20, "the coordinator to find no room for step 3")
        assert [entry["step"] for entry in cluster.run_status(RUN)["snapshots"] if entry["spares"] >= 0] == [3, 2]
        world.kill()
    cluster.destroy_node(1)
    cluster.destroy_node(3)  # step 3 survives one of the two, step 2 both: the first was promised to be no loss
    for index in (1, 3):
        cluster.replace_node(index)
    with light_world(cluster, RUN, size_bytes=SIZE_BYTES) as again:
        again.restore_exactly(2, outcome="EXACT_OLDER")
