"""Which snapshot is copied to durable storage, by whom, when it counts, and what retention gives up."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backstay.ids import SnapshotKey, snapshot_id
from backstayd.core.coordinator import Coordinator
from backstayd.core.inventory.lineage import is_live
from backstayd.core.inventory.survey import view_of_record
from backstayd.core.messages.decisions import (
    Decision,
    DecisionPhase,
    Lineage,
    Outcome,
    SourceKind,
    Staging,
    StagingState,
)
from backstayd.core.messages.desired import RunDesired
from backstayd.core.messages.durable import PersistedSnapshot, Survey, Unreadable, Upload, UploadState
from backstayd.core.messages.plans import ShardRecord, VolumeShard
from backstayd.core.messages.report import NodeIdentity, NodeReport, RunReport, SessionPhase, SessionRecord, SkipCause
from backstayd.core.policy import CorePolicy
from backstayd.core.protect.durable_upkeep import prunable
from backstayd.core.protect.durable_uploads import RECORD_RANK
from backstayd.core.recover.numbering import LEAP_ATTEMPTS

RUN = "job/run"
URL = "file:///storage"
RUN_URL = f"{URL}/{RUN}"
LEASE_S = 1.0
NAMES = ("n0", "n1")


def digest(step: int, rank: int, attempt: int = 1) -> str:
    return f"{attempt:04x}{step:04x}{rank:04x}".ljust(64, "a")


def shard(step: int, rank: int, attempt: int = 1) -> ShardRecord:
    return ShardRecord(
        attempt=attempt, step=step, rank=rank, world_size=2, size_bytes=1000, digest=digest(step, rank, attempt),
        world_id="w",
    )  # fmt: skip


def persisted(step: int, *, attempt: int = 1, serial: int = 0, base: tuple[int, int] = (0, 0)) -> PersistedSnapshot:
    digests = [digest(step, rank, attempt) for rank in range(2)]
    key = SnapshotKey(attempt, step)
    lineage = [Lineage(attempt=attempt, base_attempt=base[0], base_step=base[1])]
    if base[0]:
        lineage.append(Lineage(attempt=base[0], base_attempt=0, base_step=0))
    return PersistedSnapshot(
        run=RUN, attempt=attempt, step=step, world_size=2, serial=serial, lineage=tuple(lineage),
        snapshot_id=snapshot_id(key=key, world_size=2, shard_digests=digests),
        shards=tuple(VolumeShard(rank=rank, size_bytes=1000, digest=d) for rank, d in enumerate(digests)),
    )  # fmt: skip


class Cluster:
    """Two nodes with one rank each, as the coordinator hears them; parity off, so that complete is protected."""

    def __init__(self, **policy: object) -> None:
        chosen = {"parity": 0, "lease_s": LEASE_S, "persist_url": URL, "persist_every_steps": 1} | policy
        self.core = Coordinator(CorePolicy(**chosen), "coordinator", now_s=0.0)  # type: ignore[arg-type]
        self.now_s = 0.0
        self.sequence = 0
        self.reports = {name: RunReport(run=RUN) for name in NAMES}
        self.absent: set[str] = set()
        self.storage: dict[str, PersistedSnapshot] = {}
        self.is_storage_up = True
        self.is_alive = True
        self.visitor: NodeReport | None = None
        self.partial: tuple[SnapshotKey, ...] = ()
        self.unreadable: tuple[Unreadable, ...] = ()
        self.lives = dict.fromkeys(NAMES, 0)

    def desired(self, name: str) -> RunDesired:
        return next((run for run in self.core.desired(name).runs if run.run == RUN), RunDesired(run=RUN))

    def set(self, name: str, **fields: object) -> None:
        self.reports[name] = replace(self.reports[name], **fields)  # type: ignore[arg-type]

    def tell(self, seconds: float = 0.1) -> None:
        """Every present node reports; the coordinator evaluates."""
        self.now_s += seconds
        self.sequence += 1
        for name in NAMES:
            if name in self.absent:
                continue
            identity = NodeIdentity(name=name, incarnation=f"inc-{name}-{self.lives[name]}", bulk_address=f"{name}:1")
            report = NodeReport(
                node=identity, sequence=self.sequence, generation=self.core.generation, runs=self._runs(name)
            )
            self.core.observe(report, self.now_s)
        if self.visitor is not None:
            self._hear_visitor(self.visitor)
        self.core.tick(self.now_s)
        self.core.evaluate()
        self.core.check_invariants()

    def _runs(self, name: str) -> tuple[RunReport, ...]:
        return (self.reports[name],) if name in self.reports else ()

    def _hear_visitor(self, visitor: NodeReport) -> None:
        self.core.observe(replace(visitor, sequence=self.sequence), self.now_s)
        generation = self.core.desired(visitor.node.name).generation
        if visitor.generation.admits(generation):
            self.visitor = replace(visitor, generation=generation)

    def answer_survey(self, name: str) -> None:
        wanted = self.desired(name).storage
        if wanted is None or not wanted.survey_id:
            return
        survey = Survey(url=RUN_URL, survey_id=wanted.survey_id, error="no answer")
        if self.is_storage_up:
            snapshots = tuple(self.storage.values())
            survey = Survey(
                url=RUN_URL, survey_id=wanted.survey_id, is_done=True, snapshots=snapshots, partial=self.partial,
                is_known=bool(snapshots or self.partial or self.unreadable), unreadable=self.unreadable,
            )  # fmt: skip
        self.set(name, survey=survey)

    def follow(self) -> None:
        """Nodes do at once what a decision asks of them."""
        for name in NAMES:
            desired = self.desired(name)
            decision = desired.decision
            self.answer_survey(name)
            if decision is None or desired.decision_phase is DecisionPhase.REFUSE:
                continue
            state = StagingState.READY if desired.decision_phase is DecisionPhase.PREPARE else StagingState.RECORDED
            kept = decision if state is StagingState.RECORDED else self.reports[name].decision
            self.set(name, staging=Staging(decision_id=decision.decision_id, state=state), decision=kept)
            if desired.decision_phase is DecisionPhase.RELEASE:
                sessions = tuple(replace(s, phase=SessionPhase.TRAINING) for s in self.reports[name].sessions)
                self.set(name, sessions=sessions)

    def run(self, rounds: int = 30, seconds: float = 0.1) -> None:
        for _ in range(rounds):
            self.tell(seconds)
            self.follow()
        self.tell()

    def open_world(self, world_id: str = "w", *, allow_fresh: bool = False) -> None:
        for rank, name in enumerate(NAMES):
            session = SessionRecord(
                world_id=world_id, rank=rank, world_size=2, phase=SessionPhase.RESTORING, allow_fresh=allow_fresh
            )
            self.set(name, sessions=(session,))

    def commit(self, step: int, attempt: int = 1) -> None:
        for rank, name in enumerate(NAMES):
            self.set(name, shards=(*self.reports[name].shards, shard(step, rank, attempt)))

    def tasks(self) -> dict[str, tuple[int, ...]]:
        """Ranks each node should upload now."""
        found = {}
        for name in NAMES:
            storage = self.desired(name).storage
            for task in storage.uploads if storage is not None else ():
                found[name] = task.ranks
        return found

    def prunes(self) -> list[tuple[SnapshotKey, ...]]:
        """What each node should delete from storage."""
        storages = [self.desired(name).storage for name in NAMES]
        return [tuple(item.key for item in storage.prunes) if storage is not None else () for storage in storages]

    def train_to(self, step: int) -> None:
        for name in NAMES:
            (session,) = self.reports[name].sessions
            self.set(name, sessions=(replace(session, last_step=step),))
        self.tell()

    def writers(self) -> list[str]:
        storages = {name: self.desired(name).storage for name in NAMES}
        return [n for n, s in storages.items() if s is not None and any(task.is_last for task in s.uploads)]

    def upload(self, name: str, rank: int, state: UploadState = UploadState.DONE, reason: str = "") -> None:
        storage = self.desired(name).storage
        assert storage is not None
        snapshot = storage.uploads[0].snapshot
        upload = Upload(snapshot_id=snapshot.snapshot_id, rank=rank, state=state, reason=reason)
        others = tuple(u for u in self.reports[name].uploads if (u.snapshot_id, u.rank) != (upload.snapshot_id, rank))
        self.set(name, uploads=(*others, upload))
        if rank == RECORD_RANK and state is UploadState.DONE:
            self.storage[snapshot.snapshot_id] = snapshot

    def decision(self) -> Decision:
        decision = self.core.runs[RUN].recovery.decision
        assert decision is not None
        return decision

    def status(self) -> dict[str, object]:
        document = self.core.runs[RUN].persisting.document()
        assert document is not None
        return document


def training(**policy: object) -> Cluster:
    cluster = Cluster(**policy)
    cluster.open_world()
    cluster.run()
    assert cluster.decision().outcome is Outcome.NONE
    return cluster


def persist_all(cluster: Cluster) -> None:
    """Nodes upload whatever they should, until nothing is under way."""
    for _ in range(6):
        for name, ranks in cluster.tasks().items():
            for rank in ranks:
                cluster.upload(name, rank)
        for name in cluster.writers():
            cluster.upload(name, RECORD_RANK)
        cluster.tell()


def test_shards_are_spread_over_their_holders_and_the_record_comes_last() -> None:
    cluster = training()
    cluster.commit(1)
    cluster.tell()
    assert cluster.tasks() == {"n0": (0,), "n1": (1,)}
    assert cluster.writers() == []
    cluster.upload("n0", 0)
    cluster.tell()
    assert (cluster.tasks(), cluster.writers()) == ({"n1": (1,)}, []), "not before every shard is there"
    cluster.upload("n1", 1)
    cluster.tell()
    assert cluster.writers() == ["n0"]
    assert cluster.status()["step"] == 0, "nothing counts before its record"
    cluster.upload("n0", RECORD_RANK)
    cluster.tell()
    assert cluster.status()["step"] == 1
    assert cluster.tasks() == {}


def test_one_at_a_time_and_then_the_newest() -> None:
    cluster = training()
    cluster.commit(1)
    cluster.tell()
    cluster.commit(2)
    cluster.tell()
    storage = cluster.desired("n0").storage
    assert storage is not None
    assert [task.snapshot.step for task in storage.uploads] == [1]
    cluster.commit(3)
    persist_all(cluster)
    assert cluster.status()["step"] == 3


def test_what_is_uploaded_is_not_released_and_training_gets_a_slot_more() -> None:
    cluster = training()
    cluster.commit(1)
    cluster.tell()
    cluster.commit(2)
    cluster.tell()
    assert cluster.desired("n0").release == ()
    assert cluster.desired("n0").extra_slots == 1
    (first,) = cluster.reports["n0"].sessions
    gave_up = replace(first, skipped_step=3, skip_cause=SkipCause.CAPTURE, skip_reason="KeyError: 'timeslot'")
    cluster.set("n0", sessions=(gave_up,))
    cluster.tell()
    cluster.tell()
    assert cluster.desired("n0").release == (), "why a trainer gave a step up is not read"
    cluster.set("n0", sessions=(replace(first, skipped_step=3, skip_cause=SkipCause.NO_SLOT),))
    cluster.tell()
    cluster.tell()
    assert SnapshotKey(1, 1) in cluster.desired("n0").release, "the upload loses, not training"


def test_a_shard_whose_uploader_fails_or_dies_goes_to_another_holder() -> None:
    cluster = training()
    cluster.commit(1)
    cluster.set("n1", shards=(*cluster.reports["n1"].shards, shard(1, 0)))  # n1 holds both
    cluster.tell()
    assert cluster.tasks() == {"n0": (0,), "n1": (1,)}
    cluster.upload("n0", 0, UploadState.FAILED, "no permission")
    cluster.tell()
    assert cluster.tasks() == {"n1": (0, 1)}
    cluster.absent = {"n0"}
    for _ in range(20):
        cluster.tell()
    cluster.upload("n1", 0)
    cluster.upload("n1", 1)
    cluster.tell()
    assert cluster.writers() == ["n1"]


def test_a_dead_writer_of_the_record_is_replaced() -> None:
    cluster = training()
    cluster.commit(1)
    cluster.tell()
    for rank, name in enumerate(NAMES):
        cluster.upload(name, rank)
    cluster.tell()
    assert cluster.writers() == ["n0"]
    cluster.absent = {"n0"}
    for _ in range(20):
        cluster.tell()
    assert cluster.writers() == ["n1"]


def test_a_failing_upload_is_said_in_the_status_with_its_reason() -> None:
    cluster = training()
    cluster.commit(1)
    cluster.tell()
    cluster.upload("n0", 0, UploadState.FAILED, "the disk is full; free room")
    cluster.tell()
    assert cluster.status()["problem"] == "the disk is full; free room"
    cluster.upload("n0", 0)
    cluster.tell()
    assert cluster.status()["problem"] == ""


def test_an_upload_that_gets_nowhere_makes_way_for_a_newer_snapshot() -> None:
    cluster = training()
    cluster.commit(1)
    cluster.tell()
    cluster.upload("n0", 0, UploadState.FAILED, "occupied")
    cluster.commit(2)
    for _ in range(30):
        cluster.tell(LEASE_S * 0.9)
    storage = cluster.desired("n0").storage
    assert storage is not None
    assert [task.snapshot.step for task in storage.uploads] == [2]


@pytest.mark.parametrize(("every", "steps", "expected"), [(3, (1, 2), 0), (3, (1, 2, 3), 3), (2, (1, 2, 3), 2)])
def test_steps_between_copies_are_counted_from_the_last(every: int, steps: tuple[int, ...], expected: int) -> None:
    cluster = training(persist_every_steps=every)
    for step in steps:
        cluster.commit(step)
        cluster.tell()
        persist_all(cluster)
    assert cluster.status()["step"] == expected


def test_seconds_between_copies_pass_before_the_next() -> None:
    cluster = training(persist_every_steps=0, persist_every_s=10.0)
    cluster.commit(1)
    cluster.tell()
    assert cluster.tasks() == {}
    for _ in range(15):
        cluster.tell(0.9)
    persist_all(cluster)
    assert cluster.status()["step"] == 1
    cluster.commit(2)
    cluster.tell()
    assert cluster.tasks() == {}


def test_a_trainer_that_asks_gets_a_copy_once() -> None:
    cluster = training(persist_every_steps=0)
    cluster.commit(1)
    cluster.tell()
    assert cluster.tasks() == {}
    (session,) = cluster.reports["n0"].sessions
    cluster.set("n0", sessions=(replace(session, wants_persist=True),))
    cluster.tell()
    persist_all(cluster)
    assert cluster.status()["step"] == 1
    cluster.commit(2)
    cluster.tell()
    assert cluster.tasks() == {}, "one wish, one copy"


def test_a_run_whose_trainers_died_is_copied_without_them() -> None:
    cluster = training(persist_every_steps=0)
    cluster.commit(1)
    cluster.tell()
    for name in NAMES:
        cluster.set(name, sessions=())
    cluster.tell()
    persist_all(cluster)
    assert cluster.status()["step"] == 1


def test_a_finished_run_keeps_its_memory_until_the_copy_that_was_asked_for_is_there() -> None:
    cluster = training(persist_every_steps=0)
    cluster.commit(1)
    cluster.tell()
    for name in NAMES:
        (session,) = cluster.reports[name].sessions
        cluster.set(name, sessions=(replace(session, phase=SessionPhase.ENDED, wants_persist=True),))
    cluster.tell()
    assert not cluster.desired("n0").forget
    persist_all(cluster)
    cluster.tell()
    assert cluster.desired("n0").forget


def test_a_new_cluster_restores_what_lies_on_storage_and_numbers_above_it() -> None:
    cluster = Cluster()
    found = [persisted(4), persisted(7), persisted(5, attempt=2, base=(1, 4))]
    cluster.storage = {record.snapshot_id: record for record in found}
    cluster.open_world()
    cluster.run()
    decision = cluster.decision()
    assert decision.base is not None
    assert (decision.base.attempt, decision.base.step) == (2, 5), "step 7 of attempt 1 was left behind"
    assert decision.base.url == f"{RUN_URL}/attempt-0002/step-00000005"
    assert {source.kind for source in decision.sources} == {SourceKind.PERSISTED}
    assert decision.attempt == 2 + LEAP_ATTEMPTS, "above what nodes that are away may have begun since"
    assert [entry.attempt for entry in decision.lineage] == [decision.attempt, 2, 1]


def test_memory_that_is_newer_wins_and_what_is_newer_on_storage_wins() -> None:
    for stored_step, expected in ((1, (2, SourceKind.LOCAL)), (3, (3, SourceKind.PERSISTED))):
        cluster = Cluster()
        cluster.commit(2)
        record = persisted(stored_step)
        cluster.storage = {record.snapshot_id: record}
        cluster.open_world("w2")
        cluster.run()
        decision = cluster.decision()
        assert decision.base is not None
        assert (decision.base.step, decision.sources[0].kind) == expected


def test_each_shard_comes_from_where_it_is_nearest() -> None:
    cluster = Cluster()
    record = persisted(1)
    cluster.storage = {record.snapshot_id: record}
    cluster.set("n0", shards=(shard(1, 0),))
    cluster.open_world("w2")
    cluster.run()
    assert [source.kind for source in cluster.decision().sources] == [SourceKind.LOCAL, SourceKind.PERSISTED]


def test_retention_prunes_by_one_node_and_never_what_was_restored() -> None:
    cluster = Cluster(persist_keep_last=1, persist_every_steps=1)
    cluster.storage = {record.snapshot_id: record for record in (persisted(1, serial=1), persisted(2, serial=2))}
    cluster.open_world()
    cluster.run()
    assert cluster.prunes() == [(), ()], "step 2 is on probation: if it leads to NaN, step 1 is the next"
    cluster.train_to(5)
    assert cluster.prunes() == [(SnapshotKey(1, 1),), ()]
    cluster.set("n0", pruned=(SnapshotKey(1, 1),))
    cluster.commit(6, attempt=cluster.decision().attempt)
    cluster.tell()
    persist_all(cluster)
    assert cluster.status()["step"] == 6
    assert cluster.prunes() == [(), ()], "step 2 is what this world began from"


@given(
    steps=st.sets(st.integers(1, 60), max_size=20),
    keep_last=st.integers(1, 5),
    keep_every=st.integers(0, 4),
    fork=st.integers(0, 30),
)
@settings(max_examples=200, deadline=None)
def test_retention_keeps_the_newest_the_chosen_and_gives_up_only_what_is_older(
    steps: set[int], keep_last: int, keep_every: int, fork: int
) -> None:
    known = [
        persisted(step, attempt=1 if step <= 30 else 2, base=(0, 0) if step <= 30 else (1, fork), serial=n)
        for n, step in enumerate(sorted(steps), start=1)
    ]
    lineage = max((r for r in known), key=lambda r: r.key).lineage if known else ()
    live = [r for r in known if is_live(view_of_record(r), lineage)]
    gone = prunable(known, live=live, keep_last=keep_last, keep_every=keep_every)
    left = {record.key for record in known} - set(gone)
    newest = sorted((r.key for r in live), reverse=True)[:keep_last]
    assert set(newest) <= left
    assert all(r.key in left for r in live if keep_every and r.serial % keep_every == 0)
    assert not known or left, "something is always left"
    assert all(key < newest[-1] for key in gone)
