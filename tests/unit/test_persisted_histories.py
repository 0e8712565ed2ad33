"""Histories of a run on durable storage: distrusted copies, and old nodes that come back after the cluster was lost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from backstay.errors import SnapshotNotFoundError
from backstay.ids import Generation, SnapshotKey
from backstayd.core.messages.decisions import Distrusted, Lineage, Outcome, Placement, SourceKind
from backstayd.core.messages.durable import UploadState
from backstayd.core.messages.report import NodeIdentity, NodeReport, RunReport
from backstayd.core.protect.durable_uploads import RECORD_RANK
from backstayd.core.recover.numbering import LEAP_ATTEMPTS
from tests.unit.test_persisting import NAMES, RUN, Cluster, persist_all, persisted, shard, training


def test_a_distrusted_copy_is_no_substitute_for_a_sound_older_one() -> None:
    cluster = Cluster(persist_keep_last=1)
    found = [persisted(step, serial=step) for step in (1, 2, 3)]
    cluster.storage = {record.snapshot_id: record for record in found}
    bad = Distrusted(snapshot_id=found[1].snapshot_id, attempt=1, step=2, reason="nan")
    cluster.set("n0", distrusted=(bad,))
    cluster.open_world()
    cluster.run()
    decision = cluster.decision()
    assert decision.base is not None
    assert (decision.base.step, decision.outcome) == (1, Outcome.EXACT_OLDER), "3 was trained from 2"
    cluster.train_to(4)
    assert cluster.prunes() == [(), ()], "of 2 and 3 nothing may be restored: 1 stays, though it is the oldest"


def test_distrust_during_probation_finds_the_older_copy_still_there() -> None:
    cluster = Cluster(persist_keep_last=1)
    cluster.storage = {record.snapshot_id: record for record in (persisted(1, serial=1), persisted(2, serial=2))}
    cluster.open_world()
    cluster.run()
    base = cluster.decision().base
    assert base is not None
    assert base.step == 2
    cluster.set("n1", distrusted=(Distrusted(snapshot_id=base.snapshot_id, attempt=1, step=2, reason="nan"),))
    for name in NAMES:
        cluster.set(name, shards=(), sessions=(), staging=None)
    cluster.open_world("w2")
    cluster.run()
    decision = cluster.decision()
    assert decision.base is not None
    assert (decision.world_id, decision.base.step) == ("w2", 1)
    assert {source.kind for source in decision.sources} == {SourceKind.PERSISTED}


def test_an_operator_distrusts_a_step_that_lies_on_storage_alone() -> None:
    cluster = Cluster()
    found = [persisted(step, serial=step) for step in (1, 2)]
    cluster.storage = {record.snapshot_id: record for record in found}
    cluster.open_world()
    cluster.run()
    assert cluster.core.distrust(RUN, 2, "the loss is off") != ""
    for name in NAMES:
        cluster.set(name, sessions=(), staging=None)
    cluster.open_world("w2")
    cluster.run()
    base = cluster.decision().base
    assert base is not None
    assert base.step == 1
    with pytest.raises(SnapshotNotFoundError, match="no snapshot of step 7; there are steps 1"):
        cluster.core.distrust(RUN, 7, "")


@pytest.mark.parametrize("generation", [0, 700])
def test_a_node_of_the_lost_cluster_that_comes_back_with_a_newer_decision_does_not_take_over(generation: int) -> None:
    """It had recovered often since its last durable copy: its generation and attempt are above everything on storage."""
    cluster = Cluster(probation_steps=0)
    record = replace(persisted(4), generation=generation)
    cluster.storage = {record.snapshot_id: record}
    cluster.open_world()
    cluster.run()
    decision = cluster.decision()
    cluster.commit(5, attempt=decision.attempt)
    cluster.train_to(5)
    old = replace(
        decision,
        decision_id="old",
        generation=Generation(generation + 900, "the coordinator of then"),
        world_id="old",
        attempt=9,
        lineage=(Lineage(attempt=9, base_attempt=1, base_step=4), Lineage(attempt=1, base_attempt=0, base_step=0)),
        placements=(Placement(rank=0, node="n2"), Placement(rank=1, node="n3")),
    )
    cluster.visitor = NodeReport(
        node=NodeIdentity(name="n2", incarnation="inc-n2", bulk_address="n2:1"),
        sequence=1,
        generation=old.generation,
        runs=(RunReport(run=RUN, decision=old, shards=(replace(shard(8, 0, attempt=9), world_id="old"),)),),
    )
    cluster.run(rounds=20, seconds=0.2)
    assert cluster.core.runs[RUN].head == decision
    assert cluster.decision() == decision, "the world that trains goes on under its own"
    for name in NAMES:
        cluster.set(name, sessions=(), staging=None)
    cluster.open_world("newer")
    cluster.run()
    base = cluster.decision().base
    assert base is not None
    assert (base.attempt, base.step) == (decision.attempt, 5), "nothing newer was lost, nothing older restored"


def test_a_run_that_another_cluster_has_overtaken_on_storage_leaves_it_alone_and_says_so() -> None:
    cluster = training(persist_keep_last=1, probation_steps=0)
    for step in (1, 2):
        cluster.commit(step)
        cluster.tell()
        persist_all(cluster)
    assert cluster.prunes() == [(SnapshotKey(1, 1),), ()]
    theirs = persisted(3, attempt=1001, base=(1, 2))
    cluster.storage[theirs.snapshot_id] = theirs
    cluster.commit(3)
    cluster.tell()
    for name, ranks in cluster.tasks().items():
        for rank in ranks:
            cluster.upload(name, rank)
    cluster.tell()
    for _ in NAMES:
        for name in cluster.writers():
            cluster.upload(name, RECORD_RANK, UploadState.FAILED, "attempt 1001 is of a newer history")
        cluster.tell()
    for name in NAMES:
        cluster.answer_survey(name)  # it is looked at again, because the record could not be written
    cluster.tell()
    cluster.commit(4)
    for _ in range(30):
        cluster.tell(1.0)
    assert (cluster.tasks(), cluster.prunes()) == ({}, [(), ()])
    assert "attempt 1001 in file:///storage/job/run is newer than attempt 1 of this run" in str(
        cluster.status()["problem"]
    )
    for name in NAMES:
        cluster.set(name, sessions=(), staging=None, shards=(), uploads=())
    cluster.open_world("w2")
    cluster.run()
    decision = cluster.decision()
    assert decision.base is not None
    assert (decision.base.attempt, decision.attempt > 1001) == (1001, True), "restarted, it goes on above the other"
    for rank, name in enumerate(NAMES):
        cluster.set(name, shards=(replace(shard(5, rank, decision.attempt), world_id="w2"),))
    cluster.tell()
    persist_all(cluster)
    assert cluster.status()["step"] == 5
    assert cluster.status()["problem"] == ""


def test_partial_copies_count_for_the_number_of_the_next_attempt() -> None:
    cluster = Cluster()
    cluster.partial = (SnapshotKey(7, 3),)
    cluster.open_world(allow_fresh=True)
    cluster.run()
    assert cluster.decision().outcome is Outcome.NONE
    assert cluster.decision().attempt == 7 + LEAP_ATTEMPTS, "its directories hold no shards of another history"


@pytest.mark.parametrize("where", ["memory", "storage"])
def test_complaint_11_what_was_saved_in_part_is_reason_enough_not_to_start_from_scratch(where: str) -> None:
    cluster = Cluster()
    if where == "memory":
        cluster.set("n0", shards=(shard(3, 0),))  # of two ranks
    else:
        cluster.partial = (SnapshotKey(1, 3),)
    cluster.open_world("w2")
    cluster.run(rounds=60)
    decision = cluster.decision()
    assert decision.outcome is Outcome.REFUSED
    assert "cannot restore" in decision.message


def test_complaint_14_the_newest_step_is_that_of_the_record_and_a_copy_in_part_is_never_chosen() -> None:
    cluster = Cluster()
    whole = persisted(4)
    cluster.storage = {whole.snapshot_id: whole}
    cluster.partial = (SnapshotKey(1, 9),)
    cluster.open_world()
    cluster.run()
    base = cluster.decision().base
    assert base is not None
    assert base.step == cluster.status()["step"] == 4
