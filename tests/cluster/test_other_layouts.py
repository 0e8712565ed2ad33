"""Worlds that come back with other ranks: the daemons offer the snapshot, bring the chunks asked for, and let all go on.

Light ranks stand for trainers: what they choose is up to the test, what they get is compared byte by byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backstay.format.manifest import CHUNK_BYTES
from backstay.testing import LocalCluster
from backstay.testing.fixtures import LocalClusterFactory as NewCluster
from tests.kit.light_world import Rank, Ranks, light_world
from tests.kit.wording import says

RUN = "default/resharded"
LEASE_S = 1.0
PROBATION_STEPS = 3  # the coordinator's default
CHUNKS = 4  # of a light rank's shard: the first holds the header, the last is short


def write(cluster: LocalCluster, world: Ranks, steps: Sequence[int] = (1, 2), layout: str = "") -> None:
    """The world starts from scratch, publishes ``steps`` and ends."""
    world.start_fresh(layout=layout)
    world.protect(*steps)
    world.kill()


def offers_to(world: Ranks, *, base_size: int, layout: str = "") -> list[dict[str, Any]]:
    world.attach(layout=layout)
    offers = world.ask_all("restore")
    for offer in offers:
        assert offer.get("base_world_size") == base_size, offer
        assert offer["ranks"] == list(range(base_size))
    return offers


def check_fetched(writers: Ranks, answer: dict[str, Any], wanted: dict[str, list[list[int]]], *, step: int) -> None:
    assert "digests" in answer, answer
    for rank, runs in wanted.items():
        expected = writers.ranks[0].expected_chunks("", step, int(rank), runs)
        assert answer["digests"][rank] == expected, f"chunks {runs} of rank {rank}"


def go_on(cluster: LocalCluster, world: Ranks, *, step: int) -> None:
    """Every rank has what it needs: all are let go on together, and beyond probation the old layout is given up."""
    for answer in world.ask_all("staged"):
        assert (answer.get("outcome"), answer.get("step"), answer.get("shards")) == ("EXACT", step, {}), answer
    last = step + PROBATION_STEPS
    world.protect(*range(step + 1, last + 1))
    cluster.wait_until(
        lambda: [s["step"] for s in cluster.run_status(RUN)["snapshots"]] == [last],
        deadline_s=30,
        why="the old layout's snapshot to be released everywhere",
    )


def test_four_ranks_come_back_as_three(new_cluster: NewCluster) -> None:
    cluster = new_cluster(4, 1, lease_s=LEASE_S)
    with light_world(cluster, RUN) as writers, light_world(cluster, RUN, nodes=(0, 1, 2)) as readers:
        write(cluster, writers)
        offers_to(readers, base_size=4)
        for reader in readers.ranks:
            wanted = {str(rank): [[0, 1], [1 + reader.rank, 1]] for rank in range(4)}
            check_fetched(writers, reader.ask("fetch", wanted=wanted), wanted, step=2)
        go_on(cluster, readers, step=2)


def test_three_ranks_come_back_as_five_and_then_as_one(new_cluster: NewCluster) -> None:
    cluster = new_cluster(3, 1, lease_s=LEASE_S)
    with light_world(cluster, RUN, nodes=(0, 1, 2)) as three, light_world(cluster, RUN, nodes=(0, 1, 2, 0, 1)) as five:
        write(cluster, three)
        offers_to(five, base_size=3)
        everything = {str(rank): [[0, CHUNKS]] for rank in range(3)}
        for reader in five.ranks:
            check_fetched(three, reader.ask("fetch"), everything, step=2)
        go_on(cluster, five, step=2)
        five.kill()
        with light_world(cluster, RUN, nodes=(1,)) as one:
            (offer,) = offers_to(one, base_size=5)
            assert offer["kinds"].count("local") == 2, offer
            everything = {str(rank): [[0, CHUNKS]] for rank in range(5)}
            check_fetched(five, one.ranks[0].ask("fetch"), everything, step=5)
            go_on(cluster, one, step=5)


def test_the_same_number_of_ranks_in_another_layout_chooses_chunks(new_cluster: NewCluster) -> None:
    cluster = new_cluster(2, 1, lease_s=LEASE_S)
    with light_world(cluster, RUN) as writers, light_world(cluster, RUN) as readers:
        write(cluster, writers, layout="rows")
        offers_to(readers, base_size=2, layout="columns")
        wanted = {"0": [[0, 2]], "1": [[0, 1], [2, 2]]}
        for reader in readers.ranks:
            check_fetched(writers, reader.ask("fetch", wanted=wanted), wanted, step=2)
        for answer in readers.ask_all("staged"):
            assert (answer.get("outcome"), answer.get("step")) == ("EXACT", 2), answer
        readers.kill()
        with light_world(cluster, RUN) as same:
            same.attach(layout="rows")
            same.check_restored(same.ask_all("restore"), 2)


def test_a_node_that_is_lost_takes_no_chunk_along(new_cluster: NewCluster) -> None:
    cluster = new_cluster(4, 1, lease_s=LEASE_S)
    with light_world(cluster, RUN) as writers, light_world(cluster, RUN, nodes=(0, 1)) as readers:
        write(cluster, writers)
        lost = cluster.nodes[3].name
        cluster.destroy_node(3)
        for offer in offers_to(readers, base_size=4):
            assert lost not in "".join(offer["details"]), offer
        wanted = {str(rank): [[0, CHUNKS]] for rank in range(4)}
        for reader in readers.ranks:
            check_fetched(writers, reader.ask("fetch"), wanted, step=2)
        go_on(cluster, readers, step=2)


def test_no_chunk_crosses_the_network_twice_for_one_node(new_cluster: NewCluster) -> None:
    cluster = new_cluster(3, 1, lease_s=LEASE_S)
    with light_world(cluster, RUN) as writers, light_world(cluster, RUN, nodes=(0, 0)) as readers:
        write(cluster, writers)
        offers_to(readers, base_size=3)
        for _ in range(2):
            readers.ask_all("fetch")
        moved, needed = reshard_bytes(cluster, 0)
        remote = sum(cluster.run_status(RUN)["snapshots"][0]["shards"][rank]["size_bytes"] for rank in (1, 2))
        assert moved == needed == remote


def reshard_bytes(cluster: LocalCluster, index: int) -> tuple[int, int]:
    """(moved over the network, needed from elsewhere) on one node, as its status says."""
    (run,) = [run for run in cluster.node_status(index)["runs"] if run["run"] == RUN]
    return run["reshard"]["moved_bytes"], run["reshard"]["needed_remote_bytes"]


def fetch_again_and_again(reader: Rank) -> dict[str, Any]:
    """Fetch everything of whatever is offered, as often as the coordinator decides anew."""
    for _ in range(5):
        reader.send("fetch")
        answer = reader.receive()
        if answer.get("reason") != "decision_changed":
            return answer
        offer = reader.ask("restore")
        assert "decision_id" in offer, offer
    raise AssertionError("decided anew five times")


def test_a_corrupt_source_is_put_aside_and_the_shard_comes_from_parity(new_cluster: NewCluster) -> None:
    cluster = new_cluster(4, 1, lease_s=LEASE_S)
    with light_world(cluster, RUN) as writers, light_world(cluster, RUN, nodes=(0, 1)) as readers:
        write(cluster, writers)
        (path,) = [name for name in cluster.files(3) if "step-00000002" in name and name.endswith(".safetensors")]
        with (cluster.nodes[3].memory_dir / path).open("r+b") as file:
            file.seek(2 * CHUNK_BYTES + 77)
            file.write(b"\xff" if file.read(1) != b"\xff" else b"\x00")
        offers_to(readers, base_size=4)
        wanted = {str(rank): [[0, CHUNKS]] for rank in range(4)}
        answers = [fetch_again_and_again(reader) for reader in readers.ranks]
        for answer in [
            *answers[1:],
            fetch_again_and_again(readers.ranks[0]),
        ]:  # the first asked before it was found out
            check_fetched(writers, answer, wanted, step=2)
        assert sum(cluster.node_status(index)["corrupt_count"] for index in range(4)) >= 1
        for answer in readers.ask_all("staged"):
            assert (answer.get("outcome"), answer.get("step")) == ("EXACT", 2), answer


def test_a_daemon_killed_in_the_middle_of_a_fetch_starts_over(new_cluster: NewCluster, tmp_path: Path) -> None:
    cluster = new_cluster(3, 1, lease_s=LEASE_S)
    once = tmp_path / "killed"
    once.touch()
    with light_world(cluster, RUN) as writers, light_world(cluster, RUN, nodes=(0, 1)) as readers:
        write(cluster, writers)
        cluster.stop_daemon(0)
        cluster.restart_daemon(0, env={"BACKSTAY_FAULTS": f"mid_fetch,once={once}:killgroup"})
        offers_to(readers, base_size=3)
        once.unlink()
        assert "error" in readers.ranks[0].ask_refused("fetch"), "prove that it was broken"
        assert once.exists()
        cluster.restart_daemon(0)
        assert not [name for name in cluster.files(0) if ".sparse" in name], "what was begun is gone"
        offers_to(readers, base_size=3)
        wanted = {str(rank): [[0, CHUNKS]] for rank in range(3)}
        for reader in readers.ranks:
            check_fetched(writers, fetch_again_and_again(reader), wanted, step=2)
        go_on(cluster, readers, step=2)
        assert not [name for name in cluster.files(0) if ".sparse" in name], "nothing is left of it"


def test_a_node_without_room_for_the_chunks_says_so_with_numbers(new_cluster: NewCluster) -> None:
    cluster = new_cluster(4, 1, lease_s=LEASE_S, quota="4MiB")
    with light_world(cluster, RUN) as writers, light_world(cluster, RUN, nodes=(0,)) as one:
        write(cluster, writers)
        offers_to(one, base_size=4)
        refused = one.ranks[0].ask_refused("fetch")
        assert refused["error"] == "CapacityError", refused
        assert says("no_room_for_chunks", refused["message"], step=2, capacity=4 << 20)
        wanted = {"3": [[0, 1]]}
        check_fetched(writers, one.ranks[0].ask("fetch", wanted=wanted), wanted, step=2)


def test_a_snapshot_is_read_from_a_node_that_takes_no_part_and_nothing_is_left_behind(new_cluster: NewCluster) -> None:
    cluster = new_cluster(4, 1, lease_s=LEASE_S)
    with (
        light_world(cluster, RUN, nodes=(0, 1, 2)) as writers,
        light_world(cluster, "default/visitor", nodes=(3,)) as visitors,
    ):
        write(cluster, writers)
        visitor = visitors.ranks[0]
        refused = visitor.ask_refused("open", run="default/nobody")
        assert (refused["error"], refused["reason"]) == ("SnapshotNotFoundError", "unknown_run"), refused
        assert "step 2" in visitor.ask_refused("open", run=RUN, step=7)["message"]
        offer = visitor.ask("open", run=RUN)
        assert (offer["step"], offer["ranks"], offer["kinds"]) == (2, [0, 1, 2], ["peer"] * 3), offer
        assert offer["decision_id"].startswith("visit-")
        wanted = {"0": [[1, 2]], "2": [[0, CHUNKS]]}
        check_fetched(writers, visitor.ask("fetch", wanted=wanted), wanted, step=2)
        visitors.kill()
        known = ("owner.json", "decision.json")  # which node 3 keeps as a recorder of the run
        cluster.wait_until(
            lambda: not [name for name in cluster.files(3) if RUN in name and not name.endswith(known)],
            20, "the visit to leave nothing behind",
        )  # fmt: skip


def test_a_shard_that_must_be_rebuilt_first_is_said_to_a_visitor(new_cluster: NewCluster) -> None:
    cluster = new_cluster(4, 1, lease_s=3.0)
    with (
        light_world(cluster, RUN, nodes=(0, 1, 2)) as writers,
        light_world(cluster, "default/visitor", nodes=(3,)) as visitors,
    ):
        write(cluster, writers)
        cluster.destroy_node(2)
        reasons = []

        def is_rebuilt() -> bool:
            visitors.ranks[0].send("open", run=RUN)
            answer = visitors.ranks[0].receive()
            reasons.append(answer.get("reason", ""))
            assert answer.get("error", "") in ("", "UnavailableError"), answer
            return "error" not in answer

        cluster.wait_until(is_rebuilt, 60, "the lost shard to be rebuilt for the visitor")
        assert "must_be_rebuilt" in reasons or not any(reasons)
