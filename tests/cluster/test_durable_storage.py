"""Durable storage with real daemons: what is copied there, and what a cluster that lost everything gets back from it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.kit.files import flip_byte, mounted_tmpfs, remount
from tests.kit.light_world import light_world
from tests.kit.object_store import BUCKET, object_store
from tests.kit.storage_world import (
    RUN,
    cluster_with,
    dead_daemons,
    persist,
    records_in,
    storage_of,
    wait_persisted,
)
from tests.kit.wording import says

MIB = 1 << 20


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "storage"
    path.mkdir()
    return path


def test_a_cluster_that_lost_everything_goes_on_from_durable_storage(directory: Path, tmp_path: Path) -> None:
    url = f"file://{directory}"
    with cluster_with(url, tmp_path) as cluster, light_world(cluster, RUN) as world:
        world.start_fresh()
        persist(world, 1, 2)
    with cluster_with(url, tmp_path) as cluster, light_world(cluster, RUN) as world:
        answers = world.restore_exactly(2, source="persisted")
        assert {answer["attempt"] for answer in answers} == {1001}
        persist(world, 3)


def test_the_same_from_s3_by_multipart_and_conditional_writes(tmp_path: Path) -> None:
    pytest.importorskip("s3fs")
    with object_store() as store:
        with (
            cluster_with(store.url, tmp_path, env=store.environment) as cluster,
            light_world(cluster, RUN, size_bytes=20 * MIB) as world,
        ):
            world.start_fresh()
            persist(world, 1)
        assert store.listing().count("snapshot.json") == 1
        assert "<Upload>" not in store.unfinished()
        with (
            cluster_with(store.url, tmp_path, env=store.environment) as cluster,
            light_world(cluster, RUN, size_bytes=20 * MIB) as world,
        ):
            world.restore_exactly(1, source="persisted")
            assert storage_of(cluster)["url"] == f"s3://{BUCKET}/runs/{RUN}"


def test_trainers_that_are_gone_leave_their_newest_protected_step_to_be_copied(directory: Path, tmp_path: Path) -> None:
    with cluster_with(f"file://{directory}", tmp_path, every_steps=0) as cluster:
        with light_world(cluster, RUN) as world:
            world.start_fresh()
            world.protect(1)
            assert records_in(directory) == []
            world.kill()
        wait_persisted(cluster, 1)
    assert records_in(directory) == [1]


def test_a_shard_whose_node_is_lost_while_nobody_trains_is_rebuilt_and_copied_by_another(
    directory: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "died"
    fault = {"BACKSTAY_FAULTS": f"mid_upload,step=1,rank=1,once={marker}:killgroup"}
    with cluster_with(f"file://{directory}", tmp_path, every_steps=0, env=fault) as cluster:
        with light_world(cluster, RUN) as world:
            world.start_fresh()
            world.protect(1)
            world.kill()
        cluster.wait_until(marker.exists, 60, "an upload to be in its middle")
        cluster.wait_until(lambda: dead_daemons(cluster), 20, "its daemon to die")
        (dead,) = dead_daemons(cluster)
        cluster.destroy_node(dead)
        wait_persisted(cluster, 1)
    with cluster_with(f"file://{directory}", tmp_path) as cluster, light_world(cluster, RUN) as world:
        world.restore_exactly(1, source="persisted")


def test_a_corrupt_file_is_named_and_the_next_older_snapshot_is_used(directory: Path, tmp_path: Path) -> None:
    url = f"file://{directory}"
    with cluster_with(url, tmp_path) as cluster, light_world(cluster, RUN) as world:
        world.start_fresh()
        persist(world, 1, 2)
    (path,) = directory.rglob("step-00000002/rank-00001-of-*.safetensors")
    flip_byte(path)
    with cluster_with(url, tmp_path) as cluster, light_world(cluster, RUN) as world:
        answers = world.restore_exactly(1, outcome="EXACT_OLDER", source="persisted")
        assert "rank 1" in answers[0]["message"]
        assert "step-00000002" in answers[0]["message"]


def test_what_memory_lost_comes_from_storage_and_the_rest_from_memory(directory: Path, tmp_path: Path) -> None:
    with cluster_with(f"file://{directory}", tmp_path) as cluster:
        with light_world(cluster, RUN) as world:
            world.start_fresh()
            persist(world, 1)
            world.kill()
        cluster.destroy_nodes((1, 2))  # one more than parity covers
        for index in (1, 2):
            cluster.replace_node(index)
        cluster.wait_live()
        with light_world(cluster, RUN) as world:
            answers = world.restore_exactly(1)
            sources = [answer["shards"][str(rank)]["source"] for rank, answer in enumerate(answers)]
            assert sources == ["local", "persisted", "persisted"]


def test_retention_keeps_the_last_and_every_nth(directory: Path, tmp_path: Path) -> None:
    with (
        cluster_with(f"file://{directory}", tmp_path, keep_last=2, persist_keep_every=3) as cluster,
        light_world(cluster, RUN) as world,
    ):
        world.start_fresh()
        persist(world, *range(1, 7))
        names = {f"step-{step:08d}" for step in (3, 5, 6)}
        cluster.wait_until(
            lambda: {name for _, inside, _ in os.walk(directory) for name in inside if "step-" in name} == names,
            30,
            "older copies to be removed",
        )
        assert records_in(directory) == [3, 5, 6]


def test_a_full_disk_is_said_and_survived_and_the_copy_is_made_when_there_is_room(tmp_path: Path) -> None:
    with (
        mounted_tmpfs(tmp_path / "small", f"size={2 * MIB}") as disk,
        cluster_with(f"file://{disk}", tmp_path) as cluster,
        light_world(cluster, RUN) as world,
    ):
        world.start_fresh()
        world.publish(1)
        cluster.wait_until(lambda: says("storage_full", storage_of(cluster)["problem"]), 30, "the reason")
        world.protect(2)
        assert records_in(disk) == []
        remount(disk, "size=64m")
        wait_persisted(cluster, 1)
        cluster.wait_until(lambda: storage_of(cluster)["problem"] == "", 30, "the reason to be gone")


def test_a_directory_that_is_not_mounted_is_refused_for_a_new_run_with_the_next_step(tmp_path: Path) -> None:
    missing = tmp_path / "not-mounted"
    with cluster_with(f"file://{missing}", tmp_path) as cluster, light_world(cluster, RUN) as world:
        answer = world.restore()[0]
        assert answer["error"] == "UnrecoverableError"
        assert says("storage_absent", answer["message"], directory=missing)
        missing.mkdir()
    with cluster_with(f"file://{missing}", tmp_path) as cluster, light_world(cluster, RUN) as world:
        world.start_fresh()


def test_a_coordinator_that_restarts_in_the_middle_of_an_upload_ends_it(directory: Path, tmp_path: Path) -> None:
    rate = 1_500_000
    with (
        cluster_with(f"file://{directory}", tmp_path, persist_bandwidth_bytes_per_s=rate) as cluster,
        light_world(cluster, RUN, size_bytes=8 * MIB) as world,
    ):
        world.start_fresh()
        world.publish(1)
        cluster.wait_until(lambda: (storage_of(cluster)["upload"] or {}).get("done_bytes"), 30, "bytes on their way")
        cluster.restart_coordinator()
        wait_persisted(cluster, 1)
    assert records_in(directory) == [1]


def test_an_operator_sees_how_far_the_copy_is(directory: Path, tmp_path: Path) -> None:
    from backstayd.cli.snapshots import describe
    from backstayd.cli.status import describe_storage

    with (
        cluster_with(f"file://{directory}", tmp_path, persist_bandwidth_bytes_per_s=4_000_000) as cluster,
        light_world(cluster, RUN, size_bytes=8 * MIB) as world,
    ):
        world.start_fresh()
        world.publish(1)
        url = f"file://{directory}/{RUN}"
        cluster.wait_until(
            lambda: says("copy_under_way", describe_storage(storage_of(cluster)), step=1, url=url), 30, "progress"
        )
        wait_persisted(cluster, 1)
        assert says("durable_copies", describe(cluster.run_status(RUN)), url=url)


def test_what_is_written_is_private_to_the_daemons_user(directory: Path, tmp_path: Path) -> None:
    with cluster_with(f"file://{directory}", tmp_path) as cluster, light_world(cluster, RUN) as world:
        world.start_fresh()
        persist(world, 1)
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert {path.stat().st_uid for path in files} == {os.geteuid()}
    assert not list(directory.rglob("*.part"))
