"""Durable storage that is forbidden or vanishes, with real daemons: it is said, training goes on, copies resume."""

from __future__ import annotations

import urllib.error
from pathlib import Path

import pytest

from backstay.testing import LocalCluster
from backstayd import cli
from tests.kit.files import mounted_tmpfs, remount
from tests.kit.light_world import light_world
from tests.kit.object_store import BUCKET, object_store
from tests.kit.storage_world import RUN, cluster_with, persist, records_in, storage_of, wait_persisted
from tests.kit.wording import says


def wait_problem(cluster: LocalCluster, key: str, **facts: object) -> None:
    """The status says it, and the log of the node that could not or of the coordinator."""
    cluster.wait_until(lambda: says(key, storage_of(cluster)["problem"], **facts), 60, f"{key} in the status")
    logs = cluster.keeper.log_dir
    cluster.wait_until(
        lambda: any(says(key, path.read_text(errors="replace"), **facts) for path in logs.rglob("*.log")),
        30, f"{key} in a log",
    )  # fmt: skip


def test_storage_that_may_not_be_written_is_said_and_copied_to_once_it_may(tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "storage", "size=64m") as directory:
        remount(directory, "ro")
        with cluster_with(f"file://{directory}", tmp_path) as cluster, light_world(cluster, RUN) as world:
            world.start_fresh()
            world.publish(1)
            wait_problem(cluster, "storage_forbidden")
            world.protect(2, 3)
            assert records_in(directory) == []
            remount(directory, "rw")
            wait_persisted(cluster, 1)
            cluster.wait_until(lambda: storage_of(cluster)["problem"] == "", 60, "the reason to be gone")


def test_a_bucket_that_vanishes_is_said_and_copied_to_again_when_it_is_back(tmp_path: Path) -> None:
    pytest.importorskip("s3fs")
    with object_store() as store:
        with (
            cluster_with(store.url, tmp_path, env=store.environment) as cluster,
            light_world(cluster, RUN) as world,
        ):
            world.start_fresh()
            persist(world, 1)
            store.empty()
            with pytest.raises(urllib.error.HTTPError):
                store.listing()
            world.publish(2)
            wait_problem(cluster, "no_bucket", bucket=BUCKET)
            world.protect(3, 4)
            store.make_bucket()
            wait_persisted(cluster, 2)
            wait_persisted(cluster, 4)
        assert "snapshot.json" in store.listing(bucket=BUCKET)
        with (
            cluster_with(store.url, tmp_path, env=store.environment) as cluster,
            light_world(cluster, RUN) as world,
        ):
            world.restore_exactly(4, source="persisted")


def test_a_distrusted_step_gives_way_to_the_older_copy_on_storage(tmp_path: Path) -> None:
    directory = tmp_path / "storage"
    directory.mkdir()
    with cluster_with(f"file://{directory}", tmp_path) as cluster:
        with light_world(cluster, RUN) as world:
            world.start_fresh()
            persist(world, 1, 2)
            world.kill()
        cluster.wait_until(
            lambda: [s["step"] for s in cluster.run_status(RUN)["snapshots"]] == [2], 30, "memory to hold step 2 alone"
        )
        argv = ["distrust", RUN, "2", "--reason", "nan", "--coordinator", cluster.coordinator_address]
        assert cli.main(argv) == 0
        with light_world(cluster, RUN) as world:
            answers = world.restore_exactly(1, outcome="EXACT_OLDER", source="persisted")
            assert says("distrusted", answers[0]["message"], reason="nan")
