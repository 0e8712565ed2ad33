"""What a node does next for one run: desired state and what is here, compared; actions out. Pure and level-triggered.

Called again after every change with everything it needs, so an action that failed or was forgotten comes up again.
"""

from __future__ import annotations

from backstay.ids import SnapshotKey
from backstayd.coder.jobs import (
    DecodeStripe,
    EncodeStripe,
    FetchPlan,
    FetchShard,
    VerifyFragment,
    VerifyShard,
)
from backstayd.core.inventory.durable_names import is_local
from backstayd.core.inventory.geometry import fragment_bytes
from backstayd.core.messages.decisions import Decision, DecisionPhase, ShardSource, SourceKind, StagingState, base_size
from backstayd.core.messages.plans import FragmentRecord, Rebuild, RebuildTarget
from backstayd.node.deadlines import BASE_DEADLINE_S, deadline_s, storage_deadline_s
from backstayd.node.reconcile.actions import (
    Action,
    CancelTask,
    DiscardStaged,
    DropPlan,
    FenceWorld,
    PrepareTarget,
    QuarantineParity,
    RecordDecision,
    RefuseWorld,
    ReleaseSnapshot,
    ReleaseWorld,
    StartJob,
    View,
)
from backstayd.node.reconcile.durable_planner import durable_jobs
from backstayd.node.reconcile.staging import staging_of, target_size, wanted_sources
from backstayd.node.reconcile.tasks import TaskKey, TaskKind
from backstayd.store.paths import ShardRef


def plan_actions(view: View) -> list[Action]:
    """The actions that bring this node nearer to desired state, in the order in which they must happen."""
    desired = view.desired
    actions: list[Action] = []
    if desired.world_id and any(world != desired.world_id for world in view.granted_worlds):
        actions.append(FenceWorld(world_id=desired.world_id))
    wanted_jobs = [
        *_suspects(view), *_encode(view), *_rebuild(view), *_stage(view), *_copy(view), *durable_jobs(view)
    ]  # fmt: skip
    wanted = {action.key for action in wanted_jobs}
    actions += [CancelTask(key=key) for key in sorted(view.running) if key not in wanted]
    held = {shard.key for shard in view.shards} | {plan.key for plan in view.plans.values()}
    actions += [ReleaseSnapshot(key=key) for key in desired.release if key in held]
    actions += [DropPlan(plan_id=plan_id) for plan_id in desired.drop_plans if plan_id in view.plans]
    actions += _misfits(view)
    actions += _discard(view)
    actions += _startable(view, wanted_jobs)
    actions += _decide(view)
    return actions


def _startable(view: View, wanted: list[StartJob | PrepareTarget]) -> list[StartJob | PrepareTarget]:
    """Those neither running nor settled, and only so many uploads as may run at once."""
    due = [action for action in wanted if action.key not in view.running | view.settled]
    uploads = [action for action in due if action.key.kind is TaskKind.UPLOAD]
    late = {action.key for action in uploads[view.free_uploads :]}
    return [action for action in due if action.key not in late]


def _misfits(view: View) -> list[QuarantineParity]:
    """Parity here that a reader has proven not to fit its stripe: its own digests match, so verifying it finds nothing."""
    return [
        QuarantineParity(fragment=fragment, reason=mark.reason)
        for mark in view.desired.suspects
        for fragment in view.fragments
        if mark.is_misfit and fragment == FragmentRecord(plan_id=mark.plan_id, stripe=mark.stripe, index=mark.index)
    ]


def _suspects(view: View) -> list[StartJob]:
    """Verify what a reader elsewhere found corrupt here: it is quarantined, or the reader's mark expires."""
    jobs = []
    for mark in view.desired.suspects:
        if mark.is_misfit:
            continue
        source = f"{mark.attempt}:{mark.step}:{mark.plan_id}:{mark.stripe}:{mark.index}"
        key = TaskKey(view.desired.run, TaskKind.CHECK_SUSPECT, source, mark.rank)
        plan = view.plans.get(mark.plan_id)
        if plan is not None:
            job = VerifyFragment(plan=plan, stripe=mark.stripe, index=mark.index)
            jobs.append(StartJob(key=key, job=job))
        for shard in view.shards:
            if (shard.attempt, shard.step, shard.rank) == (mark.attempt, mark.step, mark.rank):
                ref = ShardRef.of(view.desired.run, shard)
                verify = VerifyShard(shard=ref, deadline_s=deadline_s(shard.size_bytes))
                jobs.append(StartJob(key=key, job=verify))
    return jobs


def _encode(view: View) -> list[StartJob]:
    jobs = []
    for plan in view.desired.plans:
        for stripe, member in enumerate(plan.members):
            if member.node == view.node and member.incarnation == view.incarnation:
                size = fragment_bytes(plan, stripe) * len(plan.members)
                job = EncodeStripe(plan=plan, stripe=stripe, deadline_s=deadline_s(size))
                jobs.append(StartJob(key=TaskKey(plan.run, TaskKind.ENCODE, plan.plan_id), job=job))
    return jobs


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
                wanted.append(StartJob(key=_key(TaskKind.DECODE, rebuild, task.stripe), job=job))
    return wanted


def _key(kind: TaskKind, rebuild: Rebuild, index: int) -> TaskKey:
    return TaskKey(rebuild.plan.run, kind, rebuild.rebuild_id, index)


def _own_target(view: View, rebuild: Rebuild, target: RebuildTarget) -> StartJob | PrepareTarget:
    """The next action for a shard that is rebuilt onto this node; nothing new while stripes are missing."""
    plan = rebuild.plan
    if plan.plan_id not in view.plans:
        own = view.peers.get(view.node, "")
        addresses = [source.bulk_address for task in rebuild.tasks for source in task.sources]
        addresses += [view.peers[task.decoder] for task in rebuild.tasks if task.decoder in view.peers]
        addresses = [address for address in dict.fromkeys(addresses) if address != own]
        job = FetchPlan(plan=plan, addresses=tuple(addresses), deadline_s=BASE_DEADLINE_S)
        return StartJob(key=_key(TaskKind.FETCH_PLAN, rebuild, target.rank), job=job)
    missing = view.missing.get((rebuild.rebuild_id, target.digest[:16]))
    if missing is None or missing:
        return PrepareTarget(key=_key(TaskKind.PREPARE, rebuild, target.rank), rebuild=rebuild, target=target)
    size = target_size(rebuild, target)
    ref = ShardRef(run=plan.run, key=plan.key, rank=target.rank, world_size=plan.world_size, digest=target.digest)
    verify = VerifyShard(shard=ref, is_staged=True, deadline_s=deadline_s(size))
    return StartJob(key=_key(TaskKind.VERIFY_STAGED, rebuild, target.rank), job=verify)


def _is_open(view: View) -> bool:
    """Whether the decision still has to be staged here."""
    decision = view.desired.decision
    if decision is None or decision.base is None or decision.decision_id in view.failed:
        return False
    is_recorded = view.decision is not None and view.decision.decision_id == decision.decision_id
    return not is_recorded and view.desired.decision_phase in (DecisionPhase.PREPARE, DecisionPhase.RECORD)


def _stage(view: View) -> list[StartJob]:
    decision = view.desired.decision
    if decision is None or decision.base is None:
        return []
    rebuilt_here = {t.digest for r in view.desired.rebuilds for t in r.targets if t.node == view.node}
    jobs = []
    for source in wanted_sources(view, decision) if _is_open(view) else _files_to_reopen(view, decision):
        if (decision.decision_id, source.digest) in view.verified:
            continue
        if source.digest in view.digests:
            jobs.append(_verify(decision, source))
        elif source.digest not in rebuilt_here:
            fetch = _fetch(view, decision, source)
            if fetch is not None:
                jobs.append(fetch)
    return jobs


def _files_to_reopen(view: View, decision: Decision) -> list[ShardSource]:
    """Files of durable storage that trainers wait for, which the earlier daemon that recorded the decision had open."""
    phases = (DecisionPhase.RECORD, DecisionPhase.RELEASE)
    if view.desired.decision_phase not in phases or decision.world_id not in view.waiting_worlds:
        return []
    if decision.base is None or not is_local(decision.base.url) or decision.decision_id in view.failed:
        return []
    return [
        source
        for source in wanted_sources(view, decision)
        if source.kind is SourceKind.PERSISTED
        and source.digest not in view.digests
        and (decision.decision_id, source.digest) not in view.verified
    ]


def _ref(decision: Decision, source: ShardSource) -> ShardRef:
    base = decision.base
    assert base is not None
    return ShardRef(
        run=decision.run,
        key=SnapshotKey(base.attempt, base.step),
        rank=source.rank,
        world_size=base_size(decision),
        digest=source.digest,
    )


def _verify(decision: Decision, source: ShardSource) -> StartJob:
    job = VerifyShard(shard=_ref(decision, source), deadline_s=deadline_s(source.size_bytes))
    return StartJob(key=TaskKey(decision.run, TaskKind.VERIFY, decision.decision_id, source.rank), job=job)


def _fetch(view: View, decision: Decision, source: ShardSource) -> StartJob | None:
    """Copy from the holders; a shard that is being rebuilt elsewhere is requested until it is there."""
    assert decision.base is not None
    if source.kind is SourceKind.PERSISTED and decision.base.url:
        return _fetch_persisted(decision, source)
    holders = [name for name in source.holders if name != view.node and name in view.peers]
    if not holders or (source.kind is SourceKind.REBUILD and view.node in source.holders):
        return None
    job = FetchShard(
        shard=_ref(decision, source),
        size_bytes=source.size_bytes,
        addresses=tuple(view.peers[name] for name in holders),
        deadline_s=deadline_s(source.size_bytes),
    )
    return StartJob(key=TaskKey(decision.run, TaskKind.FETCH, decision.decision_id, source.rank), job=job)


def _fetch_persisted(decision: Decision, source: ShardSource) -> StartJob:
    """Copy from durable storage what no memory holds; a file on this machine is verified in place."""
    assert decision.base is not None
    ref, url, size_bytes = _ref(decision, source), decision.base.url, source.size_bytes
    limit_s = storage_deadline_s(size_bytes)
    if is_local(url):
        key = TaskKey(decision.run, TaskKind.VERIFY_STORED, decision.decision_id, source.rank)
        return StartJob(key=key, job=VerifyShard(shard=ref, url=url, deadline_s=limit_s))
    key = TaskKey(decision.run, TaskKind.FETCH, decision.decision_id, source.rank)
    return StartJob(key=key, job=FetchShard(shard=ref, size_bytes=size_bytes, url=url, deadline_s=limit_s))


def _copy(view: View) -> list[StartJob]:
    """Whole shards of nodes that will be stopped, copied here while those nodes are up."""
    jobs = []
    for copy in view.desired.copies:
        holders = [name for name in copy.holders if name != view.node and name in view.peers]
        if copy.digest in view.digests or not holders:
            continue
        job = FetchShard(
            shard=ShardRef.of(view.desired.run, copy),
            size_bytes=copy.size_bytes,
            addresses=tuple(view.peers[name] for name in holders),
            deadline_s=deadline_s(copy.size_bytes),
        )
        jobs.append(StartJob(key=TaskKey(view.desired.run, TaskKind.COPY, copy.digest, copy.rank), job=job))
    return jobs


def _discard(view: View) -> list[DiscardStaged]:
    """Staging that nothing needs any more; only while the run trains, so that a recovery never loses what it gathered."""
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


def record_key(decision: Decision) -> TaskKey:
    return TaskKey(decision.run, TaskKind.RECORD, decision.decision_id)


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
    may_record |= desired.decision_phase is DecisionPhase.RELEASE  # a host of it, or a recorder
    here = view.decision.generation.number if view.decision is not None else -1
    is_recorded |= view.decision is not None and view.decision.decision_id == decision.decision_id
    is_raised = is_recorded and here < decision.generation.number  # above the generations of nodes that returned
    may_record &= record_key(decision) not in view.settled  # after a failure it is tried again later
    if may_record and (is_raised or (not is_recorded and here <= decision.generation.number)):
        actions.append(RecordDecision(decision=decision))
    if desired.decision_phase is DecisionPhase.RELEASE and is_waiting and not _files_to_reopen(view, decision):
        actions.append(ReleaseWorld(decision=decision))
    return actions
