"""A run is still known where its own nodes are gone: other nodes keep its decision. On real daemons."""

from __future__ import annotations

from backstay.testing.fixtures import LocalClusterFactory as NewCluster
from tests.kit.light_world import light_world
from tests.kit.wording import says

RUN = "default/recorded"
LEASE_S = 1.0


def test_a_world_on_other_nodes_is_refused_after_a_restart_of_the_coordinator_and_never_starts_from_scratch(
    new_cluster: NewCluster,
) -> None:
    cluster = new_cluster(4, 1, lease_s=LEASE_S)
    with light_world(cluster, RUN, nodes=(0, 1)) as first, light_world(cluster, RUN, nodes=(2, 3)) as second:
        first.start_fresh()
        first.protect(1)
        kept = [cluster.nodes[index].memory_dir / RUN / "decision.json" for index in (2, 3)]
        cluster.wait_until(lambda: all(path.exists() for path in kept), 10.0, "the other nodes keep the decision")
        cluster.kill_coordinator()
        cluster.destroy_nodes((0, 1))
        cluster.start_coordinator()
        answers = second.restore()
        assert {answer["error"] for answer in answers} == {"UnrecoverableError"}, answers
        assert says("last_ran_on", answers[0]["message"]), answers[0]
