"""What a decision waits for and believes of durable storage: surveys that are slow or fail, and records that are none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from backstay.ids import SnapshotKey
from backstayd.core.inventory.survey import why_no_snapshot
from backstayd.core.messages.decisions import Lineage, Outcome
from backstayd.core.messages.durable import Unreadable
from backstayd.core.messages.plans import Quarantined
from backstayd.core.status.verdict import activity_of
from tests.unit.test_persisting import NAMES, RUN, Cluster, persisted


@pytest.mark.parametrize("allow_fresh", [False, True])
def test_an_unreachable_store_is_never_taken_for_an_empty_one(allow_fresh: bool) -> None:
    cluster = Cluster()
    cluster.is_storage_up = False
    cluster.open_world(allow_fresh=allow_fresh)
    cluster.run(rounds=30, seconds=0.2)
    assert cluster.core.runs[RUN].recovery.decision is None, "it waits first"
    cluster.run(rounds=40, seconds=0.4)
    decision = cluster.decision()
    assert decision.outcome is Outcome.REFUSED
    assert "could not be read: no answer" in decision.message


def test_an_unreachable_store_does_not_keep_memory_from_being_restored() -> None:
    cluster = Cluster()
    cluster.is_storage_up = False
    cluster.commit(2)
    cluster.open_world("w2")
    cluster.run(rounds=20, seconds=0.1)
    decision = cluster.decision()
    assert decision.base is not None
    assert decision.base.step == 2


def test_a_world_waits_for_the_survey_made_for_it() -> None:
    cluster = Cluster()
    cluster.open_world()
    for _ in range(12):
        cluster.tell(0.2)
    assert cluster.core.runs[RUN].recovery.decision is None
    surveyors = [name for name in NAMES if (s := cluster.desired(name).storage) is not None and s.survey_id]
    assert surveyors == ["n0"], "one node lists"
    cluster.answer_survey("n0")
    cluster.tell()
    assert cluster.decision().outcome is Outcome.NONE


def test_a_listing_that_takes_long_is_waited_for_while_there_is_nothing_else_to_restore() -> None:
    cluster = Cluster()
    record = persisted(3)
    cluster.storage = {record.snapshot_id: record}
    cluster.open_world()
    for _ in range(100):  # 40 leases
        cluster.tell(0.4)
    state = cluster.core.runs[RUN]
    assert state.recovery.decision is None
    assert activity_of(state) == "recovering: a node lists durable storage"
    cluster.run()
    assert cluster.decision().base is not None


def test_a_listing_that_never_ends_is_given_up_when_its_node_must_have() -> None:
    cluster = Cluster()
    cluster.open_world()
    for _ in range(160):
        cluster.tell(0.4)
    assert cluster.decision().outcome is Outcome.REFUSED
    assert "could not be read: no node has listed it yet" in cluster.decision().message


def test_another_node_lists_when_the_one_that_was_asked_is_lost() -> None:
    cluster = Cluster()
    cluster.open_world()
    cluster.set("n1", sessions=tuple(report.sessions[0] for report in cluster.reports.values()))
    cluster.set("n0", sessions=())
    for _ in range(12):
        cluster.tell(0.2)
    asked = cluster.desired("n0").storage
    assert asked is not None
    assert asked.survey_id, "it is asked first"
    cluster.absent = {"n0"}
    for _ in range(6):
        cluster.tell(0.4)
    cluster.answer_survey("n1")
    cluster.tell()
    assert cluster.decision().outcome is Outcome.NONE


def test_a_node_replaced_under_its_name_is_asked_anew_what_its_former_self_never_answered() -> None:
    cluster = Cluster()
    cluster.open_world()
    for _ in range(12):
        cluster.tell(0.2)
    asked = cluster.desired("n0").storage
    assert asked is not None
    assert asked.survey_id
    moved = tuple(replace(report, sessions=(s,)) for report in cluster.reports.values() for s in report.sessions)
    cluster.set("n1", sessions=tuple(s for report in moved for s in report.sessions))
    del cluster.reports["n0"]  # an empty machine of that name: it knows nothing of the run
    cluster.lives["n0"] += 1
    for _ in range(6):
        cluster.tell(0.2)
    cluster.answer_survey("n1")
    cluster.tell()
    assert cluster.decision().outcome is Outcome.NONE


UNREADABLE = Unreadable(attempt=1, step=5, reason="not a valid PersistedSnapshot: Expecting value")


def test_a_record_that_cannot_be_read_is_named_and_never_pruned_and_the_next_older_copy_is_restored() -> None:
    cluster = Cluster(persist_keep_last=1, probation_steps=0)
    sound = [persisted(step, serial=step) for step in (1, 4)]
    cluster.storage = {record.snapshot_id: record for record in sound}
    cluster.unreadable = (UNREADABLE, replace(UNREADABLE, step=2))
    cluster.open_world()
    cluster.run()
    decision = cluster.decision()
    assert decision.base is not None
    assert (decision.base.step, decision.outcome) == (4, Outcome.EXACT_OLDER)
    for words in ("restoring step 4, not 5", "attempt-0001/step-00000005", "Expecting value"):
        assert words in decision.message
    cluster.train_to(9)
    for _ in range(300):  # leases
        cluster.tell(1.0)
    assert cluster.prunes() == [(persisted(1).key,), ()], "nothing but what retention gives up"
    unreadable = cluster.status()["unreadable"]
    assert [(item["attempt"], item["step"]) for item in unreadable] == [(1, 5), (1, 2)]  # type: ignore[attr-defined]
    said = [event for event in cluster.core.timeline.all() if event.kind == "storage_unreadable"]
    assert "neither restored nor pruned (2 such copies)" in said[0].message


def test_a_run_of_which_only_unreadable_records_are_left_is_refused_by_name() -> None:
    cluster = Cluster()
    cluster.unreadable = (UNREADABLE,)
    cluster.open_world("w2")
    cluster.run(rounds=60)
    decision = cluster.decision()
    assert decision.outcome is Outcome.REFUSED
    for words in ("step 5: its completion record", "attempt-0001/step-00000005", "Expecting value"):
        assert words in decision.message


def test_a_record_of_a_dead_history_that_cannot_be_read_makes_nothing_older() -> None:
    cluster = Cluster()
    record = persisted(4, attempt=2, base=(1, 3))
    cluster.storage = {record.snapshot_id: record}
    cluster.unreadable = (UNREADABLE,)  # step 5 of attempt 1, which was left at step 3
    cluster.open_world()
    cluster.run()
    assert cluster.decision().outcome is Outcome.EXACT


def test_a_spoilt_snapshot_is_passed_over_for_the_next_older_one() -> None:
    cluster = Cluster()
    cluster.storage = {record.snapshot_id: record for record in (persisted(1), persisted(2))}
    cluster.open_world()
    while cluster.core.runs.get(RUN) is None or cluster.core.runs[RUN].recovery.decision is None:
        cluster.tell()
        cluster.answer_survey("n0")
        assert cluster.now_s < 20
    decision = cluster.decision()
    assert decision.base is not None
    assert decision.base.step == 2
    mark = Quarantined(
        what="shard rank 1 of step 2",
        attempt=1,
        step=2,
        rank=1,
        reason="chunk 0 has another crc",
        node=decision.base.url,
    )
    cluster.set("n1", quarantined=(mark,))
    cluster.run()
    decision = cluster.decision()
    assert decision.base is not None
    assert (decision.base.step, decision.outcome) == (1, Outcome.EXACT_OLDER)
    assert "chunk 0 has another crc" in decision.message


def test_a_record_that_contradicts_itself_is_no_snapshot() -> None:
    good = persisted(3)
    key = good.key
    assert why_no_snapshot(good, run=RUN, key=key) == ""
    assert why_no_snapshot(good, run="job/other", key=key)
    assert why_no_snapshot(good, run=RUN, key=SnapshotKey(1, 4))
    assert why_no_snapshot(replace(good, shards=good.shards[:1]), run=RUN, key=key)
    assert why_no_snapshot(replace(good, snapshot_id="0" * 64), run=RUN, key=key)
    for world_size in (1 << 62, -1, 0, 3):
        assert "2 shards of" in why_no_snapshot(replace(good, world_size=world_size), run=RUN, key=key)
    other = (replace(good.shards[0], digest="f" * 64), good.shards[1])
    assert why_no_snapshot(replace(good, shards=other), run=RUN, key=key)


def test_a_record_whose_numbers_nobody_can_calculate_with_is_no_snapshot() -> None:
    good = replace(persisted(3), owner="1000")
    assert why_no_snapshot(good, run=RUN, key=good.key) == ""
    for wrong in (
        replace(good, generation=(1 << 63) - 1),
        replace(good, generation=-1),
        replace(good, serial=1 << 70),
        replace(good, lineage=(Lineage(attempt=1 << 63, base_attempt=0, base_step=0, world_id="w"),)),
        replace(good, owner="root"),
        replace(good, owner="-1"),
        replace(good, owner="\u0661"),
        replace(good, owner=str(1 << 32)),
    ):
        assert why_no_snapshot(wrong, run=RUN, key=good.key)
