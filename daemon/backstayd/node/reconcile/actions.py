"""What a node does next for one run: desired state and what is here, compared; actions out. Pure and level-triggered.

Called again after every change with everything it needs, so an action that failed or was forgotten comes up again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from backstay.ids import SnapshotKey
from backstayd.coder.jobs import (
    DecodeStripe,
    EncodeStripe,
    FetchPersisted,
    FetchPlan,
    FetchShard,
    Job,
    VerifyFragment,
    VerifyPersisted,
    VerifyShard,
)
from backstayd.core.inventory.durable_names import is_local
from backstayd.core.inventory.geometry import fragment_bytes
from backstayd.core.inventory.readers import base_size, takes_whole
from backstayd.core.messages.decisions import Decision, DecisionPhase, ShardSource, SourceKind, Staging, StagingState
from backstayd.core.messages.desired import RunDesired
from backstayd.core.messages.plans import FragmentRecord, Plan, Rebuild, RebuildTarget, ShardRecord
from backstayd.core.messages.report import SessionPhase, SessionRecord

FLOOR_BYTES_PER_S = 20_000_000  # slower than this and a transfer counts as stuck
BASE_DEADLINE_S = 30.0
STORAGE_FLOOR_BYTES_PER_S = 5_000_000  # slower than this and a store counts as stuck
STORAGE_DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StartJob:
    """Run ``job`` on a coder under the name ``key``; at most one of a name at a time."""

    key: str
    job: Job


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareTarget:
    """Allocate staging for a shard that others will decode for this node."""

    key: str
    rebuild: Rebuild
    target: RebuildTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelTask:
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FenceWorld:
    world_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseSnapshot:
    key: SnapshotKey


@dataclass(frozen=True, slots=True, kw_only=True)
class DropPlan:
    plan_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscardStaged:
    rank: int
    world_size: int
    digest16: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SetAside:
    """Quarantine a parity fragment of this node."""

    fragment: FragmentRecord
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordDecision:
    decision: Decision


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseWorld:
    """Answer the waiting restore() calls of the decision's world."""

    decision: Decision


@dataclass(frozen=True, slots=True, kw_only=True)
class RefuseWorld:
    decision: Decision


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetRun:
    pass


Action = (
    StartJob | PrepareTarget | CancelTask | FenceWorld | ReleaseSnapshot | DropPlan | DiscardStaged | SetAside
    | RecordDecision | ReleaseWorld | RefuseWorld | ForgetRun
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedState:
    """A shard in staging here and the stripes of each rebuild that it still waits for."""

    rank: int
    world_size: int
    digest16: str
    size_bytes: int
    missing: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # rebuild id -> stripes


@dataclass(frozen=True, slots=True, kw_only=True)
class Restoring:
    """A trainer here that restores: which boxes it holds, and the decision of which it has fetched what it needs."""

    world_id: str
    rank: int
    layout: str = ""
    staged: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One run as this node sees it.

    ``running`` are names of tasks under way, ``settled`` of those that are done, have failed for good or wait for another
    try. ``verified`` holds (decision id, digest) of shards whose every chunk was checked for that decision.
    """

    node: str
    incarnation: str
    desired: RunDesired
    peers: Mapping[str, str] = field(default_factory=dict)  # name -> bulk address
    shards: tuple[ShardRecord, ...] = ()
    fragments: frozenset[FragmentRecord] = frozenset()
    plans: Mapping[str, Plan] = field(default_factory=dict)
    decision: Decision | None = None
    sessions: tuple[SessionRecord, ...] = ()
    restoring: tuple[Restoring, ...] = ()
    waiting_worlds: frozenset[str] = frozenset()  # worlds with a restore() that has no answer yet
    granted_worlds: frozenset[str] = frozenset()  # worlds with a slot in hand
    staged: tuple[StagedState, ...] = ()
    running: frozenset[str] = frozenset()
    settled: frozenset[str] = frozenset()
    verified: frozenset[tuple[str, str]] = frozenset()
    failed: Mapping[str, str] = field(default_factory=dict)  # decision id -> why it cannot be staged here
    has_memory: bool = False  # anything of the run lies here, its owner's name aside

    @property
    def digests(self) -> frozenset[str]:
        return frozenset(shard.digest for shard in self.shards)


def deadline_s(size_bytes: int) -> float:
    """Time for moving ``size_bytes``."""
    return BASE_DEADLINE_S + size_bytes / FLOOR_BYTES_PER_S


def storage_deadline_s(size_bytes: int) -> float:
    """How long reading that much from durable storage may take before it counts as stuck."""
    return STORAGE_DEADLINE_S + size_bytes / STORAGE_FLOOR_BYTES_PER_S


def plan_actions(view: View) -> list[Action]:
    """The actions that bring this node nearer to what is desired, in the order in which they must happen."""
    desired = view.desired
    if desired.forget:
        phases = {session.phase for session in view.sessions}
        is_left = view.has_memory or SessionPhase.ENDED in phases
        return [ForgetRun()] if is_left and SessionPhase.TRAINING not in phases else []
    actions: list[Action] = []
    if desired.world_id and any(world != desired.world_id for world in view.granted_worlds):
        actions.append(FenceWorld(world_id=desired.world_id))
    wanted_jobs = [*_suspects(view), *_encode(view), *_rebuild(view), *_stage(view), *_copy(view)]
    wanted = {action.key for action in wanted_jobs}
    actions += [CancelTask(key=key) for key in sorted(view.running) if key not in wanted]
    held = {shard.key for shard in view.shards} | {plan.key for plan in view.plans.values()}
    actions += [ReleaseSnapshot(key=key) for key in desired.release if key in held]
    actions += [DropPlan(plan_id=plan_id) for plan_id in desired.drop_plans if plan_id in view.plans]
    actions += _misfits(view)
    actions += _discard(view)
    actions += [action for action in wanted_jobs if action.key not in view.running | view.settled]
    actions += _decide(view)
    return actions


def staging_of(view: View) -> Staging | None:
    """This node's answer to the decision, None when it is no host of it."""
    decision = view.desired.decision
    if decision is None or view.node not in {place.node for place in decision.placements}:
        return None
    if view.decision is not None and view.decision.decision_id == decision.decision_id:
        return Staging(decision_id=decision.decision_id, state=StagingState.RECORDED)
    if decision.decision_id in view.failed:
        reason = view.failed[decision.decision_id]
        return Staging(decision_id=decision.decision_id, state=StagingState.FAILED, reason=reason)
    sources = _sources(view, decision)
    done = [source for source in sources if (decision.decision_id, source.digest) in view.verified]
    is_ready = len(done) == len(sources) and not unstaged_ranks(view, decision)
    return Staging(
        decision_id=decision.decision_id,
        state=StagingState.READY if is_ready else StagingState.STAGING,
        done_bytes=sum(source.size_bytes for source in done),
        total_bytes=sum(source.size_bytes for source in sources),
    )


def wanted_ranks(view: View, decision: Decision) -> frozenset[int]:
    """Ranks whose whole shards the trainers of that world on this node will read."""
    if base_size(decision) != decision.world_size:
        return frozenset()
    choosing = _choosing(view, decision)
    ranks = {place.rank for place in decision.placements if place.node == view.node} - set(choosing)
    for session in view.sessions:
        if session.world_id == decision.world_id and session.rank not in choosing:
            ranks |= {session.rank, *session.needs}
    return frozenset(ranks)


def unstaged_ranks(view: View, decision: Decision) -> frozenset[int]:
    """Ranks of that world on this node that choose chunks of another layout and have not said that they have them all."""
    choosing = _choosing(view, decision)
    ranks = {rank for rank, staged in choosing.items() if staged != decision.decision_id}
    if decision.base is not None and base_size(decision) != decision.world_size:
        ranks |= {place.rank for place in decision.placements if place.node == view.node} - set(choosing)
    return frozenset(ranks)


def _choosing(view: View, decision: Decision) -> dict[int, str]:
    """Ranks here that hold another layout than the base, and the decision each has staged."""
    return {
        trainer.rank: trainer.staged
        for trainer in view.restoring
        if trainer.world_id == decision.world_id and not takes_whole(decision, rank=trainer.rank, layout=trainer.layout)
    }


def rebuilt_bytes(view: View) -> tuple[int, int]:
    """(done, total) bytes of the shards that are rebuilt onto this node."""
    done = total = 0
    staged = {state.digest16: state for state in view.staged}
    for rebuild in view.desired.rebuilds:
        for target in rebuild.targets:
            if target.node != view.node:
                continue
            size = _target_size(rebuild, target)
            total += size
            state = staged.get(target.digest[:16])
            if target.digest in view.digests:
                done += size
            elif state is not None:
                stripes = max(1, rebuild.plan.k)
                done += size * (stripes - min(stripes, len(state.missing.get(rebuild.rebuild_id, ())))) // stripes
    return done, total


def _misfits(view: View) -> list[SetAside]:
    """Parity here of which a reader has proven that it does not fit its stripe: its own digests would say nothing."""
    return [
        SetAside(fragment=fragment, reason=mark.reason)
        for mark in view.desired.suspects
        for fragment in view.fragments
        if mark.is_misfit and fragment == FragmentRecord(plan_id=mark.plan_id, stripe=mark.stripe, index=mark.index)
    ]


def _suspects(view: View) -> list[StartJob]:
    """Look at what a reader elsewhere found corrupt here: if it is, it is put aside; if not, the reader's word runs out."""
    jobs = []
    for mark in view.desired.suspects:
        if mark.is_misfit:
            continue
        key = f"suspect:{mark.attempt}:{mark.step}:{mark.rank}:{mark.plan_id}:{mark.stripe}:{mark.index}"
        plan = view.plans.get(mark.plan_id)
        if plan is not None:
            job = VerifyFragment(plan=plan, stripe=mark.stripe, index=mark.index)
            jobs.append(StartJob(key=key, job=job))
        for shard in view.shards:
            if (shard.attempt, shard.step, shard.rank) == (mark.attempt, mark.step, mark.rank):
                verify = VerifyShard(
                    run=view.desired.run,
                    attempt=shard.attempt,
                    step=shard.step,
                    rank=shard.rank,
                    world_size=shard.world_size,
                    digest=shard.digest,
                    deadline_s=deadline_s(shard.size_bytes),
                )
                jobs.append(StartJob(key=key, job=verify))
    return jobs


def _encode(view: View) -> list[StartJob]:
    jobs = []
    for plan in view.desired.plans:
        for stripe, member in enumerate(plan.members):
            if member.node == view.node and member.incarnation == view.incarnation:
                size = fragment_bytes(plan, stripe) * len(plan.members)
                job = EncodeStripe(plan=plan, stripe=stripe, deadline_s=deadline_s(size))
                jobs.append(StartJob(key=encode_key(plan), job=job))
    return jobs


def encode_key(plan: Plan) -> str:
    return f"encode:{plan.plan_id}"


def record_key(decision: Decision) -> str:
    return f"record:{decision.decision_id}"


def _rebuild(view: View) -> list[StartJob | PrepareTarget]:
    wanted: list[StartJob | PrepareTarget] = []
    for rebuild in view.desired.rebuilds:
        for target in rebuild.targets:
            if target.node == view.node and target.digest not in view.digests:
                wanted.append(_own_target(view, rebuild, target))
        for task in rebuild.tasks:
            if task.decoder == view.node:
                job = DecodeStripe(
                    rebuild=rebuild,
                    stripe=task.stripe,
                    deadline_s=deadline_s(fragment_bytes(rebuild.plan, task.stripe) * rebuild.plan.k),
                )
                wanted.append(StartJob(key=f"decode:{rebuild.rebuild_id}:{task.stripe}", job=job))
    return wanted


def _own_target(view: View, rebuild: Rebuild, target: RebuildTarget) -> StartJob | PrepareTarget:
    """The next thing to do for a shard that is rebuilt onto this node; waiting for stripes is doing nothing new."""
    plan = rebuild.plan
    name = f"{rebuild.rebuild_id}:{target.rank}"
    if plan.plan_id not in view.plans:
        own = view.peers.get(view.node, "")
        addresses = [source.bulk_address for task in rebuild.tasks for source in task.sources]
        addresses += [view.peers[task.decoder] for task in rebuild.tasks if task.decoder in view.peers]
        addresses = [address for address in dict.fromkeys(addresses) if address != own]
        job = FetchPlan(plan=plan, addresses=tuple(addresses), deadline_s=BASE_DEADLINE_S)
        return StartJob(key=f"fetch-plan:{name}", job=job)
    staged = next((state for state in view.staged if state.digest16 == target.digest[:16]), None)
    if staged is None or rebuild.rebuild_id not in staged.missing or staged.missing[rebuild.rebuild_id]:
        return PrepareTarget(key=f"prepare:{name}", rebuild=rebuild, target=target)
    size = _target_size(rebuild, target)
    verify = VerifyShard(
        run=plan.run,
        attempt=plan.attempt,
        step=plan.step,
        rank=target.rank,
        world_size=plan.world_size,
        digest=target.digest,
        is_staged=True,
        deadline_s=deadline_s(size),
    )
    return StartJob(key=f"verify-staged:{name}", job=verify)


def _target_size(rebuild: Rebuild, target: RebuildTarget) -> int:
    shards = rebuild.plan.members[target.member_index].shards
    return next((shard.size_bytes for shard in shards if shard.rank == target.rank), 0)


def _is_open(view: View) -> bool:
    """Whether the decision still has to be staged here."""
    decision = view.desired.decision
    if decision is None or decision.base is None or decision.decision_id in view.failed:
        return False
    is_recorded = view.decision is not None and view.decision.decision_id == decision.decision_id
    return not is_recorded and view.desired.decision_phase in (DecisionPhase.PREPARE, DecisionPhase.RECORD)


def _sources(view: View, decision: Decision) -> list[ShardSource]:
    wanted = wanted_ranks(view, decision)
    return [source for source in decision.sources if source.rank in wanted]


def _stage(view: View) -> list[StartJob]:
    decision = view.desired.decision
    if decision is None or decision.base is None:
        return []
    rebuilt_here = {t.digest for r in view.desired.rebuilds for t in r.targets if t.node == view.node}
    jobs = []
    for source in _sources(view, decision) if _is_open(view) else _unopened(view, decision):
        if (decision.decision_id, source.digest) in view.verified:
            continue
        if source.digest in view.digests:
            jobs.append(_verify(decision, source))
        elif source.digest not in rebuilt_here:
            fetch = _fetch(view, decision, source)
            if fetch is not None:
                jobs.append(fetch)
    return jobs


def is_handing_out(view: View) -> bool:
    """Whether trainers here may still be given what was verified for the decision."""
    decision = view.desired.decision
    if decision is None:
        return False
    is_coming = view.desired.decision_phase in (DecisionPhase.PREPARE, DecisionPhase.RECORD)
    return is_coming or any(trainer.world_id == decision.world_id for trainer in view.restoring)


def _unopened(view: View, decision: Decision) -> list[ShardSource]:
    """Persisted files that trainers wait for and that a former daemon of this node, which recorded the decision, had open."""
    phases = (DecisionPhase.RECORD, DecisionPhase.RELEASE)
    if view.desired.decision_phase not in phases or decision.world_id not in view.waiting_worlds:
        return []
    if decision.base is None or not is_local(decision.base.url) or decision.decision_id in view.failed:
        return []
    return [
        source
        for source in _sources(view, decision)
        if source.kind is SourceKind.PERSISTED
        and source.digest not in view.digests
        and (decision.decision_id, source.digest) not in view.verified
    ]


def _verify(decision: Decision, source: ShardSource) -> StartJob:
    assert decision.base is not None
    job = VerifyShard(
        run=decision.run,
        attempt=decision.base.attempt,
        step=decision.base.step,
        rank=source.rank,
        world_size=base_size(decision),
        digest=source.digest,
        deadline_s=deadline_s(source.size_bytes),
    )
    return StartJob(key=f"verify:{decision.decision_id}:{source.rank}", job=job)


def _fetch(view: View, decision: Decision, source: ShardSource) -> StartJob | None:
    """Copy from the holders; a shard that is being rebuilt elsewhere is asked for until it is there."""
    assert decision.base is not None
    if source.kind is SourceKind.PERSISTED and decision.base.url:
        return _fetch_persisted(decision, source)
    holders = [name for name in source.holders if name != view.node and name in view.peers]
    if not holders or (source.kind is SourceKind.REBUILD and view.node in source.holders):
        return None
    job = FetchShard(
        run=decision.run,
        attempt=decision.base.attempt,
        step=decision.base.step,
        rank=source.rank,
        world_size=base_size(decision),
        size_bytes=source.size_bytes,
        digest=source.digest,
        addresses=tuple(view.peers[name] for name in holders),
        deadline_s=deadline_s(source.size_bytes),
    )
    return StartJob(key=f"fetch:{decision.decision_id}:{source.rank}", job=job)


def _copy(view: View) -> list[StartJob]:
    """Shards of nodes that will be stopped, brought here whole while those nodes live."""
    jobs = []
    for copy in view.desired.copies:
        holders = [name for name in copy.holders if name != view.node and name in view.peers]
        if copy.digest in view.digests or not holders:
            continue
        job = FetchShard(
            run=view.desired.run,
            attempt=copy.attempt,
            step=copy.step,
            rank=copy.rank,
            world_size=copy.world_size,
            size_bytes=copy.size_bytes,
            digest=copy.digest,
            addresses=tuple(view.peers[name] for name in holders),
            deadline_s=deadline_s(copy.size_bytes),
        )
        jobs.append(StartJob(key=f"copy:{copy.digest}", job=job))
    return jobs


def _fetch_persisted(decision: Decision, source: ShardSource) -> StartJob:
    """Copy from durable storage what is in no memory; a file of this machine is verified where it lies."""
    assert decision.base is not None
    is_here = is_local(decision.base.url)
    kind: type[VerifyPersisted | FetchPersisted] = VerifyPersisted if is_here else FetchPersisted
    job = kind(
        run=decision.run,
        attempt=decision.base.attempt,
        step=decision.base.step,
        rank=source.rank,
        world_size=decision.base.world_size or decision.world_size,
        size_bytes=source.size_bytes,
        digest=source.digest,
        url=decision.base.url,
        deadline_s=storage_deadline_s(source.size_bytes),
    )
    return StartJob(key=f"{'verify-stored' if is_here else 'fetch'}:{decision.decision_id}:{source.rank}", job=job)


def _discard(view: View) -> list[DiscardStaged]:
    """Staging that nothing wants any more; only while the run goes on, so that a recovery never loses what it gathered."""
    desired = view.desired
    if not desired.world_id or (desired.decision is not None and _is_open(view)):
        return []
    if desired.decision_phase in (DecisionPhase.PREPARE, DecisionPhase.RECORD):
        return []
    wanted = {target.digest[:16] for rebuild in desired.rebuilds for target in rebuild.targets}
    wanted |= {copy.digest[:16] for copy in desired.copies}
    return [
        DiscardStaged(rank=state.rank, world_size=state.world_size, digest16=state.digest16)
        for state in view.staged
        if state.digest16 not in wanted
    ]


def _decide(view: View) -> list[Action]:
    desired, decision = view.desired, view.desired.decision
    if decision is None:
        return []
    is_waiting = decision.world_id in view.waiting_worlds
    if desired.decision_phase is DecisionPhase.REFUSE:
        return [RefuseWorld(decision=decision)] if is_waiting else []
    actions: list[Action] = []
    staging = staging_of(view)
    is_recorded = staging is not None and staging.state is StagingState.RECORDED
    is_ready = staging is not None and staging.state is StagingState.READY
    may_record = desired.decision_phase is DecisionPhase.RECORD and is_ready
    may_record |= desired.decision_phase is DecisionPhase.RELEASE  # a host of it, or one of the witnesses
    here = view.decision.generation.number if view.decision is not None else -1
    is_recorded |= view.decision is not None and view.decision.decision_id == decision.decision_id
    is_raised = is_recorded and here < decision.generation.number  # above those that other nodes came back with
    may_record &= record_key(decision) not in view.settled  # a failed try rests a while
    if may_record and (is_raised or (not is_recorded and here <= decision.generation.number)):
        actions.append(RecordDecision(decision=decision))
    if desired.decision_phase is DecisionPhase.RELEASE and is_waiting and not _unopened(view, decision):
        actions.append(ReleaseWorld(decision=decision))
    return actions
