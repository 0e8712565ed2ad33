"""Doing what :mod:`planning` says: jobs for the coders, changes of the store, answers to waiting trainers.

Level-triggered: every event only asks for another pass. Decides nothing that the coordinator decides.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from backstay.errors import BackstayError, CapacityError, SnapshotNotFoundError
from backstay.ids import SnapshotKey
from backstay.protocol import messages
from backstayd.coder.jobs import (
    CoderEvent,
    Corrupt,
    DecodeStripe,
    EncodeStripe,
    FetchPersisted,
    FetchPlan,
    FetchShard,
    Job,
    JobResult,
    VerifyPersisted,
    VerifyShard,
)
from backstayd.coder.pool import CoderPool
from backstayd.core.inventory.readers import takes_whole
from backstayd.core.messages.decisions import Decision, DecisionPhase, Staging
from backstayd.core.messages.desired import NodeDesired, RunDesired
from backstayd.core.messages.plans import FragmentRecord
from backstayd.core.messages.report import SessionPhase
from backstayd.node.drain_state import FailedCopies
from backstayd.node.node_state import NodeContext
from backstayd.node.reconcile import actions
from backstayd.node.reconcile.actions import Action, Restoring, StagedState, View
from backstayd.node.reconcile.forget import Burying
from backstayd.node.reconcile.quarantine import BadSources
from backstayd.node.reconcile.tasks import Tasks
from backstayd.node.restores import restore_answers
from backstayd.node.restores.open_files import HandingOut
from backstayd.node.trainers import gate_relay
from backstayd.node.trainers.ownership import adopt_owner
from backstayd.node.trainers.session import Session
from backstayd.node.trainers.sessions import Sessions
from backstayd.store import admit, published, remove
from backstayd.store.index import RunIndex
from backstayd.store.record_files import canonical_bytes
from backstayd.store.staging import missing_stripes, prepare_staging, remove_staging

logger = logging.getLogger(__name__)

MAX_TRIES: Final = 4
MAX_FAILED: Final = 100  # decisions; plans per run
MAX_VERIFIED: Final = 10_000
STRIPE_POLL_S: Final = 0.5  # an event of a coder that died may be lost; the markers are the truth


class Reconciler:
    """Brings the node to its desired state. Owns the desired state and all tasks."""

    def __init__(self, context: NodeContext, sessions: Sessions) -> None:
        self._context = context
        self._store = context.store
        self._sessions = sessions
        self.tasks = Tasks(context.clock, self.kick, last_pause_s=max(0.5, context.lease_s / 3))
        self.peers: dict[str, str] = {}
        self.bad_sources = BadSources(context, self._say)
        self.failed_plans: dict[str, list[str]] = {}
        self.failed_copies = FailedCopies(context.lease_s, context.changed)
        self._burying = Burying(context, sessions, self._note_forgotten)
        self._verified: dict[tuple[str, str], None] = {}
        self._failed: dict[str, str] = {}
        self._handing_out = HandingOut()
        self._said: dict[str, Staging | None] = {}
        self._coordinator = ""
        self._is_kicked = False
        self._is_closed = False
        self.owed_since_s = 0.0  # when the pass that is still to succeed was first asked for
        self._pool: CoderPool | None = None
        self.tidy: Callable[[Mapping[str, set[str]]], None] = lambda wanted: None
        self._run_storage_job: Callable[[Job], Awaitable[JobResult]] | None = None

    def attach_pool(self, pool: CoderPool, run_storage_job: Callable[[Job], Awaitable[JobResult]]) -> None:
        self._pool = pool
        self._run_storage_job = run_storage_job

    async def close(self) -> None:
        self._is_closed = True
        await self.tasks.close()
        self._handing_out.keep(())

    def on_desired(self, desired: NodeDesired) -> None:
        """Take over what the coordinator says, unless it is an older coordinator or an older word."""
        try:
            if not self._store.admit_generation(desired.generation):
                logger.debug(
                    "ignored generation %s; %s is the highest seen", desired.generation, self._store.generation
                )
                return
        except OSError as error:
            logger.error("cannot store generation %s: %s", desired.generation, error)
            return
        self._context.drain.obey(desired.drain)
        runs = {run.run: run for run in desired.runs}
        if desired.generation.incarnation != self._coordinator:
            # a new coordinator has not looked at every run yet: what it does not mention stays as it was
            kept = {name: run for name, run in self._context.desired.items() if not run.forget}
            runs = kept | runs
            if len(runs) == len(desired.runs):
                self._coordinator = desired.generation.incarnation
        self.peers = {peer.name: peer.bulk_address for peer in desired.peers}
        is_new = runs != self._context.desired
        self._context.desired = runs
        for run, wanted in runs.items():
            self._store.parity_fraction[run] = wanted.parity_fraction
            if not wanted.forget:
                self._remember(run, wanted)
        self._burying.on_desired(desired)
        if is_new:
            self._context.bell.ring()
        self.kick()

    def _remember(self, run: str, wanted: RunDesired) -> None:
        """Keep whose run it is and what nobody should restore, as long as anything of the run is here."""
        try:
            if run in self._store.runs:
                gate_relay.remember(self._context, run, wanted.distrusted, wanted.trusted)
                adopt_owner(self._context, run, wanted.owner, has_memory=lambda: self.view(run).has_memory)
        except OSError as error:
            logger.error("run %s: cannot keep whose it is and which snapshots are distrusted: %s", run, error)

    def on_event(self, event: CoderEvent) -> None:
        """Take what a coder stored into the index."""
        if self._burying.is_over(event.run):
            self._store.forget(event.run)
            return
        key = SnapshotKey(event.attempt, event.step)
        try:
            if event.kind == "plan_stored":
                admit.note_plan(self._store, event.run, key, event.plan_id)
            elif event.kind == "fragment_stored":
                fragment = FragmentRecord(plan_id=event.plan_id, stripe=event.stripe, index=event.index)
                admit.note_fragment(self._store, event.run, key, fragment)
            elif event.kind in ("stripe_staged", "shard_staged"):
                admit.note_staged(
                    self._store, event.run, rank=event.rank, world_size=event.world_size, digest=event.digest
                )
        except (BackstayError, OSError) as error:
            logger.error("run %s: what a coder stored is not used: %s", event.run, error)
        self._context.changed()
        self.kick()

    def kick(self) -> None:
        """Look again soon."""
        if not self._is_kicked and not self._is_closed:
            self._is_kicked = True
            self.owed_since_s = self.owed_since_s or self._context.clock.monotonic_s()
            asyncio.get_running_loop().call_soon(self._pass)

    def view(self, run: str) -> View:
        """One run as the planner sees it."""
        index = self._store.runs.get(run) or RunIndex(run=run)
        desired = self._context.run_desired(run)
        sessions = self._sessions.of_run(run)
        return View(
            node=self._context.identity.name,
            incarnation=self._context.identity.incarnation,
            desired=desired,
            peers=self.peers,
            shards=tuple(held.record for held in index.shards.values()),
            fragments=frozenset(index.fragments),
            plans=dict(index.plans),
            decision=index.decision,
            sessions=tuple(session.record() for session in sessions),
            restoring=tuple(
                Restoring(world_id=s.world_id, rank=s.rank, layout=s.layout, staged=s.staged)
                for s in sessions
                if s.phase is SessionPhase.RESTORING
            ),
            waiting_worlds=frozenset(
                s.world_id
                for s in sessions
                if s.answer is not None and not s.answer.done() and self.offer_due(s) is None
            ),
            granted_worlds=frozenset(session.world_id for session in sessions if session.grants),
            staged=self._staged(index),
            running=self.tasks.running(run),
            settled=self.tasks.settled(run),
            verified=frozenset(
                mark for mark in self._verified if desired.decision and mark[0] == desired.decision.decision_id
            ),
            failed=self._failed,
            has_memory=bool(index.shards or index.plans or index.slots or index.staged or index.decision),
        )

    def offer_due(self, session: Session) -> Decision | None:
        """The decision whose snapshot a waiting trainer must choose chunks of; None if it need not."""
        desired = self._context.run_desired(session.run)
        decision = desired.decision
        if (
            decision is None
            or decision.base is None
            or decision.world_id != session.world_id
            or desired.decision_phase is DecisionPhase.REFUSE
            or decision.decision_id in (session.staged, *self._failed)
            or takes_whole(decision, rank=session.rank, layout=session.layout)
        ):
            return None
        return decision

    def is_current(self, run: str, decision_id: str) -> bool:
        """Whether the coordinator still wants that decision, and this node has not given it up."""
        decision = self._context.run_desired(run).decision
        return decision is not None and decision.decision_id == decision_id and decision_id not in self._failed

    def staging(self, run: str) -> Staging | None:
        return actions.staging_of(self.view(run))

    def progress(self, session: Session) -> messages.Progress:
        """What a waiting restore() is told."""
        return restore_answers.progress(self._context, session, self.staging)

    def _staged(self, index: RunIndex) -> tuple[StagedState, ...]:
        paths = self._store.paths(index.run)
        found = []
        for staged in index.staged.values():
            missing = {}
            for rebuild in self._context.run_desired(index.run).rebuilds:
                for target in rebuild.targets:
                    if target.digest[:16] == staged.digest16 and target.node == self._context.identity.name:
                        missing[rebuild.rebuild_id] = missing_stripes(
                            paths, rebuild.plan, member=target.member_index, rank=target.rank
                        )
            found.append(
                StagedState(
                    rank=staged.rank,
                    world_size=staged.world_size,
                    digest16=staged.digest16,
                    size_bytes=staged.size_bytes,
                    missing=missing,
                )
            )
        return tuple(found)

    def _pass(self) -> None:
        self._is_kicked = False
        if self._is_closed:
            return
        self._burying.act()
        has_acted = False
        handed_out, said = set(), self._said
        self._said = {}
        for run in list(self._context.desired):
            view = self.view(run)
            if view.desired.decision is not None and actions.is_handing_out(view):
                handed_out.add(view.desired.decision.decision_id)
            self._sessions.drop_ended(run, view.desired.world_id)
            due = actions.plan_actions(view)
            self._said[run] = actions.staging_of(view)
            has_acted |= bool(due) or self._said[run] != said.get(run)  # ready with nothing to do, too
            for action in due:
                try:
                    self._do(run, action)
                except (BackstayError, OSError) as error:
                    logger.error("run %s: %s failed: %s", run, type(action).__name__, error)
        for mark in self._handing_out.keep(handed_out):
            self._verified.pop(mark, None)
        self.tidy(self._restored_digests())
        self.owed_since_s = self._context.clock.monotonic_s() if self._is_kicked else 0.0
        if has_acted:
            self._context.notify()

    def _restored_digests(self) -> dict[str, set[str]]:
        """Per run the shards that some trainer here still restores from: of its offer and of the decision now."""
        wanted: dict[str, set[str]] = {}
        for session in self._sessions:
            if session.phase is SessionPhase.RESTORING:
                for origin in (session.offered, self._context.run_desired(session.run).decision):
                    sources = origin.sources if origin is not None else ()
                    wanted.setdefault(session.run, set()).update(source.digest for source in sources)
        return wanted

    def _do(self, run: str, action: Action) -> None:
        store = self._store
        if isinstance(action, actions.StartJob):
            self._start_job(run, action)
        elif isinstance(action, actions.PrepareTarget):
            self.tasks.start(action.key, run, lambda: self._prepare(run, action))
        elif isinstance(action, actions.CancelTask):
            self.tasks.cancel(action.key)
        elif isinstance(action, actions.FenceWorld):
            self._sessions.fence(run, action.world_id)
        elif isinstance(action, actions.ReleaseSnapshot):
            remove.release_snapshot(store, run, action.key)
            self._context.bell.ring()
        elif isinstance(action, actions.DropPlan):
            remove.drop_plan(store, run, action.plan_id)
        elif isinstance(action, actions.DiscardStaged):
            self._discard(run, action)
        elif isinstance(action, actions.SetAside):
            self.bad_sources.set_aside(run, action.fragment, action.reason)
        elif isinstance(action, actions.RecordDecision):
            self._record(run, action.decision)
        elif isinstance(action, actions.ReleaseWorld):
            self._release_world(action.decision)
        elif isinstance(action, actions.RefuseWorld):
            self._refuse_world(action.decision)
        elif isinstance(action, actions.ForgetRun):
            self._forget(run)

    def _record(self, run: str, decision: Decision) -> None:
        """Keep the decision; where that fails before the release, the coordinator hears of it and decides anew."""
        key = actions.record_key(decision)
        try:
            self._store.record_decision(decision)
        except (BackstayError, OSError) as error:
            count = self.tasks.fail(key, run)
            if self._context.run_desired(run).decision_phase is DecisionPhase.RECORD:
                self.fail_decision(run, decision.decision_id, f"its record cannot be written: {error}")
            elif count == 1:
                logger.error("run %s: decision %s cannot be kept here: %s", run, decision.decision_id[:8], error)
            return
        self._say("recorded", run, f"decision {decision.decision_id[:8]}: attempt {decision.attempt}")
        self.kick()

    def _start_job(self, run: str, action: actions.StartJob) -> None:
        work: Callable[[], Awaitable[None]] = lambda: self._run_job(run, action.key, action.job)  # noqa: E731
        self.tasks.start(action.key, run, work)

    async def _run_job(self, run: str, key: str, job: Job) -> None:
        assert self._pool is not None
        if isinstance(job, (FetchShard, FetchPersisted)):
            try:
                self._store.require_room(job.size_bytes, f"run {run}: staging rank {job.rank} of step {job.step}")
            except CapacityError as error:
                self._refuse_room(run, key, job, error)
                return
        if isinstance(job, (FetchPersisted, VerifyPersisted)):
            assert self._run_storage_job is not None
            result = await self._run_storage_job(job)
            if isinstance(job, VerifyPersisted) and not result.error_class:
                result = await self._handing_out.take(key.split(":")[1], job, result)
        else:
            result = await self._pool.run(job)
        if self._burying.is_over(run):
            self._store.forget(run)
            return
        for corrupt in result.corrupt:
            self.quarantine(corrupt)
        for what, count in result.moved.items():
            self._context.metrics.protect_bytes.of(run, what=what).inc(count)
        if result.error_class:
            self._job_failed(run, key, job, result)
        else:
            self._job_done(run, key, job)

    def _job_done(self, run: str, key: str, job: Job) -> None:
        if isinstance(job, DecodeStripe):
            # puts are harmless twice; if the owner lost its staging meanwhile, this is done again
            self.tasks.settle(key, run, for_s=2 * self._context.lease_s + job.deadline_s / 4)
            return
        if key.startswith("suspect:"):
            self.tasks.settle(key, run, for_s=self._context.lease_s)
            return
        if isinstance(job, VerifyPersisted):  # not settled: once it is closed, it may be wanted again
            self._note_verified(key.split(":")[1], job.digest)
            self._say("staged", run, f"verified rank {job.rank} of step {job.step} in {job.url}")
            self._context.changed()
            return
        if isinstance(job, VerifyShard) and job.is_staged:
            self._publish(run, job)
            self._context.metrics.shards_rebuilt.of(run).inc()
            self._say("rebuild", run, f"rebuilt rank {job.rank} of step {job.step}")
        elif isinstance(job, (FetchShard, FetchPersisted)):
            self._publish(run, job)
            where = job.url if isinstance(job, FetchPersisted) else "a peer"
            self._say("staged", run, f"copied rank {job.rank} of step {job.step} from {where}")
            if key.startswith("copy:"):
                self.tasks.settle(key, run, for_s=self._context.lease_s)  # once it is released it may be wanted again
                return
        elif isinstance(job, VerifyShard):
            self._note_verified(self._decision_id(run), job.digest)
        elif isinstance(job, FetchPlan):
            admit.note_plan(self._store, run, job.plan.key, job.plan.plan_id)
            return
        elif isinstance(job, EncodeStripe):
            admit.note_plan(self._store, run, job.plan.key, job.plan.plan_id)
            if job.plan.m:
                own = FragmentRecord(plan_id=job.plan.plan_id, stripe=job.stripe, index=0)
                admit.note_fragment(self._store, run, job.plan.key, own)
        self.tasks.settle(key, run)
        self._context.changed()

    def _publish(self, run: str, job: VerifyShard | FetchShard | FetchPersisted) -> None:
        admit.publish_staged(self._store, run, rank=job.rank, world_size=job.world_size, digest=job.digest)
        self._note_verified(self._decision_id(run), job.digest)
        self._context.changed()

    def _decision_id(self, run: str) -> str:
        decision = self._context.run_desired(run).decision
        return decision.decision_id if decision is not None else ""

    def _note_verified(self, decision_id: str, digest: str) -> None:
        while len(self._verified) >= MAX_VERIFIED:
            del self._verified[next(iter(self._verified))]
        self._verified[decision_id, digest] = None

    def _job_failed(self, run: str, key: str, job: Job, result: JobResult) -> None:
        count = self.tasks.fail(key, run)
        level = logging.WARNING if count in (1, MAX_TRIES) else logging.DEBUG
        logger.log(level, "run %s: %s failed (%d): %s", run, key.partition(":")[0], count, result.message)
        if key.startswith("suspect:"):
            return
        if key.startswith("copy:") and isinstance(job, FetchShard):
            if count >= MAX_TRIES or result.error_class == "CapacityError":
                self.failed_copies.add(run, job.digest)
            return
        if isinstance(job, EncodeStripe) and (result.corrupt or count >= MAX_TRIES):
            self.tasks.settle(key, run)
            plans = self.failed_plans.setdefault(run, [])
            plans.append(job.plan.plan_id)
            del plans[:-MAX_FAILED]
        elif isinstance(job, VerifyShard) and job.is_staged and (result.corrupt or count >= MAX_TRIES):
            remove.discard_staged(self._store, run, rank=job.rank, world_size=job.world_size, digest=job.digest)
        elif isinstance(job, (FetchShard, FetchPersisted, VerifyPersisted, VerifyShard)) and not getattr(
            job, "is_staged", False
        ):
            is_rebuilding = any(
                target.digest == job.digest
                for rebuild in self._context.run_desired(run).rebuilds
                for target in rebuild.targets
            )
            if result.corrupt or (count >= MAX_TRIES and not is_rebuilding):
                self._fail_staging(run, key, f"rank {job.rank} of step {job.step}: {result.message}")
        self._context.changed()

    def _refuse_room(self, run: str, key: str, job: FetchShard | FetchPersisted, error: CapacityError) -> None:
        """There is no room for a whole shard from elsewhere."""
        if not key.startswith("copy:"):
            self._fail_staging(run, key, str(error))
            return
        logger.warning("run %s: a shard of a node that drains is not taken: %s", run, error)
        self.tasks.fail(key, run)
        self.failed_copies.add(run, job.digest)

    def _fail_staging(self, run: str, key: str, reason: str) -> None:
        """The decision that ``key`` names cannot be staged here: the coordinator decides anew."""
        self.tasks.settle(key, run)
        self.fail_decision(run, key.split(":")[1], reason)

    def fail_decision(self, run: str, decision_id: str, reason: str) -> None:
        """That decision cannot be staged here: the coordinator decides anew."""
        logger.error("run %s: decision %s cannot be staged here: %s", run, decision_id[:8], reason)
        while len(self._failed) > MAX_FAILED:
            del self._failed[next(iter(self._failed))]
        self._failed[decision_id] = reason
        self._context.changed()

    async def _prepare(self, run: str, action: actions.PrepareTarget) -> None:
        """Allocate staging for a rebuild target; while stripes are missing, look again now and then."""
        plan, target = action.rebuild.plan, action.target
        index, paths = self._store.index(run), self._store.paths(run)
        if (target.rank, target.digest[:16]) not in index.staged:
            try:
                stored, _ = published.read_plan(paths, plan)
                size = next(s.size_bytes for s in plan.members[target.member_index].shards if s.rank == target.rank)
                self._store.require_room(size, f"run {run}: rebuilding rank {target.rank} of step {plan.step}")
                raw = next(
                    raw
                    for raw in map(canonical_bytes, stored.manifests)
                    if hashlib.sha256(raw).hexdigest() == target.digest
                )
                incarnation = self._context.identity.incarnation
                await asyncio.to_thread(prepare_staging, paths, raw, digest=target.digest, incarnation=incarnation)
            except BackstayError as error:
                logger.warning("run %s: cannot take rank %d of step %d: %s", run, target.rank, plan.step, error)
                if isinstance(error, SnapshotNotFoundError):
                    index.plans.pop(plan.plan_id, None)
                self._fail_rebuild(run, action, error)
                return
            admit.note_staged(self._store, run, rank=target.rank, world_size=plan.world_size, digest=target.digest)
            self._context.changed()
        self.tasks.settle(action.key, run, for_s=STRIPE_POLL_S)

    def _fail_rebuild(self, run: str, action: actions.PrepareTarget, error: BackstayError) -> None:
        count = self.tasks.fail(action.key, run)
        decision = self._context.run_desired(run).decision
        if decision is not None and isinstance(error, CapacityError) and count >= MAX_TRIES:
            self._fail_staging(run, f"prepare:{decision.decision_id}", str(error))

    def _discard(self, run: str, action: actions.DiscardStaged) -> None:
        remove_staging(self._store.paths(run), rank=action.rank, world_size=action.world_size, digest=action.digest16)
        self._store.index(run).staged.pop((action.rank, action.digest16), None)

    def quarantine(self, corrupt: Corrupt) -> None:
        """Put a bad local source aside; name a bad remote one to the coordinator."""
        self.bad_sources.put_aside(corrupt, self.peers)

    def _release_world(self, decision: Decision) -> None:
        waiting = [
            session
            for session in self._sessions.waiting(decision.run, decision.world_id)
            if self.offer_due(session) is None
        ]
        restore_answers.release(self._context, self._handing_out, decision, waiting)
        self._say("released", decision.run, f"{decision.outcome.value}: {len(waiting)} trainers go on")
        self._context.bell.ring()

    def _refuse_world(self, decision: Decision) -> None:
        restore_answers.refuse(decision, self._sessions.waiting(decision.run, decision.world_id))
        self._say("refused", decision.run, decision.message)
        self._context.bell.ring()

    def _forget(self, run: str) -> None:
        """A coordinator of an older release names no tombstone: it means whatever lies here."""
        self._sessions.end_run(run)
        self._store.forget(run)
        self._note_forgotten(run)
        self._context.changed()

    def _note_forgotten(self, run: str) -> None:
        self.bad_sources.forget_run(run)
        self.failed_plans.pop(run, None)
        self._say("forgotten", run, "everything of the run was deleted here")

    def _say(self, kind: str, run: str, message: str) -> None:
        logger.info("run %s: %s: %s", run, kind, message)
        self._context.timeline.add(kind, run, message)
