"""Jobs of the coders on shards and parity in memory: runs them and applies their results to the store.

Every result only asks for another pass. Decides nothing that the coordinator decides.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Collection
from typing import Final

from backstay.errors import BackstayError, CapacityError, SnapshotNotFoundError
from backstayd.bounded import drop_oldest
from backstayd.coder.jobs import (
    CoderEvent,
    DecodeStripe,
    EncodeStripe,
    FetchPlan,
    FetchShard,
    Job,
    JobResult,
    VerifyShard,
)
from backstayd.core.messages.plans import FragmentRecord
from backstayd.node.coders import Coders
from backstayd.node.node_state import NodeState
from backstayd.node.reconcile.actions import PrepareTarget
from backstayd.node.reconcile.quarantine import BadSources
from backstayd.node.reconcile.tasks import TaskKey, TaskKind, Tasks
from backstayd.node.restores.open_files import OpenFiles
from backstayd.store import admit, published, remove
from backstayd.store.paths import ShardRef
from backstayd.store.record_files import canonical_bytes
from backstayd.store.staging import prepare_staging

logger = logging.getLogger(__name__)

MAX_TRIES: Final = 4
MAX_FAILED_PLANS: Final = 100  # per run
MAX_VERIFIED: Final = 10_000
STRIPE_POLL_S: Final = 0.5  # an event of a coder that died may be lost; the markers are the truth
FAILED_COPY_LEASES: Final = 10  # for so long the coordinator does not ask again for a copy that failed here
# The subject of their keys is a decision.
FOR_DECISION: Final = (
    TaskKind.VERIFY,
    TaskKind.VERIFY_STORED,
    TaskKind.FETCH,
)


def note_stored(node: NodeState, event: CoderEvent) -> None:
    """Add to the index what a coder stored."""
    store, shard, fragment = node.store, event.shard, event.fragment
    run = shard.run if shard is not None else fragment.run if fragment is not None else ""
    if node.is_forgotten(run):
        store.forget(run)
        return
    try:
        if shard is not None:
            admit.note_staged(store, shard)
        elif fragment is not None and event.kind == "plan_stored":
            admit.note_plan(store, run, fragment.key, fragment.plan_id)
        elif fragment is not None:
            record = FragmentRecord(plan_id=fragment.plan_id, stripe=fragment.stripe, index=fragment.index)
            admit.note_fragment(store, run, fragment.key, record)
    except (BackstayError, OSError) as error:
        logger.error("run %s: cannot use what a coder stored: %s", run, error)
    node.changed()


class FailedCopies:
    """Shards that could not be copied here, by run; forgotten after a while, because room may become free."""

    def __init__(self, lease_s: float, on_change: Callable[[], None]) -> None:
        self._lease_s = lease_s
        self._on_change = on_change
        self._digests: dict[str, dict[str, None]] = {}

    def of(self, run: str) -> tuple[str, ...]:
        return tuple(sorted(self._digests.get(run, ())))

    def add(self, run: str, digest: str) -> None:
        """Report for a while that the shard cannot be copied here."""
        self._digests.setdefault(run, {})[digest] = None
        asyncio.get_running_loop().call_later(FAILED_COPY_LEASES * self._lease_s, self._forget, run, digest)
        self._on_change()

    def _forget(self, run: str, digest: str) -> None:
        self._digests.get(run, {}).pop(digest, None)
        if not self._digests.get(run):
            self._digests.pop(run, None)
        self._on_change()


class MemoryJobs:
    """Owns the marks of what was verified, and what has failed for good."""

    def __init__(self, node: NodeState, coders: Coders, tasks: Tasks, bad_sources: BadSources) -> None:
        self._node = node
        self._store = node.store
        self._coders = coders
        self._tasks = tasks
        self._bad_sources = bad_sources
        self._verified: dict[tuple[str, str], None] = {}
        self.open_files = OpenFiles()
        self.failed_plans: dict[str, list[str]] = {}
        self.failed_copies = FailedCopies(node.lease_s, node.changed)

    def verified(self, run: str) -> frozenset[tuple[str, str]]:
        """(decision id, digest) of shards verified for the decision of ``run``."""
        decision_id = self._decision_id(run)
        return frozenset(mark for mark in self._verified if decision_id and mark[0] == decision_id)

    def keep_open(self, decision_ids: Collection[str]) -> None:
        """Close the files opened for other decisions; to be given out again they must be verified again."""
        for mark in self.open_files.keep(decision_ids):
            self._verified.pop(mark, None)

    async def run(self, key: TaskKey, job: Job) -> None:
        """Do ``job``."""
        if isinstance(job, FetchShard):
            try:
                self._store.require_room(job.size_bytes, f"run {key.run}: staging {job.shard}")
            except CapacityError as error:
                self._refuse_room(key, job, error)
                return
        result = await self._coders.run(job)
        if isinstance(job, VerifyShard) and job.url and not result.error_class:
            result = await self.open_files.take(key.subject, job, result)
        if self._node.is_forgotten(key.run):
            self._store.forget(key.run)
            return
        for corrupt in result.corrupt:
            self._bad_sources.quarantine(corrupt)
        for what, count in result.moved.items():
            self._node.metrics.protect_bytes.of(key.run, what=what).inc(count)
        if result.error_class:
            self._failed(key, job, result)
        else:
            self._done(key, job)

    def _done(self, key: TaskKey, job: Job) -> None:
        run, lease_s = key.run, self._node.lease_s
        if isinstance(job, DecodeStripe):
            # puts are idempotent; if the owner lost its staging meanwhile, this is done again
            self._tasks.settle(key, for_s=2 * lease_s + job.deadline_s / 4)
            return
        if key.kind is TaskKind.CHECK_SUSPECT:
            self._tasks.settle(key, for_s=lease_s)
            return
        if isinstance(job, VerifyShard) and job.url:  # not settled: once it is closed, it may be wanted again
            self._note_verified(key.subject, job.shard.digest)
            self._node.log_event("staged", run, f"verified {job.shard} in {job.url}")
            self._node.changed()
            return
        if isinstance(job, FetchPlan):
            admit.note_plan(self._store, run, job.plan.key, job.plan.plan_id)
            return
        settled_s = float("inf")
        if isinstance(job, FetchShard):
            self._publish(run, job)
            self._node.log_event("staged", run, f"copied {job.shard} from {job.url or 'a peer'}")
            if key.kind is TaskKind.COPY:
                settled_s = lease_s  # once it is released it may be wanted again
        elif isinstance(job, VerifyShard) and job.is_staged:
            self._publish(run, job)
            self._node.metrics.shards_rebuilt.of(run).inc()
            self._node.log_event("rebuild", run, f"rebuilt {job.shard}")
        elif isinstance(job, VerifyShard):
            self._note_verified(self._decision_id(run), job.shard.digest)
        elif isinstance(job, EncodeStripe):
            admit.note_plan(self._store, run, job.plan.key, job.plan.plan_id)
            if job.plan.m:
                own = FragmentRecord(plan_id=job.plan.plan_id, stripe=job.stripe, index=0)
                admit.note_fragment(self._store, run, job.plan.key, own)
        self._tasks.settle(key, for_s=settled_s)
        self._node.changed()

    def _publish(self, run: str, job: VerifyShard | FetchShard) -> None:
        admit.publish_staged(self._store, job.shard)
        self._note_verified(self._decision_id(run), job.shard.digest)

    def _decision_id(self, run: str) -> str:
        decision = self._node.run_desired(run).decision
        return decision.decision_id if decision is not None else ""

    def _note_verified(self, decision_id: str, digest: str) -> None:
        drop_oldest(self._verified, MAX_VERIFIED - 1)
        self._verified[decision_id, digest] = None

    def _failed(self, key: TaskKey, job: Job, result: JobResult) -> None:
        run, count = key.run, self._tasks.fail(key)
        is_hopeless = bool(result.corrupt) or count >= MAX_TRIES
        level = logging.WARNING if count in (1, MAX_TRIES) else logging.DEBUG
        logger.log(level, "run %s: %s failed (failure no. %d): %s", run, key.kind, count, result.message)
        if key.kind is TaskKind.CHECK_SUSPECT:
            return
        if isinstance(job, FetchShard) and key.kind is TaskKind.COPY:
            if count >= MAX_TRIES or result.error_class == CapacityError.__name__:
                self.failed_copies.add(run, job.shard.digest)
            return
        if isinstance(job, EncodeStripe) and is_hopeless:
            self._tasks.settle(key)
            plans = self.failed_plans.setdefault(run, [])
            plans.append(job.plan.plan_id)
            del plans[:-MAX_FAILED_PLANS]
        elif isinstance(job, VerifyShard) and job.is_staged and is_hopeless:
            remove.discard_staged(self._store, job.shard)
        elif (
            isinstance(job, (FetchShard, VerifyShard))
            and key.kind in FOR_DECISION
            and (result.corrupt or (count >= MAX_TRIES and not self._is_rebuilding(run, job.shard.digest)))
        ):
            self._fail_decision(key, f"{job.shard}: {result.message}")
        self._node.changed()

    def _is_rebuilding(self, run: str, digest: str) -> bool:
        rebuilds = self._node.run_desired(run).rebuilds
        return any(target.digest == digest for rebuild in rebuilds for target in rebuild.targets)

    def _refuse_room(self, key: TaskKey, job: FetchShard, error: CapacityError) -> None:
        """Give up a whole shard from elsewhere for lack of room."""
        if key.kind is not TaskKind.COPY:
            self._fail_decision(key, str(error))
            return
        logger.warning("run %s: no room to copy a shard from a draining node: %s", key.run, error)
        self._tasks.fail(key)
        self.failed_copies.add(key.run, job.shard.digest)

    def _fail_decision(self, key: TaskKey, reason: str) -> None:
        """The decision of ``key`` cannot be staged here."""
        self._tasks.settle(key)
        self._node.fail_decision(key.run, key.subject, reason)

    async def prepare(self, action: PrepareTarget) -> None:
        """Allocate staging for a rebuild target; while stripes are missing, look again now and then."""
        run, plan, target = action.key.run, action.rebuild.plan, action.target
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
                incarnation = self._node.identity.incarnation
                await asyncio.to_thread(prepare_staging, paths, raw, digest=target.digest, incarnation=incarnation)
            except BackstayError as error:
                logger.warning("run %s: cannot rebuild rank %d of step %d here: %s", run, target.rank, plan.step, error)
                if isinstance(error, SnapshotNotFoundError):
                    index.plans.pop(plan.plan_id, None)
                self._fail_rebuild(action.key, error)
                return
            ref = ShardRef(run=run, key=plan.key, rank=target.rank, world_size=plan.world_size, digest=target.digest)
            admit.note_staged(self._store, ref)
            self._node.changed()
        self._tasks.settle(action.key, for_s=STRIPE_POLL_S)

    def _fail_rebuild(self, key: TaskKey, error: BackstayError) -> None:
        count, decision_id = self._tasks.fail(key), self._decision_id(key.run)
        if decision_id and isinstance(error, CapacityError) and count >= MAX_TRIES:
            self._node.fail_decision(key.run, decision_id, str(error))
