"""Brings a node to what the coordinator wants: starts jobs, changes the store, answers waiting trainers, as planned.

Level-triggered: every event only asks for another pass. Decides nothing that the coordinator decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from typing import Final

from backstay.errors import BackstayError
from backstayd.core.messages.decisions import Decision, DecisionPhase, Staging
from backstayd.core.messages.desired import NodeDesired, RunDesired
from backstayd.core.messages.report import SessionPhase
from backstayd.node.coders import Coders
from backstayd.node.node_state import NodeState
from backstayd.node.reconcile import actions
from backstayd.node.reconcile.actions import Action, Restoring, View
from backstayd.node.reconcile.durable_jobs import DurableJobs, DurableRecords
from backstayd.node.reconcile.durable_planner import PARALLEL_UPLOADS
from backstayd.node.reconcile.forget import ForgottenRuns
from backstayd.node.reconcile.memory_jobs import MemoryJobs
from backstayd.node.reconcile.planner import plan_actions, record_key
from backstayd.node.reconcile.quarantine import BadSources
from backstayd.node.reconcile.staging import needs_open_files, staging_of
from backstayd.node.reconcile.tasks import DURABLE_KINDS, TaskKind, Tasks
from backstayd.node.restores import restore_answers
from backstayd.node.restores.chunks import Chunks
from backstayd.node.trainers import gate_relay
from backstayd.node.trainers.sessions import Sessions
from backstayd.node.trainers.users import adopt_owner
from backstayd.store import remove
from backstayd.store.index import RunIndex
from backstayd.store.staging import missing_stripes, remove_staging

logger = logging.getLogger(__name__)

DURABLE_PAUSE_LEASES: Final = 3


class Reconciler:
    """Brings the node to its desired state. Owns all tasks."""

    def __init__(
        self,
        node: NodeState,
        sessions: Sessions,
        coders: Coders,
        chunks: Chunks,
        bad_sources: BadSources,
        durable: DurableRecords,
    ) -> None:
        self._node = node
        self._store = node.store
        self._sessions = sessions
        self.chunks = chunks
        self.bad_sources = bad_sources
        self.durable = durable
        self.tasks = Tasks(
            node.clock,
            node.pass_due.notify,
            last_pause_s=max(0.5, node.lease_s / 3),
            durable_pause_s=DURABLE_PAUSE_LEASES * node.lease_s,
        )
        self.memory_jobs = MemoryJobs(node, coders, self.tasks, bad_sources)
        self._durable_jobs = DurableJobs(node, coders, self.tasks, durable, bad_sources)
        self._forgotten = ForgottenRuns(node, sessions, self._note_forgotten)
        self._staging: dict[str, Staging | None] = {}  # as of the pass before, by run
        self._coordinator = ""
        self.owed_since_s = 0.0  # when the pass that is still to succeed was first asked for
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Reconcile from now on, in the running loop."""
        self._loop = asyncio.create_task(self._run(), name="reconcile")

    async def close(self) -> None:
        if self._loop is not None:
            self._loop.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop
        await self.tasks.close()
        self.memory_jobs.keep_open(())

    def on_desired(self, desired: NodeDesired, answered_s: float) -> None:
        """Take over what the coordinator wants, unless the answer is an older one.

        ``answered_s`` (since boot): when the newest report that it knew was sent.
        """
        try:
            if not self._store.admit_generation(desired.generation):
                logger.debug(
                    "ignored generation %s; %s is the highest seen", desired.generation, self._store.generation
                )
                return
        except OSError as error:
            logger.error(
                "cannot store generation %s: %s; ignoring the answer of the coordinator", desired.generation, error
            )
            return
        self._node.drain.obey(desired.drain)
        runs = {run.run: run for run in desired.runs}
        if desired.generation.incarnation != self._coordinator:
            # a new coordinator has not evaluated every run yet: what it does not mention stays as it was
            runs = self._node.desired | runs
            if len(runs) == len(desired.runs):
                self._coordinator = desired.generation.incarnation
        self._node.peers = {peer.name: peer.bulk_address for peer in desired.peers}
        is_new = runs != self._node.desired
        self._node.desired = runs
        for run, wanted in runs.items():
            self._store.parity_fraction[run] = wanted.parity_fraction
            self._remember(run, wanted)
        self._forgotten.on_desired(desired)
        self.durable.confirm(desired, answered_s)
        if is_new:
            self._node.waiters.notify()
        self._node.pass_due.notify()

    def _remember(self, run: str, wanted: RunDesired) -> None:
        """Store the owner and the distrusted snapshots of a run of which anything is here."""
        try:
            if run in self._store.runs:
                gate_relay.remember(self._node, run, wanted.distrusted, wanted.trusted)
                adopt_owner(self._node, run, wanted.owner)
        except OSError as error:
            logger.error("run %s: cannot store its owner and its distrusted snapshots: %s", run, error)

    async def _run(self) -> None:
        """Make a pass whenever something changed; one that fails is repeated with the next change."""
        signal = self._node.pass_due
        while True:
            seen = signal.count
            self.owed_since_s = self.owed_since_s or self._node.clock.monotonic_s()
            try:
                self._pass()
                self.owed_since_s = 0.0
            except Exception:  # the boundary of a pass: the next one starts from what is then
                logger.exception("a reconcile pass failed; the next change starts another")
            await signal.wait(self._node.lease_s, since=seen)

    def view(self, run: str) -> View:
        """One run as the planner sees it."""
        index = self._store.runs.get(run) or RunIndex(run=run)
        desired = self._node.run_desired(run)
        sessions = self._sessions.of_run(run)
        confirmed_until_s = self.durable.confirmed_until_s(run)
        return View(
            node=self._node.identity.name,
            incarnation=self._node.identity.incarnation,
            desired=desired,
            peers=self._node.peers,
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
                if s.answer is not None and not s.answer.done() and restore_answers.offer_due(self._node, s) is None
            ),
            granted_worlds=frozenset(session.world_id for session in sessions if session.grants),
            staged=tuple(index.staged.values()),
            missing=self._missing_stripes(index),
            running=self.tasks.running(run),
            settled=self.tasks.settled(run),
            verified=self.memory_jobs.verified(run),
            failed=self._node.failed_decisions,
            durable=self.durable.of(run),
            confirmed_until_s=confirmed_until_s,
            is_confirmed=self._node.clock.boot_s() < confirmed_until_s,
            free_uploads=PARALLEL_UPLOADS - self.tasks.count(TaskKind.UPLOAD),
        )

    def staging(self, run: str) -> Staging | None:
        return staging_of(self.view(run))

    def _missing_stripes(self, index: RunIndex) -> dict[tuple[str, str], tuple[int, ...]]:
        """Of each shard in staging that is rebuilt onto this node; by rebuild and the first 16 digits of its digest."""
        paths = self._store.paths(index.run)
        staged = {one.digest16 for one in index.staged.values()}
        return {
            (rebuild.rebuild_id, target.digest[:16]): missing_stripes(
                paths, rebuild.plan, member=target.member_index, rank=target.rank
            )
            for rebuild in self._node.run_desired(index.run).rebuilds
            for target in rebuild.targets
            if target.digest[:16] in staged and target.node == self._node.identity.name
        }

    def _pass(self) -> None:
        self._forgotten.act()
        has_acted = False
        handed_out, before = set(), self._staging
        self._staging = {}
        for run in self.durable.trim(self._node.desired):
            for key in self.tasks.running(run):
                if key.kind in DURABLE_KINDS:
                    self.tasks.cancel(key)
        for run in list(self._node.desired):
            view = self.view(run)
            if view.desired.decision is not None and needs_open_files(view):
                handed_out.add(view.desired.decision.decision_id)
            self._sessions.drop_ended(run, view.desired.world_id)
            due = plan_actions(view)
            self._staging[run] = staging_of(view)
            # Also when it became ready without an action.
            has_acted |= bool(due) or self._staging[run] != before.get(run)
            for action in due:
                try:
                    self._do(run, action)
                except (BackstayError, OSError) as error:
                    logger.error("run %s: %s failed: %s", run, type(action).__name__, error)
        self.memory_jobs.keep_open(handed_out)
        self.chunks.tidy(self._restored_digests())
        if has_acted:
            self._node.report_due.notify()

    def _restored_digests(self) -> dict[str, set[str]]:
        """By run, the digests of shards that trainers here still restore from: of their offers and of the current decision."""
        wanted: dict[str, set[str]] = {}
        for session in self._sessions:
            if session.phase is SessionPhase.RESTORING:
                for origin in (session.offered, self._node.run_desired(session.run).decision):
                    sources = origin.sources if origin is not None else ()
                    wanted.setdefault(session.run, set()).update(source.digest for source in sources)
        return wanted

    def _do(self, run: str, action: Action) -> None:
        store = self._store
        if isinstance(action, actions.StartJob):
            jobs = self._durable_jobs if action.key.kind in DURABLE_KINDS else self.memory_jobs
            self.tasks.start(action.key, functools.partial(jobs.run, action.key, action.job))
        elif isinstance(action, actions.PrepareTarget):
            self.tasks.start(action.key, functools.partial(self.memory_jobs.prepare, action))
        elif isinstance(action, actions.CancelTask):
            self.tasks.cancel(action.key)
        elif isinstance(action, actions.FenceWorld):
            self._sessions.fence(run, action.world_id)
        elif isinstance(action, actions.ReleaseSnapshot):
            remove.release_snapshot(store, run, action.key)
            self._node.waiters.notify()
        elif isinstance(action, actions.DropPlan):
            remove.drop_plan(store, run, action.plan_id)
        elif isinstance(action, actions.DiscardStaged):
            self._discard(run, action)
        elif isinstance(action, actions.QuarantineParity):
            self.bad_sources.quarantine_parity(run, action.fragment, action.reason)
        elif isinstance(action, actions.RecordDecision):
            self._record(run, action.decision)
        elif isinstance(action, actions.ReleaseWorld):
            self._release_world(action.decision)
        elif isinstance(action, actions.RefuseWorld):
            self._refuse_world(action.decision)

    def _record(self, run: str, decision: Decision) -> None:
        """Store the decision; a failure before the release is reported, and the coordinator decides anew."""
        key = record_key(decision)
        try:
            self._store.record_decision(decision)
        except (BackstayError, OSError) as error:
            count = self.tasks.fail(key)
            if self._node.run_desired(run).decision_phase is DecisionPhase.RECORD:
                self._node.fail_decision(run, decision.decision_id, f"cannot write its record: {error}")
            elif count == 1:
                logger.error("run %s: cannot store decision %s: %s", run, decision.decision_id[:8], error)
            return
        self._node.log_event("recorded", run, f"decision {decision.decision_id[:8]}: attempt {decision.attempt}")
        self._node.pass_due.notify()

    def _discard(self, run: str, action: actions.DiscardStaged) -> None:
        remove_staging(self._store.paths(run), rank=action.rank, world_size=action.world_size, digest=action.digest16)
        self._store.index(run).staged.pop((action.rank, action.digest16), None)

    def _release_world(self, decision: Decision) -> None:
        waiting = [
            session
            for session in self._sessions.waiting(decision.run, decision.world_id)
            if restore_answers.offer_due(self._node, session) is None
        ]
        restore_answers.release(self._node, self.memory_jobs.open_files, decision, waiting)
        self._node.log_event("released", decision.run, f"{decision.outcome.value}: released {len(waiting)} trainers")
        self._node.waiters.notify()

    def _refuse_world(self, decision: Decision) -> None:
        restore_answers.refuse(decision, self._sessions.waiting(decision.run, decision.world_id))
        self._node.log_event("refused", decision.run, decision.message)
        self._node.waiters.notify()

    def _note_forgotten(self, run: str) -> None:
        self.bad_sources.forget_run(run)
        self.memory_jobs.failed_plans.pop(run, None)
        self._node.log_event("forgotten", run, "deleted everything of the run")
