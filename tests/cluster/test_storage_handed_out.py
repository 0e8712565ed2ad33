"""Persisted files of this machine are handed to trainers as they lie: verified, never copied, never swapped under them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import backstay
from backstay.errors import IntegrityError
from backstay.restore import load
from backstay.testing import LocalCluster
from tests.kit.files import flip_byte
from tests.kit.light_world import light_world
from tests.kit.storage_world import RUN, cluster_with, dead_daemons, persist, wait_persisted
from tests.kit.wording import refuses


def shards_in_memory(cluster: LocalCluster) -> list[str]:
    found = [name for node in cluster.nodes for name in cluster.files(node.index)]
    return [name for name in found if name.endswith((".safetensors", ".part"))]


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Storage with step 1 of three ranks in it, which no memory has."""
    (tmp_path / "storage").mkdir()
    url = f"file://{tmp_path}/storage"
    with cluster_with(url, tmp_path) as cluster, light_world(cluster, RUN) as world:
        world.start_fresh()
        persist(world, 1)
    return url


def test_nothing_is_copied_and_trainers_that_die_early_restore_from_the_same_files_again(
    url: str, tmp_path: Path
) -> None:
    attempts: list[set[int]] = []
    with cluster_with(url, tmp_path) as cluster:
        for _ in range(2):
            with light_world(cluster, RUN) as world:
                answers = world.restore_exactly(1, source="persisted")
                attempts.append({answer["attempt"] for answer in answers})
                assert shards_in_memory(cluster) == []
                world.kill()
        with light_world(cluster, RUN) as world:
            world.restore_exactly(1, source="persisted")
            persist(world, 2)
            world.kill()
        with light_world(cluster, RUN) as world:
            world.restore_exactly(2, source="local")
    assert [len(of_world) for of_world in attempts] == [1, 1]
    assert max(attempts[0]) < min(attempts[1])


def test_a_daemon_that_recorded_and_restarted_opens_the_files_again_before_it_releases(
    url: str, tmp_path: Path
) -> None:
    marker = tmp_path / "died"
    fault = {"BACKSTAY_FAULTS": f"recorded_on_some,once={marker}:kill"}
    with cluster_with(url, tmp_path, coordinator_env=fault) as cluster, light_world(cluster, RUN) as world:
        world.begin_restore()
        cluster.wait_until(marker.exists, 60, "some host to have recorded the decision")
        for node in cluster.nodes:
            cluster.kill_daemon(node.index)
        world.answers()  # their daemons are gone
        cluster.restart_coordinator()
        for index in dead_daemons(cluster):
            cluster.restart_daemon(index)
        cluster.wait_live()
        answers = world.restore_exactly(1, source="persisted")  # the same world
        assert len({answer["attempt"] for answer in answers}) == 1


def test_a_file_that_becomes_a_link_is_not_opened(url: str, tmp_path: Path) -> None:
    (path,) = tmp_path.rglob("rank-00001-of-*.safetensors")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with cluster_with(url, tmp_path) as cluster, light_world(cluster, RUN) as world:
        answers = world.restore()
        assert {answer["error"] for answer in answers} == {"UnrecoverableError"}
        assert "/rank-00001-of-" in answers[0]["message"]


def test_a_file_that_changes_between_staging_and_load_fails_the_world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "storage").mkdir()
    chosen = {"nodes": 1, "parity": 0}
    model = torch.nn.Linear(300, 300)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with cluster_with(f"file://{tmp_path}/storage", tmp_path, **chosen) as cluster:  # type: ignore[arg-type]
        keeper = backstay.Snapshotter(model, optimizer, run_id="durable", socket=str(cluster.nodes[0].socket))
        try:
            keeper.restore()
            keeper.snapshot(1)
            keeper.fence()
            assert keeper.wait_committed(30.0)
            wait_persisted(cluster, 1)
        finally:
            keeper.close()
    load_prepared = load.Prepared.load

    def spoil_and_load(prepared: load.Prepared) -> load.Loaded:
        (path,) = tmp_path.rglob("rank-*.safetensors")
        flip_byte(path)
        return load_prepared(prepared)

    monkeypatch.setattr(load.Prepared, "load", spoil_and_load)
    with cluster_with(f"file://{tmp_path}/storage", tmp_path, **chosen) as cluster:  # type: ignore[arg-type]
        keeper = backstay.Snapshotter(model, optimizer, run_id="durable", socket=str(cluster.nodes[0].socket))
        try:
            with refuses((IntegrityError,), "corrupt_chunk"):
                keeper.restore()
        finally:
            keeper.close()
