"""What a node does next, as lists of actions: no store, no coder, no clock."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from backstay.format.manifest import CHUNK_BYTES
from backstay.ids import Generation, SnapshotKey
from backstayd.coder.jobs import (
    DecodeStripe,
    EncodeStripe,
    FetchPlan,
    FetchShard,
    MarkSnapshot,
    PruneSnapshot,
    VerifyFragment,
    VerifyShard,
    WriteRecord,
)
from backstayd.core.messages.decisions import (
    Base,
    Decision,
    DecisionPhase,
    Distrusted,
    Outcome,
    Placement,
    ShardSource,
    SourceKind,
    StagingState,
)
from backstayd.core.messages.desired import RunDesired
from backstayd.core.messages.durable import (
    PersistedSnapshot,
    StorageDesired,
    Stored,
    Survey,
    Upload,
    UploadState,
    UploadTask,
)
from backstayd.core.messages.plans import (
    FragmentRecord,
    FragmentSource,
    Member,
    Plan,
    Quarantined,
    Rebuild,
    RebuildTarget,
    RebuildTask,
    ShardRecord,
    VolumeShard,
    seal_rebuild,
)
from backstayd.core.messages.report import SessionPhase, SessionRecord
from backstayd.core.protect.durable_uploads import RECORD_RANK
from backstayd.node.reconcile.actions import (
    CancelTask,
    DiscardStaged,
    DropPlan,
    DurableRun,
    FenceWorld,
    PrepareTarget,
    QuarantineParity,
    RecordDecision,
    RefuseWorld,
    ReleaseSnapshot,
    ReleaseWorld,
    Restoring,
    StartJob,
    View,
)
from backstayd.node.reconcile.planner import plan_actions
from backstayd.node.reconcile.staging import needs_open_files, rebuilt_bytes, staging_of
from backstayd.node.reconcile.tasks import TaskKey, TaskKind
from backstayd.store.index import StagedFile

RUN = "job/run"
KEY = SnapshotKey(1, 12)
SIZE = 3 * CHUNK_BYTES
PEERS = {name: f"{name}:1" for name in ("n0", "n1", "n2")}


def digest(rank: int) -> str:
    return f"{rank:064x}"[::-1]


def shard(rank: int) -> ShardRecord:
    return ShardRecord(attempt=1, step=12, rank=rank, world_size=3, size_bytes=SIZE, digest=digest(rank))


PLAN = Plan(
    run=RUN,
    snapshot_id="5" * 64,
    attempt=1,
    step=12,
    world_size=3,
    m=1,
    chunk_bytes=CHUNK_BYTES,
    members=tuple(
        Member(
            node=f"n{rank}",
            incarnation=f"inc{rank}",
            bulk_address=f"n{rank}:1",
            shards=(VolumeShard(rank=rank, size_bytes=SIZE, digest=digest(rank)),),
        )
        for rank in range(3)
    ),
).sealed()

REBUILD = seal_rebuild(
    Rebuild(
        rebuild_id="",
        plan=PLAN,
        targets=(RebuildTarget(member_index=0, rank=0, digest=digest(0), node="n0", bulk_address="n0:1"),),
        tasks=(
            RebuildTask(
                stripe=1,
                decoder="n1",
                sources=(FragmentSource(stripe=1, index=1, node="n2", bulk_address="n2:1"),),
            ),
            RebuildTask(stripe=2, decoder="n2", sources=()),
        ),
    )
)


def decision(kinds: dict[int, tuple[SourceKind, tuple[str, ...]]], **more: Any) -> Decision:
    sources = tuple(
        ShardSource(rank=rank, size_bytes=SIZE, digest=digest(rank), kind=kind, holders=holders)
        for rank, (kind, holders) in kinds.items()
    )
    fields: dict[str, Any] = {
        "decision_id": "d" * 32,
        "generation": Generation(3, "cc"),
        "run": RUN,
        "world_id": "w2",
        "world_size": 3,
        "attempt": 2,
        "outcome": Outcome.EXACT,
        "base": Base(attempt=1, step=12, snapshot_id="5" * 64),
        "placements": tuple(Placement(rank=rank, node=f"n{rank}") for rank in range(3)),
        "sources": sources,
    }
    return Decision(**fields | more)


LOCAL = decision({rank: (SourceKind.LOCAL, (f"n{rank}",)) for rank in range(3)})


def view(desired: RunDesired, **more: Any) -> View:
    return View(**{"node": "n0", "incarnation": "inc0", "peers": PEERS, "desired": desired} | more)


def restoring(rank: int, *needs: int) -> SessionRecord:
    return SessionRecord(world_id="w2", rank=rank, world_size=3, phase=SessionPhase.RESTORING, needs=needs)


def desired(made: Decision | None = LOCAL, phase: DecisionPhase = DecisionPhase.PREPARE, **more: Any) -> RunDesired:
    return RunDesired(run=RUN, world_id="w2", decision=made, decision_phase=phase, **more)


def test_a_local_shard_is_verified_and_then_the_node_is_ready() -> None:
    now = view(desired(), shards=(shard(0),), sessions=(restoring(0),))
    (action,) = plan_actions(now)
    assert isinstance(action, StartJob)
    assert isinstance(action.job, VerifyShard)
    assert (action.job.shard.rank, action.job.shard.digest, action.job.is_staged) == (0, digest(0), False)
    staging = staging_of(now)
    assert staging is not None
    assert (staging.state, staging.total_bytes) == (StagingState.STAGING, SIZE)
    done = replace(now, verified=frozenset({(LOCAL.decision_id, digest(0))}))
    assert plan_actions(done) == []
    ready = staging_of(done)
    assert ready is not None
    assert ready.state is StagingState.READY


def test_a_running_or_settled_job_is_not_started_again() -> None:
    now = view(desired(), shards=(shard(0),), sessions=(restoring(0),))
    (action,) = plan_actions(now)
    assert isinstance(action, StartJob)
    assert plan_actions(replace(now, running=frozenset({action.key}))) == []
    assert plan_actions(replace(now, settled=frozenset({action.key}))) == []


def test_every_rank_a_trainer_here_will_read_is_staged() -> None:
    now = view(desired(), shards=(shard(0),), sessions=(restoring(0, 2),))
    jobs = [action.job for action in plan_actions(now) if isinstance(action, StartJob)]
    assert [type(job) for job in jobs] == [VerifyShard, FetchShard]
    assert isinstance(jobs[1], FetchShard)
    assert (jobs[1].shard.rank, jobs[1].addresses, jobs[1].size_bytes) == (2, ("n2:1",), SIZE)


def test_a_holder_without_address_is_not_asked() -> None:
    made = decision({0: (SourceKind.PEER, ("n7", "n0"))})
    assert plan_actions(view(desired(made), sessions=(restoring(0),))) == []


def test_a_shard_that_is_rebuilt_here_is_not_fetched() -> None:
    made = decision({0: (SourceKind.REBUILD, ("n0",))})
    actions = plan_actions(view(desired(made, rebuilds=(REBUILD,)), sessions=(restoring(0),)))
    (action,) = actions
    assert isinstance(action, StartJob)
    assert isinstance(action.job, FetchPlan)
    assert action.job.addresses == ("n2:1", "n1:1")


def test_the_owner_of_a_rebuilt_shard_prepares_waits_and_verifies() -> None:
    wanted = desired(decision({0: (SourceKind.REBUILD, ("n0",))}), rebuilds=(REBUILD,))
    stored = view(wanted, plans={PLAN.plan_id: PLAN})
    (prepare,) = plan_actions(stored)
    assert isinstance(prepare, PrepareTarget)
    place = (REBUILD.rebuild_id, digest(0)[:16])
    waiting = replace(stored, missing={place: (1,)})
    assert plan_actions(replace(waiting, settled=frozenset({prepare.key}))) == []
    assert rebuilt_bytes(waiting) == (SIZE // 2, SIZE)
    (verify,) = plan_actions(replace(stored, missing={place: ()}))
    assert isinstance(verify, StartJob)
    assert isinstance(verify.job, VerifyShard)
    assert verify.job.is_staged
    assert rebuilt_bytes(replace(stored, shards=(shard(0),))) == (SIZE, SIZE)


def test_a_decoder_does_its_own_stripes_only() -> None:
    (action,) = plan_actions(view(RunDesired(run=RUN, rebuilds=(REBUILD,)), node="n1", incarnation="inc1"))
    assert isinstance(action, StartJob)
    assert isinstance(action.job, DecodeStripe)
    assert action.job.stripe == 1


def test_a_member_encodes_its_stripe_and_a_later_daemon_of_that_name_does_not() -> None:
    wanted = RunDesired(run=RUN, plans=(PLAN,))
    (action,) = plan_actions(view(wanted, node="n2", incarnation="inc2"))
    assert isinstance(action, StartJob)
    assert isinstance(action.job, EncodeStripe)
    assert action.job.stripe == 2
    assert plan_actions(view(wanted, node="n2", incarnation="another")) == []


def test_what_is_no_longer_wanted_is_cancelled_first() -> None:
    stale = TaskKey(RUN, TaskKind.ENCODE, "x")
    now = view(RunDesired(run=RUN, drop_plans=(PLAN.plan_id,)), plans={PLAN.plan_id: PLAN}, running=frozenset({stale}))
    assert plan_actions(now) == [CancelTask(key=stale), DropPlan(plan_id=PLAN.plan_id)]


def test_only_what_is_named_and_here_is_released() -> None:
    now = view(RunDesired(run=RUN, release=(KEY, SnapshotKey(1, 11))), shards=(shard(0),))
    assert plan_actions(now) == [ReleaseSnapshot(key=KEY)]
    assert plan_actions(view(RunDesired(run=RUN), shards=(shard(0),))) == []


def test_a_decision_is_recorded_only_when_everything_is_verified() -> None:
    now = view(desired(phase=DecisionPhase.RECORD), shards=(shard(0),), sessions=(restoring(0),))
    assert not any(isinstance(action, RecordDecision) for action in plan_actions(now))
    ready = replace(now, verified=frozenset({(LOCAL.decision_id, digest(0))}))
    assert plan_actions(ready) == [RecordDecision(decision=LOCAL)]
    recorded = replace(ready, decision=LOCAL)
    assert plan_actions(recorded) == []
    staging = staging_of(recorded)
    assert staging is not None
    assert staging.state is StagingState.RECORDED


def test_a_decision_is_never_recorded_over_a_later_one() -> None:
    later = decision({}, decision_id="e" * 32, generation=Generation(9, "cc"), attempt=5)
    for phase in (DecisionPhase.RECORD, DecisionPhase.RELEASE):
        now = view(
            desired(phase=phase),
            shards=(shard(0),),
            decision=later,
            verified=frozenset({(LOCAL.decision_id, digest(0))}),
        )
        assert not any(isinstance(action, RecordDecision) for action in plan_actions(now))


def test_a_recorded_decision_that_was_raised_above_others_is_recorded_again() -> None:
    raised = replace(LOCAL, generation=Generation(12, "cc"))
    wanted = replace(desired(phase=DecisionPhase.RELEASE), decision=raised)
    assert plan_actions(view(wanted, decision=LOCAL)) == [RecordDecision(decision=raised)]
    assert plan_actions(view(wanted, decision=raised)) == []


def test_a_recorder_records_what_was_released_and_stages_nothing() -> None:
    for phase in (DecisionPhase.PREPARE, DecisionPhase.RECORD):
        assert plan_actions(view(desired(phase=phase), node="n9")) == []
    released = desired(phase=DecisionPhase.RELEASE)
    assert plan_actions(view(released, node="n9")) == [RecordDecision(decision=LOCAL)]
    assert plan_actions(view(released, node="n9", decision=LOCAL)) == []
    assert staging_of(view(released, node="n9")) is None


def test_trainers_go_on_only_when_released_and_only_those_of_that_world() -> None:
    waiting = {"sessions": (restoring(0),), "decision": LOCAL, "waiting_worlds": frozenset({"w2"})}
    for phase in (DecisionPhase.PREPARE, DecisionPhase.RECORD):
        assert plan_actions(view(desired(phase=phase), **waiting)) == []
    assert plan_actions(view(desired(phase=DecisionPhase.RELEASE), **waiting)) == [ReleaseWorld(decision=LOCAL)]
    others = waiting | {"waiting_worlds": frozenset({"w3"})}
    assert plan_actions(view(desired(phase=DecisionPhase.RELEASE), **others)) == []


def stored(url: str) -> Decision:
    """Everything lies on durable storage alone."""
    kinds: dict[int, tuple[SourceKind, tuple[str, ...]]] = dict.fromkeys(range(3), (SourceKind.PERSISTED, ()))
    return decision(kinds, base=Base(attempt=1, step=12, snapshot_id="5" * 64, world_size=3, url=url))


@pytest.mark.parametrize("url", ["file:///mnt/run/attempt-0001/step-00000012", "/mnt/run/attempt-0001/step-00000012"])
def test_a_persisted_file_of_this_machine_is_verified_where_it_lies(url: str) -> None:
    made = stored(url)
    now = view(desired(made), sessions=(restoring(0),))
    (action,) = plan_actions(now)
    assert isinstance(action, StartJob)
    assert isinstance(action.job, VerifyShard)
    assert (action.job.shard.rank, action.job.url, action.key.subject) == (0, url, made.decision_id)
    done = replace(now, verified=frozenset({(made.decision_id, digest(0))}))
    staging = staging_of(done)
    assert staging is not None
    assert staging.state is StagingState.READY


def test_a_persisted_object_elsewhere_is_copied_and_one_in_memory_is_used() -> None:
    made = stored("s3://bucket/run/attempt-0001/step-00000012")
    (action,) = plan_actions(view(desired(made), sessions=(restoring(0),)))
    assert isinstance(action, StartJob)
    assert isinstance(action.job, FetchShard)
    assert (action.job.url, action.job.addresses) == ("s3://bucket/run/attempt-0001/step-00000012", ())
    (action,) = plan_actions(view(desired(stored("/mnt/run")), shards=(shard(0),), sessions=(restoring(0),)))
    assert isinstance(action, StartJob)
    assert isinstance(action.job, VerifyShard)
    assert not action.job.url


@pytest.mark.parametrize("phase", [DecisionPhase.RECORD, DecisionPhase.RELEASE])
def test_a_node_that_lost_its_descriptors_after_recording_verifies_again_before_it_releases(
    phase: DecisionPhase,
) -> None:
    made = stored("file:///mnt/run")
    waiting = frozenset({"w2"})
    now = view(desired(made, phase), sessions=(restoring(0),), decision=made, waiting_worlds=waiting)
    (action,) = plan_actions(now)
    assert isinstance(action, StartJob)
    assert isinstance(action.job, VerifyShard)
    assert action.job.url == "file:///mnt/run"
    released: list[Any] = [ReleaseWorld(decision=made)] if phase is DecisionPhase.RELEASE else []
    assert plan_actions(replace(now, verified=frozenset({(made.decision_id, digest(0))}))) == released
    given_up = replace(now, failed={made.decision_id: "the file is gone"})
    assert plan_actions(given_up) == released, "the trainers are told instead of waiting for ever"
    assert plan_actions(replace(now, waiting_worlds=frozenset())) == []


def test_descriptors_are_kept_until_the_trainers_have_them() -> None:
    made = stored("file:///mnt/run")
    trainers = (Restoring(world_id="w2", rank=0),)
    for phase in (DecisionPhase.PREPARE, DecisionPhase.RECORD):
        assert needs_open_files(view(desired(made, phase)))
    assert needs_open_files(view(desired(made, DecisionPhase.RELEASE), restoring=trainers))
    assert not needs_open_files(view(desired(made, DecisionPhase.RELEASE)))
    assert not needs_open_files(view(desired(None), restoring=trainers))


def test_a_refusal_is_passed_on() -> None:
    made = decision({}, outcome=Outcome.REFUSED, base=None, message="rank 3 is lost")
    now = view(desired(made, DecisionPhase.REFUSE), waiting_worlds=frozenset({"w2"}))
    assert plan_actions(now) == [RefuseWorld(decision=made)]


def test_a_failed_staging_stays_failed_for_that_decision() -> None:
    now = view(desired(), sessions=(restoring(0),), shards=(shard(0),), failed={LOCAL.decision_id: "chunk 3 is bad"})
    assert plan_actions(now) == []
    staging = staging_of(now)
    assert staging is not None
    assert (staging.state, staging.reason) == (StagingState.FAILED, "chunk 3 is bad")


def test_a_node_that_hosts_no_rank_has_no_say() -> None:
    assert staging_of(view(desired(), node="n9")) is None
    assert staging_of(view(RunDesired(run=RUN))) is None


def test_other_worlds_lose_their_grants() -> None:
    now = view(desired(None), granted_worlds=frozenset({"w1", "w2"}))
    assert plan_actions(now) == [FenceWorld(world_id="w2")]
    assert plan_actions(view(desired(None), granted_worlds=frozenset({"w2"}))) == []


def test_staging_that_nothing_wants_goes_once_the_world_runs() -> None:
    staged = StagedFile(rank=0, world_size=3, digest16=digest(0)[:16], size_bytes=SIZE)
    running = view(desired(phase=DecisionPhase.RELEASE), staged=(staged,), decision=LOCAL)
    assert plan_actions(running) == [DiscardStaged(rank=0, world_size=3, digest16=digest(0)[:16])]
    for kept in (RunDesired(run=RUN), desired(phase=DecisionPhase.PREPARE)):
        actions = plan_actions(view(kept, staged=(staged,)))
        assert not any(isinstance(action, DiscardStaged) for action in actions)


def test_a_source_that_a_reader_found_bad_is_looked_at() -> None:
    bad_shard = Quarantined(what="", attempt=1, step=12, reason="", node="n0", rank=0)
    bad_parity = Quarantined(what="", attempt=1, step=12, reason="", node="n0", plan_id=PLAN.plan_id, stripe=2, index=0)
    gone = Quarantined(what="", attempt=1, step=9, reason="", node="n0", rank=0)
    now = view(
        RunDesired(run=RUN, suspects=(bad_shard, bad_parity, gone)), shards=(shard(0),), plans={PLAN.plan_id: PLAN}
    )
    jobs = [action.job for action in plan_actions(now) if isinstance(action, StartJob)]
    assert [type(job) for job in jobs] == [VerifyShard, VerifyFragment]


def test_parity_that_a_reader_has_proven_not_to_fit_is_set_aside_and_nothing_else_is() -> None:
    misfit = Quarantined(
        what="", attempt=1, step=12, reason="does not fit", node="n0", plan_id=PLAN.plan_id, stripe=2, index=0,
        is_misfit=True,
    )  # fmt: skip
    wanted, here = RunDesired(run=RUN, suspects=(misfit,)), FragmentRecord(plan_id=PLAN.plan_id, stripe=2, index=0)
    other = FragmentRecord(plan_id=PLAN.plan_id, stripe=0, index=0)
    now = view(wanted, plans={PLAN.plan_id: PLAN}, fragments=frozenset({here, other}))
    assert plan_actions(now) == [QuarantineParity(fragment=here, reason="does not fit")]
    later = view(wanted, plans={PLAN.plan_id: PLAN}, fragments=frozenset({other}))
    assert plan_actions(later) == []


STORED = PersistedSnapshot(
    run=RUN, attempt=1, step=12, world_size=3, snapshot_id="5" * 64, shards=PLAN.members[0].shards
)
BAD = Distrusted(snapshot_id="b" * 64, attempt=1, step=4, reason="nan")
STORAGE = StorageDesired(
    url="file:///lake/run",
    survey_id="s",
    uploads=(UploadTask(snapshot=STORED, ranks=(0,), is_last=True),),
    prunes=(Stored(attempt=1, step=8, snapshot_id="a" * 64),),
    newest_attempt=1,
    distrust=(BAD,),
    trust=(BAD,),
)


def test_only_a_node_that_was_confirmed_changes_what_others_share() -> None:
    now = view(RunDesired(run=RUN, storage=STORAGE), shards=(shard(0),), free_uploads=1)
    kinds = [action.key.kind for action in plan_actions(now) if isinstance(action, StartJob)]
    assert kinds == [TaskKind.SURVEY, TaskKind.UPLOAD], "what harms nobody"
    confirmed = replace(now, is_confirmed=True, confirmed_until_s=9.0)
    jobs = {action.key.kind: action.job for action in plan_actions(confirmed) if isinstance(action, StartJob)}
    changes = {kind: jobs[kind] for kind in jobs.keys() - {TaskKind.SURVEY, TaskKind.UPLOAD}}
    assert changes.keys() == {TaskKind.COMPLETE, TaskKind.PRUNE, TaskKind.DISTRUST, TaskKind.TRUST}
    for job in changes.values():
        assert isinstance(job, (WriteRecord, PruneSnapshot, MarkSnapshot))
        assert (job.act_before_s, job.newest_attempt) == (9.0, 1)
    running = frozenset(action.key for action in plan_actions(confirmed) if isinstance(action, StartJob))
    ended = {action.key for action in plan_actions(replace(now, running=running)) if isinstance(action, CancelTask)}
    assert {key.kind for key in ended} == changes.keys(), "and ends what is under way when its time is over"


def test_what_is_done_on_storage_is_not_done_again_and_uploads_wait_for_their_turn() -> None:
    record, shard_upload = (
        Upload(snapshot_id=STORED.snapshot_id, rank=rank, state=UploadState.DONE) for rank in (RECORD_RANK, 0)
    )
    done = DurableRun(
        survey=Survey(url=STORAGE.url, survey_id="s", is_done=True),
        uploads={(upload.snapshot_id, upload.rank): upload for upload in (record, shard_upload)},
        pruned=set(STORAGE.prunes),
        marked={BAD.snapshot_id},
        struck={BAD.snapshot_id},
    )
    now = view(
        RunDesired(run=RUN, storage=STORAGE), shards=(shard(0),), durable=done, is_confirmed=True, free_uploads=1
    )
    assert plan_actions(now) == []
    waits = replace(done, uploads={(STORED.snapshot_id, RECORD_RANK): record})
    assert plan_actions(replace(now, durable=waits, free_uploads=0)) == []
    assert len(plan_actions(replace(now, durable=waits))) == 1
