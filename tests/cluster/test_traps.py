"""The traps of the design, each a scenario on real daemons: record, break, prove it is broken, prove the promise.

Ranks are light (no torch): their bytes are known from (seed, step, rank), so every restored shard is compared with what was
written and not with what the product says of it.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from backstay.testing import LocalCluster
from backstay.testing.daemons import COORDINATOR
from backstay.testing.fixtures import LocalClusterFactory as NewCluster
from tests.kit.files import flip_byte
from tests.kit.light_world import Rank, light_world, wait_protected

RUN = "default/trap"
LEASE_S = 1.0


def _find(cluster: LocalCluster, index: int, pattern: str) -> Path:
    """The newest file of a node's memory that matches."""
    found = sorted(cluster.nodes[index].memory_dir.rglob(pattern))
    assert found, f"node {index} has no {pattern}: {list(cluster.files(index))}"
    return found[-1]


def test_a_trainer_frozen_replaced_and_thawed_cannot_touch_what_came_after_it(new_cluster: NewCluster) -> None:
    cluster = new_cluster(2, 1, lease_s=LEASE_S)
    with light_world(cluster, RUN) as old, light_world(cluster, RUN) as new, light_world(cluster, RUN) as last:
        old.start_fresh()
        old.protect(1, 2, seed="old")
        frozen = old.ranks[0]
        frozen.ask("reserve", step=3)
        frozen.ask("fill", step=3, seed="old")
        frozen.freeze()
        old.ranks[1].kill()

        new.restore_exactly(2, seed="old")
        new.protect(3, 4, seed="new")
        frozen.thaw()
        frozen.ask("scribble")  # its mapping is still there: whatever it touches must be nobody's
        refused = frozen.ask_refused("commit", step=3)
        assert refused["error"] in ("StaleGenerationError", "ConnectionError", "BrokenPipeError", "UsageError"), refused
        assert frozen.ask_refused("reserve", step=5)["error"] != "AssertionError"
        frozen.kill()
        new.kill()

        last.restore_exactly(4, seed="new")


def test_a_forked_worker_that_outlives_its_trainer_does_not_keep_its_session_alive(new_cluster: NewCluster) -> None:
    cluster = new_cluster(2, 1, lease_s=LEASE_S)
    with light_world(cluster, RUN) as first, light_world(cluster, RUN) as second:
        first.start_fresh()
        first.protect(1, 2)
        child = first.ranks[0].ask("fork")["pid"]
        first.kill()
        assert Path(f"/proc/{child}").exists(), "the worker must outlive the trainer, or this proves nothing"

        second.restore_exactly(2)
        second.protect(3, 4)
        assert Path(f"/proc/{child}").exists()


def test_trainers_and_coordinator_restarting_together_never_begin_at_nothing(new_cluster: NewCluster) -> None:
    cluster = new_cluster(3, 1, lease_s=LEASE_S)
    with light_world(cluster, RUN) as first, light_world(cluster, RUN) as second:
        first.start_fresh()
        first.protect(1, 2, 3)
        cluster.kill_coordinator()
        first.kill()
        second.begin_restore()
        assert not second.ranks[0].has_answered(LEASE_S), "nobody is there to decide, so nothing may be answered"
        cluster.start_coordinator()

        second.check_restored(second.answers(), 3)


def test_a_rank_that_asks_late_after_another_loss_gets_the_step_the_others_get(new_cluster: NewCluster) -> None:
    cluster = new_cluster(4, 1, lease_s=LEASE_S)
    with light_world(cluster, RUN) as first, light_world(cluster, RUN, nodes=(0, 1, 2, 0)) as second:
        first.start_fresh()
        first.protect(1, 2)
        first.kill()
        second.attach()
        for rank in second.ranks[:3]:
            rank.send("restore")
        assert not second.ranks[0].has_answered(LEASE_S), "one rank is missing, so nothing may be decided"
        cluster.destroy_node(3)
        second.ranks[3].send("restore")

        second.check_restored(second.answers(), 2)


def test_two_jobs_at_once_do_not_see_each_other(new_cluster: NewCluster) -> None:
    cluster = new_cluster(2, 1, lease_s=LEASE_S)
    one, two = "one/same-name", "two/same-name"
    with light_world(cluster, one) as first, light_world(cluster, two) as other:
        first.start_fresh()
        other.start_fresh()
        first.protect(1, 2, seed="one")
        other.protect(1, 2, 3, 4, 5, seed="two")
        first.kill()
        with light_world(cluster, one) as again:
            again.restore_exactly(2, seed="one")
            again.ask_all("finish")
        cluster.wait_until(
            lambda: not any(name.startswith("one/") for index in (0, 1) for name in cluster.files(index)),
            30,
            "the finished job's memory to be freed",
        )
        other.protect(6, 7, seed="two")
        other.kill()
        with light_world(cluster, two) as again:
            again.restore_exactly(7, seed="two")


@pytest.mark.parametrize("what", ["shard", "manifest", "parity"])
def test_a_flipped_byte_is_detected_counted_and_survived(new_cluster: NewCluster, what: str) -> None:
    # A node that is away for a lease has its shard rebuilt and its plan replaced: what was flipped would be read by nobody.
    cluster = new_cluster(4, 2, lease_s=4 * LEASE_S)
    with light_world(cluster, RUN) as first:
        first.start_fresh()
        first.protect(1, 2)
        first.kill()
        if what == "parity":  # it is read only when a shard is to be rebuilt
            for path in cluster.nodes[1].memory_dir.rglob("parity/plan-*.index-*"):
                if path.suffix != ".json":
                    flip_byte(path, 1000)
            cluster.destroy_node(0)
            cluster.replace_node(0)
        else:  # it is read when it is adopted
            cluster.kill_daemon(1)
            if what == "shard":
                flip_byte(_find(cluster, 1, "rank-00001-of-*.safetensors"), 256 * 1024 + 77)
            else:
                path = _find(cluster, 1, "rank-00001-of-*.manifest.json")
                flip_byte(path, path.read_bytes().index(b'"chunk_crcs":"') + 20)
            cluster.restart_daemon(1)
        with light_world(cluster, RUN) as second:
            second.restore_exactly(2)
        nodes = {node["name"]: node for node in cluster.status()["nodes"]}
        if what != "manifest":  # a manifest that is none is no commit record: the shard was never adopted
            assert nodes["node-1"]["corrupt_count"] >= 1, nodes
            assert cluster.run_status(RUN)["quarantined"], "the bad source must be named in the status"


def test_a_late_write_into_a_committed_slot_never_reaches_a_tensor(new_cluster: NewCluster) -> None:
    cluster = new_cluster(3, 1, lease_s=LEASE_S)
    with light_world(cluster, RUN) as first, light_world(cluster, RUN) as second:
        first.start_fresh()
        first.protect(1, 2)
        slot = first.ranks[1].ask("reserve", step=3)["slot_id"]
        committed = next(name for name in first.ranks[1].ask("slots")["slot_ids"] if name != slot)
        first.ranks[1].ask("scribble", slot_id=committed)
        first.kill()

        second.restore_exactly(2)


def test_a_name_that_is_no_run_and_a_protocol_from_before_are_refused_by_name(new_cluster: NewCluster) -> None:
    cluster = new_cluster(1, 0, lease_s=LEASE_S)
    with light_world(cluster, "default/../../etc") as bad, light_world(cluster, RUN) as good:
        refused = bad.ranks[0].ask_refused("attach", world_id=bad.world_id)
        assert refused["error"] == "UsageError", refused
        assert "etc" in refused["message"]
        refused = good.ranks[0].ask_refused("attach", world_id=good.world_id, protocol=99)
        assert "99" in refused["message"], refused


def test_more_losses_than_parity_are_refused_with_what_is_missing_and_never_guessed(new_cluster: NewCluster) -> None:
    cluster = new_cluster(4, 1, lease_s=LEASE_S)
    with light_world(cluster, RUN) as first:
        first.start_fresh()
        first.protect(1, 2, 3)
        first.kill()
    cluster.destroy_nodes([1, 2])
    cluster.replace_node(1)
    cluster.replace_node(2)
    cluster.wait_live()
    with light_world(cluster, RUN) as second:
        for answer in second.restore():
            assert answer.get("error") == "UnrecoverableError", answer
            assert "rank" in answer["message"], answer
            assert "3" in answer["message"], answer
    with light_world(cluster, RUN) as third:
        for answer in third.restore(allow_fresh=True):
            assert (answer.get("outcome"), answer.get("step")) == ("NONE", 0), answer
            assert answer["attempt"] >= 2, "a fresh start is another history"


def test_a_daemon_that_is_killed_and_restarted_adopts_what_is_in_memory(new_cluster: NewCluster) -> None:
    cluster = new_cluster(3, 1, lease_s=LEASE_S)
    with light_world(cluster, RUN) as first, light_world(cluster, RUN) as second:
        first.start_fresh()
        first.protect(1, 2, 3)
        first.kill()
        for index in range(3):
            cluster.kill_daemon(index)
        for index in range(3):
            cluster.restart_daemon(index)
        second.restore_exactly(3, source="local")


def test_a_coordinator_that_was_frozen_itself_takes_no_node_for_lost(new_cluster: NewCluster) -> None:
    cluster = new_cluster(3, 1, lease_s=LEASE_S)
    with light_world(cluster, RUN) as ranks:
        ranks.start_fresh()
        ranks.protect(1, 2)
        for step in (3, 4):
            cluster.freeze(COORDINATOR)
            time.sleep(3 * LEASE_S)
            cluster.thaw(COORDINATOR)
            ranks.protect(step)
            time.sleep(LEASE_S)
        kinds = [event["kind"] for event in cluster.status()["timeline"]]
        assert not {"node_lost", "session_lost", "repairing", "rebuilding"} & set(kinds), cluster.evidence()

        cluster.kill_daemon(2)
        cluster.wait_until(lambda: _liveness(cluster, "node-2") == "lost", 30, "a daemon that is gone to be missed")
        assert {_liveness(cluster, name) for name in ("node-0", "node-1")} == {"live"}


def _liveness(cluster: LocalCluster, name: str) -> str:
    return str(next(node["state"] for node in cluster.status()["nodes"] if node["name"] == name))


def test_a_node_of_an_old_history_that_comes_back_cannot_bring_its_steps_along(new_cluster: NewCluster) -> None:
    cluster = new_cluster(4, 1, lease_s=LEASE_S)
    with light_world(cluster, RUN, nodes=(0, 1, 2)) as old, light_world(cluster, RUN, nodes=(0, 3, 2)) as new:
        old.start_fresh()
        old.protect(1, 2, 3, seed="old")
        for rank in old.ranks[:2]:
            assert "digest" in rank.ask("publish", step=4, seed="old")
        old.kill()
        cluster.kill_daemon(1)
        new.restore_exactly(3, seed="old")
        new.protect(4, 5, seed="new")
        cluster.restart_daemon(1)
        cluster.wait_live()
        new.kill()
        with light_world(cluster, RUN, nodes=(0, 1, 2)) as last:
            last.restore_exactly(5, seed="new")


def test_ranks_whose_slots_come_free_with_jitter_still_complete_snapshots(new_cluster: NewCluster) -> None:
    cluster = new_cluster(3, 1, lease_s=LEASE_S)
    chance = random.Random(7)
    with light_world(cluster, RUN) as world:
        world.start_fresh()
        committed = []
        for step in range(1, 31):
            ranks: list[Rank] = chance.sample(world.ranks, len(world.ranks))
            answers = []
            for rank in ranks:  # one after another, the pause between them now short, now long; nobody waits for a slot
                rank.has_answered(chance.choice((0.0, 0.0, 0.1)))
                answers.append(rank.ask("publish", step=step, wait_s=0.0))
            if all("digest" in answer for answer in answers):
                committed.append(step)
        assert len(committed) >= 3, f"all ranks committed only steps {committed}: each skips what the others take"
        wait_protected(cluster, RUN, committed[-1])
