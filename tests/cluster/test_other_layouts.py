"""Worlds that come back with other ranks: the daemons offer the snapshot, bring the chunks asked for, and let all go on.

Light ranks stand for trainers: what they choose is up to the test, what they get is compared byte by byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from backstay.testing import LocalCluster
from backstay.testing.fixtures import LocalClusterFactory
from tests.kit.light_world import Ranks, light_world, wait_protected

RUN = "default/resharded"
LEASE_S = 1.0
PROBATION_STEPS = 3  # the coordinator's default
CHUNKS = 5  # of a light rank's shard: header, three whole ones, a short one


def write(cluster: LocalCluster, world: Ranks, steps: Sequence[int] = (1, 2), layout: str = "") -> None:
    """The world starts from scratch, publishes ``steps`` and ends."""
    world.attach(layout=layout)
    for answer in world.ask_all("restore"):
        assert answer.get("outcome") == "NONE", answer
    for step in steps:
        world.publish(step)
    wait_protected(cluster, RUN, steps[-1])
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
    for later in range(step + 1, last + 1):
        world.publish(later)
    wait_protected(cluster, RUN, last)
    cluster.wait_until(
        lambda: [s["step"] for s in cluster.run_status(RUN)["snapshots"]] == [last],
        deadline_s=30,
        why="the old layout's snapshot to be released everywhere",
    )


def test_four_ranks_come_back_as_three(local_cluster_factory: LocalClusterFactory) -> None:
    cluster = local_cluster_factory(4, 1, lease_s=LEASE_S)
    with light_world(cluster, RUN) as writers, light_world(cluster, RUN, nodes=(0, 1, 2)) as readers:
        write(cluster, writers)
        offers_to(readers, base_size=4)
        for reader in readers.ranks:
            wanted = {str(rank): [[0, 1], [1 + reader.rank, 1]] for rank in range(4)}
            check_fetched(writers, reader.ask("fetch", wanted=wanted), wanted, step=2)
        go_on(cluster, readers, step=2)
