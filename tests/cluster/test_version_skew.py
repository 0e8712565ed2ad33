"""A cluster in the middle of an upgrade: daemons, trainers and a coordinator of the release before beside those of this one."""

from __future__ import annotations

from pathlib import Path

import pytest

from backstay.testing import LocalCluster
from backstay.testing.fixtures import LocalClusterFactory as NewCluster
from backstay.testing.rolling import drain
from tests.kit.light_world import light_world
from tests.kit.older_release import check_out, environment_of

RUN = "default/skewed"


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return check_out(tmp_path_factory.mktemp("older"))


def _is_older(cluster: LocalCluster, index: int) -> bool:
    """By what a node's status document does not have yet."""
    return "is_draining" not in cluster.node_status(index)


def test_a_job_lives_through_an_upgrade_in_either_order_and_survives_losses_between_releases(
    new_cluster: NewCluster, older: Path
) -> None:
    cluster = new_cluster(4, 1, lease_s=2.0)
    env = environment_of(older)
    for index in (2, 3):
        cluster.restart_daemon(index, env)
    assert [_is_older(cluster, index) for index in range(4)] == [False, False, True, True]
    cluster.wait_live()

    # This release's coordinator, nodes and trainers of both.
    with light_world(cluster, RUN, older={1: older, 3: older}) as world:
        world.start_fresh()
        world.protect(1)
        assert "drained" in drain(cluster, 0), "to the other node of this release: the older ones cannot take copies"
        world.protect(2)
        drain(cluster, 0, undo=True)
        world.kill()
    with light_world(cluster, RUN) as world:
        world.restore_exactly(2)
        world.protect(3)
        world.kill()

    cluster.stop_coordinator()
    cluster.start_coordinator(env)  # the coordinator of the release before, nodes of both
    cluster.wait_live()
    assert "draining" not in cluster.status()["nodes"][0]
    with light_world(cluster, RUN) as world:
        world.restore_exactly(3)
        world.protect(4)
        world.kill()
    cluster.destroy_node(3)
    cluster.replace_node(3)  # what the older node held is rebuilt by nodes of both releases
    with light_world(cluster, RUN) as world:
        world.restore_exactly(4)
        world.protect(5)
        world.kill()

    cluster.stop_coordinator()
    cluster.start_coordinator()
    cluster.restart_daemon(2)  # over the files of the release before
    cluster.wait_live()
    assert not any(_is_older(cluster, index) for index in range(4))
    with light_world(cluster, RUN) as world:
        world.restore_exactly(5)
