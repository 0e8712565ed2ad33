"""SIGKILL of a daemon at every named point of an upload, of pruning and of a restore from durable storage.

The newest whole snapshot there is always right and always found: by a cluster that has nothing else left.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.light_world import light_world
from tests.kit.storage_world import (
    RUN,
    cluster_with,
    dead_daemons,
    persist,
    records_in,
    storage_of,
    wait_persisted,
)

# point -> where it is reached
UPLOAD_POINTS = {
    "mid_upload": "step=2,rank=1",
    "after_upload": "step=2,rank=1",
    "before_record": "step=2",
    "after_record": "step=2",
    "mid_prune": "step=1",
}
FETCH_POINTS = {"mid_fetch_persisted": "rank=1"}


def storage(tmp_path: Path) -> str:
    (tmp_path / "storage").mkdir(exist_ok=True)
    return f"file://{tmp_path}/storage"


@pytest.mark.parametrize("point", UPLOAD_POINTS)
@pytest.mark.parametrize("fate", ["restart", "destroy"])
def test_a_kill_at_this_point_of_an_upload_loses_nothing_that_was_whole(point: str, fate: str, tmp_path: Path) -> None:
    url, marker = storage(tmp_path), tmp_path / "died"
    fault = {"BACKSTAY_FAULTS": f"{point},{UPLOAD_POINTS[point]},once={marker}:killgroup"}
    with cluster_with(url, tmp_path, env=fault, keep_last=1) as cluster, light_world(cluster, RUN) as world:
        world.start_fresh()
        persist(world, 1)
        world.protect(2)
        cluster.wait_until(marker.exists, 60, f"point {point} to be reached")
        cluster.wait_until(lambda: dead_daemons(cluster), 20, f"a daemon to die at {point}")
        (dead,) = dead_daemons(cluster)
        if fate == "destroy":
            cluster.destroy_node(dead)
        else:
            cluster.restart_daemon(dead)
        wait_persisted(cluster, 2)
        assert storage_of(cluster)["snapshots"][0]["step"] == 2
    with cluster_with(url, tmp_path) as cluster, light_world(cluster, RUN) as world:
        world.restore_exactly(2, source="persisted")


@pytest.mark.parametrize("point", UPLOAD_POINTS)
def test_a_cluster_that_dies_at_this_point_finds_the_newest_whole_one(point: str, tmp_path: Path) -> None:
    url, marker = storage(tmp_path), tmp_path / "died"
    fault = {"BACKSTAY_FAULTS": f"{point},{UPLOAD_POINTS[point]},once={marker}:killgroup"}
    with cluster_with(url, tmp_path, env=fault, keep_last=1) as cluster, light_world(cluster, RUN) as world:
        world.start_fresh()
        persist(world, 1)
        world.protect(2)
        cluster.wait_until(marker.exists, 60, f"point {point} to be reached")
    with cluster_with(url, tmp_path) as cluster, light_world(cluster, RUN) as world:
        records = records_in(tmp_path / "storage")
        assert records, "a whole snapshot is always left"
        world.restore_exactly(records[-1], outcome="", source="persisted")


def test_a_kill_while_a_shard_is_fetched_from_storage_does_not_change_what_is_restored(tmp_path: Path) -> None:
    url, marker = storage(tmp_path), tmp_path / "died"
    with cluster_with(url, tmp_path) as cluster, light_world(cluster, RUN) as world:
        world.start_fresh()
        persist(world, 1)
    point = next(iter(FETCH_POINTS))
    fault = {"BACKSTAY_FAULTS": f"{point},{FETCH_POINTS[point]},once={marker}:killgroup"}
    with cluster_with(url, tmp_path, env=fault) as cluster:
        with light_world(cluster, RUN) as world:
            world.begin_restore()
            cluster.wait_until(marker.exists, 60, f"point {point} to be reached")
            cluster.wait_until(lambda: dead_daemons(cluster), 20, "a daemon to die")
            world.kill()
        for index in dead_daemons(cluster):
            cluster.restart_daemon(index)
        cluster.wait_live()
        with light_world(cluster, RUN) as world:
            world.restore_exactly(1)
