"""The gate and distrust when ranks, daemons and the coordinator die in between. Ranks are light; daemons are real."""

from __future__ import annotations

import json
from typing import Any

from backstay.testing import LocalCluster
from backstay.testing.fixtures import LocalClusterFactory as NewCluster
from backstay.testing.light_rank import layout_of
from tests.kit.command import printed
from tests.kit.light_world import SIZE_BYTES, light_world, wait_protected
from tests.kit.wording import says

RUN = "default/gate"
LEASE_S = 1.5
SAID = [["identity: x", [], "same"]]


def _cluster(factory: NewCluster, **options: Any) -> LocalCluster:
    return factory(2, 1, lease_s=LEASE_S, **options)


def _train(cluster: LocalCluster, last_step: int) -> None:
    with light_world(cluster, RUN) as ranks:
        ranks.start_fresh()
        ranks.protect(*range(1, last_step + 1))


def test_two_ranks_that_go_on_with_one_random_stream_are_both_refused(new_cluster: NewCluster) -> None:
    cluster = _cluster(new_cluster)
    _train(cluster, 1)
    with light_world(cluster, RUN) as ranks:
        ranks.restore_exactly(1)
        for rank in ranks.ranks:
            rank.send("gate", entries=[*SAID, ["rng: stream 0", [rank.rank], ""]])
        answers = ranks.answers()
        assert [answer["state"] for answer in answers] == ["failed"] * 2
        assert says("gate_two_owners", answers[0]["message"], what="rng: stream 0", ranks="ranks 0 and 1")
    cluster.wait_until(
        lambda: [item["step"] for item in cluster.run_status(RUN)["distrusted"]] == [1],
        deadline_s=10,
        why="its state says that it has one stream twice",
    )


def test_a_rank_that_dies_before_it_has_spoken_does_not_leave_the_others_waiting(new_cluster: NewCluster) -> None:
    cluster = _cluster(new_cluster)
    _train(cluster, 1)
    with light_world(cluster, RUN) as ranks:
        ranks.restore_exactly(1)
        ranks.ranks[0].send("gate", entries=SAID, deadline_s=600.0)
        ranks.ranks[1].kill()
        answer = ranks.ranks[0].receive(deadline_s=60)
        assert answer["state"] == "failed"
        assert says("gate_rank_died", answer["message"], ranks="rank 1", step=1)
    assert cluster.run_status(RUN)["distrusted"] == [], "that says nothing of the snapshot"


def test_a_rank_that_never_asks_and_trains_is_not_waited_for(new_cluster: NewCluster) -> None:
    cluster = _cluster(new_cluster)
    _train(cluster, 1)
    with light_world(cluster, RUN) as ranks:
        ranks.restore_exactly(1)
        ranks.ranks[0].send("gate", entries=SAID)
        ranks.ranks[1].ask("publish", step=2)
        assert ranks.ranks[0].receive()["state"] == "passed"


def test_a_coordinator_and_a_daemon_that_die_in_the_middle_of_the_gate_end_with_the_same_verdict(
    new_cluster: NewCluster,
) -> None:
    cluster = new_cluster(2, 1, lease_s=4.0)
    _train(cluster, 1)
    with light_world(cluster, RUN) as ranks:
        ranks.restore_exactly(1)
        ranks.ranks[0].send("gate", entries=SAID)
        cluster.restart_coordinator()
        cluster.kill_daemon(1)
        cluster.restart_daemon(1)
        ranks.ranks[1].ask("attach", world_id=ranks.world_id, attempt=2)
        assert ranks.ranks[1].ask("gate", entries=SAID)["state"] == "passed"
        assert ranks.ranks[0].receive()["state"] == "passed"
        ranks.protect(2)


def test_distrust_survives_every_daemon_and_the_coordinator_until_an_operator_takes_it_back(
    new_cluster: NewCluster,
) -> None:
    cluster = _cluster(new_cluster, keep=2)
    _train(cluster, 3)
    with light_world(cluster, RUN) as ranks:
        ranks.restore_exactly(3)
        ranks.ranks[1].ask("distrust", step=4)
    files = [cluster.nodes[index].memory_dir / RUN / "distrusted.json" for index in range(2)]
    cluster.wait_until(lambda: all(file.exists() for file in files), 30, "every host to remember it")
    (noted,) = json.loads(files[0].read_text())["snapshots"]
    assert all(fact in noted["reason"] for fact in ("rank 1", "step 4", "nan"))
    cluster.kill_coordinator()
    for index in range(2):
        cluster.restart_daemon(index, is_waiting=False)
    cluster.restart_coordinator()
    cluster.wait_live()
    with light_world(cluster, RUN) as ranks:
        answers = ranks.restore_exactly(2, outcome="EXACT_OLDER")
        assert says("distrusted", answers[0]["message"], reason=noted["reason"])
        assert says("trusted", printed(cluster, "trust", RUN), run=RUN, count=1)
        cluster.wait_until(lambda: cluster.run_status(RUN)["distrusted"] == [], 30, "nobody to distrust anything")


def test_an_operator_has_an_older_step_restored_and_a_deleted_note_is_written_again(new_cluster: NewCluster) -> None:
    cluster = _cluster(new_cluster, keep=2)
    _train(cluster, 3)
    said = printed(cluster, "distrust", RUN, "3", "--reason", "jumped")
    assert says("distrusted_by_operator", said, step=3, run=RUN)
    assert says("older_step", said, step=2, newest=3)
    assert says("distrusted", said, reason="jumped")
    file = cluster.nodes[0].memory_dir / RUN / "distrusted.json"
    cluster.wait_until(file.exists, 30, "the host to remember it")
    file.unlink()
    cluster.wait_until(file.exists, 30, "the note to be written again")
    with light_world(cluster, RUN) as ranks:
        ranks.restore_exactly(2, outcome="EXACT_OLDER")


def test_a_base_on_probation_takes_a_slot_more_only_where_there_is_room_and_never_slows_the_snapshots(
    new_cluster: NewCluster,
) -> None:
    state_bytes = layout_of(0, SIZE_BYTES).size_bytes
    cluster = _cluster(new_cluster, quota=f"{9 * state_bytes // 2}")  # two slots, two parities, half a slot
    _train(cluster, 3)
    with light_world(cluster, RUN) as ranks:
        ranks.restore_exactly(3)
        skipped = 0
        for step in range(4, 12):
            answers = ranks.ask_all("publish", step=step, wait_s=1.0)
            skipped += sum("skipped" in answer for answer in answers)
            assert cluster.run_status(RUN)["interval_steps"] == 1
        wait_protected(cluster, RUN, 11)
        assert skipped, "there was no room for the base, a newer one and one being filled"
