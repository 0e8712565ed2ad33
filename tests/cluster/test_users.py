"""Users of one cluster: a run belongs to one of them, on every node and whichever coordinator decides."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from backstay.testing import LocalCluster
from tests.kit.light_world import Ranks, light_world

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="processes of several users are started; that takes root")
ALICE, BOB = 61001, 61002


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(4, 1, lease_s=1.0) as running:
        running.root.chmod(0o711)
        open_sockets(running)
        yield running


def open_sockets(cluster: LocalCluster) -> None:
    """What a group of all users of the cluster does elsewhere: they reach the sockets, and nothing else."""
    for node in cluster.nodes:
        node.directory.chmod(0o711)
        node.socket.chmod(0o666)


def refusal(world: Ranks) -> str:
    """What every rank of the world is told; asked until restore() or attaching is refused."""
    messages = set()
    for rank in world.ranks:
        rank.send("attach", world_id=world.world_id)
        answer = rank.receive()
        if "error" not in answer:
            rank.send("restore", deadline_s=30.0, allow_fresh=True)
            answer = rank.receive()
        assert (answer.get("error"), answer.get("reason")) == ("UsageError", "not_owner"), answer
        messages.add(answer["message"])
    assert len(messages) == 1
    return messages.pop()


def test_a_run_is_one_users_on_nodes_that_never_heard_of_it_too(cluster: LocalCluster) -> None:
    run = "default/alices"
    with light_world(cluster, run, nodes=(0, 1), uid=ALICE) as alice:
        alice.start_fresh()
        alice.protect(1)
        for node in (1, 3):  # where it trains, and where nothing of it is
            with light_world(cluster, run, nodes=(node,), uid=BOB) as bob:
                assert all(fact in refusal(bob) for fact in (run, str(ALICE), str(BOB)))
        alice.protect(2)  # no world of somebody else fenced it
        assert [s["rank"] for s in cluster.run_status(run)["sessions"]] == [0, 1]


def test_a_new_coordinator_and_restarted_daemons_know_whose_run_it_is(cluster: LocalCluster) -> None:
    run = "default/kept"
    with light_world(cluster, run, nodes=(0, 1), uid=ALICE) as alice:
        alice.start_fresh()
        alice.protect(1)
        cluster.kill_coordinator()
        with light_world(cluster, run, nodes=(2, 3), uid=BOB) as bob:
            for rank in bob.ranks:  # recorders know it without a coordinator
                assert rank.ask_refused("attach", world_id=bob.world_id)["reason"] == "not_owner"
            cluster.start_coordinator()
            assert str(ALICE) in refusal(bob)
        alice.kill()
    cluster.restart_daemon(2)
    cluster.restart_coordinator()
    cluster.wait_live()
    open_sockets(cluster)
    with light_world(cluster, run, nodes=(2,), uid=BOB) as bob:
        assert str(ALICE) in refusal(bob)
    with light_world(cluster, run, nodes=(2, 3), uid=ALICE) as alice:
        alice.restore_exactly(1)


def test_users_with_runs_of_their_own_do_not_meet(cluster: LocalCluster) -> None:
    with (
        light_world(cluster, "default/one", nodes=(0, 1), uid=ALICE) as alice,
        light_world(cluster, "default/two", nodes=(0, 1), uid=BOB) as bob,
    ):
        alice.start_fresh()
        bob.start_fresh()
        for world in (alice, bob):
            world.protect(1)


def test_of_two_users_who_begin_at_once_one_gets_the_name_and_the_other_is_told(cluster: LocalCluster) -> None:
    run = "default/race"
    with (
        light_world(cluster, run, nodes=(0,), uid=ALICE) as alice,
        light_world(cluster, run, nodes=(3,), uid=BOB) as bob,
    ):
        for world in (alice, bob):
            world.attach()
        for world in (alice, bob):
            world.ranks[0].send("restore", deadline_s=30.0)
        answers = [world.ranks[0].receive() for world in (alice, bob)]
        assert sorted(answer.get("outcome", answer.get("reason")) for answer in answers) == ["NONE", "not_owner"], (
            answers
        )
