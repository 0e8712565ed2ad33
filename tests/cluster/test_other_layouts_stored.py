"""Ranks of another layout whose snapshot is on durable storage alone, or whose lost shards are rebuilt while they wait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from backstay.testing import LocalCluster
from backstay.testing.fixtures import LocalClusterFactory as NewCluster
from tests.kit.light_world import Rank, Ranks, light_world
from tests.kit.storage_world import RUN, cluster_with, wait_persisted

CHUNKS = 4  # of a light rank's shard: the first holds the header, the last is short


def write(world: Ranks, cluster: LocalCluster, *, step: int) -> None:
    world.start_fresh()
    world.protect(step)


def offered(world: Ranks) -> list[dict[str, Any]]:
    offers = world.restore()
    assert all("decision_id" in offer for offer in offers), offers
    return offers


def check_everything(reader: Rank, writers: Ranks, *, step: int) -> None:
    """Fetch all, as often as the coordinator decides anew, and compare."""
    reader.send("fetch")
    answer = reader.receive()
    for _ in range(5):
        if answer.get("reason") != "decision_changed":
            break
        reader.ask("restore")
        reader.send("fetch")
        answer = reader.receive()
    for writer in writers.ranks:
        expected = writer.expected_chunks("", step, writer.rank, [[0, CHUNKS]])
        assert answer.get("digests", {}).get(str(writer.rank)) == expected, answer


def test_fewer_ranks_read_only_the_chunks_they_need_from_durable_storage(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/storage"
    (tmp_path / "storage").mkdir()
    with cluster_with(url, tmp_path) as cluster, light_world(cluster, RUN) as writers:
        write(writers, cluster, step=1)
        wait_persisted(cluster, 1)
    with cluster_with(url, tmp_path) as cluster, light_world(cluster, RUN, nodes=(0, 1)) as readers:
        for offer in offered(readers):
            assert (offer["base_world_size"], offer["kinds"]) == (3, ["persisted"] * 3), offer
            assert all(detail.startswith(url) for detail in offer["details"])
        wanted = {"0": [[0, 1]], "2": [[1, 3]]}
        for rank, runs in wanted.items():
            answer = readers.ranks[0].ask("fetch", wanted={rank: runs})
            assert answer["digests"][rank] == writers.ranks[0].expected_chunks("", 1, int(rank), runs)
        check_everything(readers.ranks[1], writers, step=1)
        for answer in readers.ask_all("staged"):
            assert (answer.get("outcome"), answer.get("step")) == ("EXACT", 1), answer
        readers.protect(2)


def test_ranks_of_another_layout_wait_for_a_lost_shard_and_get_its_chunks_where_it_is_rebuilt(
    new_cluster: NewCluster,
) -> None:
    cluster = new_cluster(5, 1, lease_s=2.0)
    with light_world(cluster, RUN) as writers, light_world(cluster, RUN, nodes=(0, 1, 2)) as readers:
        write(writers, cluster, step=1)
        readers.attach()
        cluster.destroy_node(4)  # and at once, before anybody repairs
        offers = readers.ask_all("restore")
        assert all("decision_id" in offer for offer in offers), offers
        assert {offer["kinds"][4] for offer in offers} == {"rebuild"}, "prove that it is lost when the world decides"
        for reader in readers.ranks:
            check_everything(reader, writers, step=1)
        for answer in readers.ask_all("staged"):
            assert (answer.get("outcome"), answer.get("step")) == ("EXACT", 1), answer


def test_a_lost_shard_is_rebuilt_on_an_empty_replacement_and_the_others_find_it_there(new_cluster: NewCluster) -> None:
    cluster = new_cluster(4, 1, lease_s=2.0)
    with light_world(cluster, RUN) as writers:
        write(writers, cluster, step=1)
        cluster.destroy_node(3)
        cluster.replace_node(3)
        with light_world(cluster, RUN, nodes=(0, 3)) as readers:
            for offer in offered(readers):
                if offer["kinds"][3] == "rebuild":  # else somebody else had repaired it before
                    assert offer["details"][3] == cluster.nodes[3].name, offer
            for reader in readers.ranks:
                check_everything(reader, writers, step=1)
            for answer in readers.ask_all("staged"):
                assert (answer.get("outcome"), answer.get("step")) == ("EXACT", 1), answer
