"""Durable storage with real daemons: what is copied there, and what a cluster that lost everything gets back from it."""

from __future__ import annotations

from pathlib import Path

from tests.kit.light_world import light_world, wait_protected
from tests.kit.storage_world import RUN, cluster_with, restore_exactly, wait_persisted


def test_a_cluster_that_lost_everything_goes_on_from_durable_storage(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/storage"
    (tmp_path / "storage").mkdir()
    with cluster_with(url, tmp_path) as cluster, light_world(cluster, RUN) as world:
        assert {answer.get("outcome") for answer in world.restore()} == {"NONE"}
        for step in (1, 2):
            world.publish(step)
            wait_protected(cluster, RUN, step)
            wait_persisted(cluster, step)
    with cluster_with(url, tmp_path) as cluster, light_world(cluster, RUN) as world:
        answers = restore_exactly(world, step=2, source="persisted")
        assert {(answer["outcome"], answer["attempt"]) for answer in answers} == {("EXACT", 2)}
        world.publish(3)
        wait_protected(cluster, RUN, 3)
        wait_persisted(cluster, 3)
