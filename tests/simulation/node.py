"""A simulated node: tmpfs that survives its daemon, a daemon that does what the coordinator wants, in simulated time.

The model follows the contract of ``core/messages`` and knows nothing of how the coordinator decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from backstay.ids import Generation, SnapshotKey
from backstayd.core.inventory import geometry
from backstayd.core.messages.decisions import Decision, Distrusted, Staging
from backstayd.core.messages.desired import NodeDesired, RunDesired
from backstayd.core.messages.durable import Survey, Upload
from backstayd.core.messages.plans import FragmentRecord, Plan, Quarantined, Rebuild, RebuildTask, ShardRecord
from backstayd.core.messages.report import NodeIdentity, NodeReport, RunReport, SessionPhase, SessionRecord, SkipCause
from backstayd.core.messages.tombstone import Tombstone
from tests.simulation.orders import apply_tombstones, copy_shards, remember_distrust
from tests.simulation.recovering import follow
from tests.simulation.storing import keep_stored

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster

REPORT_COALESCE_S = 0.01
RETRY_S = 0.2
SLOTS_PER_RANK = 2


@dataclass(slots=True, eq=False)
class Trainer:
    """One rank's process. Dies with its node; a daemon's death only detaches it."""

    run: str
    world_id: str
    rank: int
    world_size: int
    node: str
    phase: SessionPhase = SessionPhase.RESTORING
    allow_fresh: bool = False
    is_alive: bool = True
    is_attached: bool = False
    attempt: int = 0
    last_step: int = 0
    skipped_step: int = 0
    refusal: str = ""
    capturing: int = 0
    is_mute: bool = False  # it trains, and never calls snapshot()
    waiting_step: int = 0  # held up at the fence until a slot is free for it; 0: not
    held_s: float = 0.0  # how long it has been
    waited_s: float = 0.0  # all together


@dataclass(slots=True)
class RunMemory:
    """What a node's tmpfs holds of one run."""

    shards: dict[tuple[int, int, int], ShardRecord] = field(default_factory=dict)  # attempt, step, rank
    plans: dict[str, Plan] = field(default_factory=dict)
    fragments: set[tuple[str, int, int]] = field(default_factory=set)
    pieces: dict[str, set[int]] = field(default_factory=dict)  # digest: stripes whose decoded blocks arrived
    corrupt: set[object] = field(default_factory=set)  # digests, (plan id, stripe, index)
    quarantined: list[Quarantined] = field(default_factory=list)
    decision: Decision | None = None
    recorded_s: float = 0.0
    distrusted: dict[str, Distrusted] = field(default_factory=dict)  # by snapshot id


@dataclass(slots=True)
class RunWork:
    """What a daemon process has in mind for one run; gone with it."""

    desired: RunDesired | None = None
    staging: Staging | None = None
    failed_plans: set[str] = field(default_factory=set)
    jobs: set[object] = field(default_factory=set)
    survey: Survey | None = None
    uploads: dict[tuple[str, int], Upload] = field(default_factory=dict)
    pruned: set[SnapshotKey] = field(default_factory=set)
    marked: set[str] = field(default_factory=set)
    struck: set[str] = field(default_factory=set)
    confirmed_s: float = -1.0  # when the newest report was sent that was answered with what is desired
    failed_copies: set[str] = field(default_factory=set)


class Node:
    def __init__(self, cluster: Cluster, name: str, domain: str = "") -> None:
        self.cluster = cluster
        self.name = name
        self.domain = domain
        self.is_running = False
        self.is_paused = False
        self.is_cut = False  # from the coordinator
        self.is_draining = False  # remembered beside the memory
        self.is_full = False  # takes no copies
        self.deaf_until_s = self.mute_until_s = 0.0  # lines that carry one way only
        self.staging_trouble = ""  # why no decision can be staged here
        self.recording_trouble = ""  # why no decision can be written here
        self.memory: dict[str, RunMemory] = {}
        self.tombstones: dict[str, Tombstone] = {}  # files beside the memory
        self.reported: tuple[Tombstone, ...] = ()
        self.generation = Generation()
        self.incarnation = ""
        self.sequence = 0
        self.work: dict[str, RunWork] = {}
        self.trainers: list[Trainer] = []
        self.is_report_due = False
        self.missed: list[tuple[NodeDesired, float]] = []
        self.steady_since_s = cluster.engine.now_s
        self.heard_s = cluster.engine.now_s  # when it last sent a report that was not cut off

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        if self.is_running:
            return
        self.is_running = True
        self.steady_since_s = self.cluster.engine.now_s
        self.incarnation = f"{self.cluster.engine.random.getrandbits(64):016x}"
        self.sequence = 0
        self.work = {}
        for trainer in self.trainers:
            if trainer.is_alive:
                self.cluster.engine.after(
                    self.cluster.engine.between(0.05, 0.5), self.attach, trainer, self.incarnation
                )
        self._heartbeat(self.incarnation)

    def stop(self) -> None:
        """The daemon dies; tmpfs stays."""
        self.is_running = False
        for trainer in self.trainers:
            trainer.is_attached = False

    def destroy(self) -> None:
        """The machine dies, with its trainers and its tmpfs."""
        self.stop()
        self.memory = {}
        self.tombstones = {}
        self.generation = Generation()
        for trainer in self.trainers:
            trainer.is_alive = False
        self.trainers = []
        self.is_paused = False
        self.is_cut = False

    def attach(self, trainer: Trainer, incarnation: str) -> None:
        if trainer.is_alive and self.is_running and incarnation == self.incarnation:
            trainer.is_attached = True
            self.changed()

    # -- reports ------------------------------------------------------------------------------------------------------

    def _heartbeat(self, incarnation: str) -> None:
        if self.is_running and incarnation == self.incarnation:
            self._send()
            self.cluster.engine.after(self.cluster.lease_s / 6, self._heartbeat, incarnation)

    def changed(self) -> None:
        if self.is_running and not self.is_report_due:
            self.is_report_due = True
            self.cluster.engine.after(REPORT_COALESCE_S, self._send_changed)

    def _send_changed(self) -> None:
        self.is_report_due = False
        if self.is_running:
            self._send()

    def _send(self) -> None:
        if self.is_paused:
            return
        self.sequence += 1
        self.cluster.send_report(self, self.report())

    def report(self) -> NodeReport:
        names = sorted({*self.memory, *(t.run for t in self.trainers if t.is_attached)})
        return NodeReport(
            node=NodeIdentity(
                name=self.name, incarnation=self.incarnation, bulk_address=f"{self.name}:1", domain=self.domain
            ),
            sequence=self.sequence,
            generation=self.generation,
            runs=tuple(self._run_report(run) for run in names),
            is_draining=self.is_draining,
            takes_copies=True,
            takes_tombstones=True,
            tombstones=self._reported_tombstones(),
        )

    def _reported_tombstones(self) -> tuple[Tombstone, ...]:
        """The very same ones while nothing changes, as they come over the wire."""
        found = tuple(self.tombstones[run] for run in sorted(self.tombstones))
        self.reported = self.reported if found == self.reported else found
        return self.reported

    def _run_report(self, run: str) -> RunReport:
        memory = self.memory.get(run, RunMemory())
        work = self.work.get(run, RunWork())
        return RunReport(
            run=run,
            sessions=tuple(self._session(t) for t in self.trainers if t.run == run and t.is_alive and t.is_attached),
            shards=tuple(memory.shards[place] for place in sorted(memory.shards)),
            plans=tuple(memory.plans[plan_id] for plan_id in sorted(memory.plans)),
            fragments=tuple(
                FragmentRecord(plan_id=p, stripe=stripe, index=index) for p, stripe, index in sorted(memory.fragments)
            ),
            decision=memory.decision,
            recorded_unix_s=memory.recorded_s,
            staging=work.staging,
            quarantined=tuple(memory.quarantined),
            failed_plans=tuple(sorted(work.failed_plans)),
            distrusted=tuple(memory.distrusted[key] for key in sorted(memory.distrusted)),
            survey=work.survey,
            uploads=tuple(work.uploads[place] for place in sorted(work.uploads)),
            pruned=tuple(sorted(work.pruned)),
            marked=tuple(sorted(work.marked)),
            struck=tuple(sorted(work.struck)),
            failed_copies=tuple(sorted(work.failed_copies)),
        )

    def _session(self, trainer: Trainer) -> SessionRecord:
        return SessionRecord(
            world_id=trainer.world_id,
            rank=trainer.rank,
            world_size=trainer.world_size,
            phase=trainer.phase,
            allow_fresh=trainer.allow_fresh,
            last_step=trainer.last_step,
            skipped_step=trainer.skipped_step,
            is_short_of_slots=trainer.skipped_step > 0,
            skip_cause=SkipCause.NO_SLOT if trainer.skipped_step > 0 else SkipCause.NONE,
            blocked_s=round(trainer.waited_s, 3),
            waited_s=round(trainer.waited_s, 3),
        )

    # -- desired state ------------------------------------------------------------------------------------------------

    def receive(self, desired: NodeDesired, incarnation: str, answered_s: float) -> None:
        if not self.is_running or incarnation != self.incarnation:
            return
        if self.is_paused:
            self.missed.append((desired, answered_s))
            return
        if not (self.generation == desired.generation or self.generation.admits(desired.generation)):
            return
        if self.generation != desired.generation:
            self.generation = desired.generation
            self.changed()
        if desired.drain not in (None, self.is_draining):
            self.is_draining = not self.is_draining
            self.changed()
        apply_tombstones(self, desired)
        for name in self.work.keys() - {run.run for run in desired.runs}:
            self.work[name].confirmed_s = -1.0
        for run in desired.runs:
            work = self.work.setdefault(run.run, RunWork())
            work.desired = run
            work.confirmed_s = max(work.confirmed_s, answered_s)
            if run.storage is not None:  # level-triggered, as the daemon is
                work.pruned &= {item.key for item in run.storage.prunes}
                work.marked &= {item.snapshot_id for item in run.storage.distrust}
                work.struck &= {item.snapshot_id for item in run.storage.trust}
            self._reconcile(run)

    def resume(self) -> None:
        self.is_paused = False
        self.steady_since_s = self.cluster.engine.now_s
        missed, self.missed = self.missed, []
        for desired, answered_s in missed:
            self.receive(desired, self.incarnation, answered_s)
        self.changed()

    def _reconcile(self, desired: RunDesired) -> None:
        memory = self.memory.setdefault(desired.run, RunMemory())
        remember_distrust(self, memory, desired)
        for key in desired.release:
            self.delete(memory, lambda a, s, key=key: (a, s) == (key.attempt, key.step))
        for plan_id in desired.drop_plans:
            if memory.plans.pop(plan_id, None) is not None:
                memory.fragments = {f for f in memory.fragments if f[0] != plan_id}
                self.changed()
        for plan in desired.plans:
            self._want_plan(plan)
        copy_shards(self, desired)
        for rebuild in desired.rebuilds:
            for task in rebuild.tasks:
                if task.decoder == self.name:
                    self.job(desired.run, ("rebuild", rebuild.rebuild_id, task.stripe), self._decode, rebuild, task)
        if desired.storage is not None:
            keep_stored(self, desired.run, desired.storage)
        if desired.decision is not None:
            follow(self, desired.decision, desired.decision_phase)

    def delete(self, memory: RunMemory, match: object) -> None:
        assert callable(match)
        places = [place for place in memory.shards if match(place[0], place[1])]
        plans = [p.plan_id for p in memory.plans.values() if match(p.attempt, p.step)]
        for place in places:
            memory.corrupt.discard(memory.shards[place].digest)
            del memory.shards[place]
        for plan_id in plans:
            del memory.plans[plan_id]
            memory.fragments = {f for f in memory.fragments if f[0] != plan_id}
        if places or plans:
            self.changed()

    def job(self, run: str, name: object, action: object, *arguments: object) -> None:
        """Start a job once; it says itself when it is over (:meth:`_done`)."""
        assert callable(action)
        work = self.work[run]
        if name not in work.jobs:
            work.jobs.add(name)
            self.cluster.engine.after(
                self.cluster.work_delay(), self._run_job, run, name, action, arguments, self.incarnation
            )

    def _run_job(self, run: str, name: object, action: object, arguments: tuple[object, ...], incarnation: str) -> None:
        assert callable(action)
        if not self.is_running or incarnation != self.incarnation or name not in self.work[run].jobs:
            return
        if self.is_paused:
            self.cluster.engine.after(RETRY_S, self._run_job, run, name, action, arguments, incarnation)
            return
        if action(*arguments):
            self.work[run].jobs.discard(name)
        else:
            self.cluster.engine.after(RETRY_S, self._run_job, run, name, action, arguments, incarnation)

    # -- protection ---------------------------------------------------------------------------------------------------

    def _want_plan(self, plan: Plan) -> None:
        index = next((i for i, m in enumerate(plan.members) if m.node == self.name), -1)
        if index < 0 or plan.members[index].incarnation != self.incarnation:
            return
        memory, work = self.memory[plan.run], self.work[plan.run]
        if ("encoded", plan.plan_id) not in work.jobs and plan.plan_id not in work.failed_plans:
            if plan.plan_id in memory.plans and self._parity_done(plan, index):
                return
            self.job(plan.run, ("encode", plan.plan_id), self._encode, plan, index)

    def _parity_done(self, plan: Plan, stripe: int) -> bool:
        memory = self.memory[plan.run]
        return geometry.stripe_chunks(plan, stripe) == 0 or (plan.plan_id, stripe, 0) in memory.fragments

    def _encode(self, plan: Plan, stripe: int) -> bool:
        work = self.work[plan.run]
        desired = work.desired
        if desired is None or plan not in desired.plans:
            return True
        if geometry.stripe_chunks(plan, stripe):
            for member in geometry.data_members(stripe, n=len(plan.members), m=plan.m):
                chunks = geometry.block_range(plan, stripe, member)
                for segment in geometry.segments(plan, member, chunks):
                    answer = self.cluster.read_shard(plan, member, segment.rank)
                    if answer == "corrupt":
                        work.failed_plans.add(plan.plan_id)
                        self.changed()
                        return True
                    if answer == "absent":
                        return False
        holders = geometry.parity_members(stripe, n=len(plan.members), m=plan.m)
        for index, holder in enumerate(holders if geometry.stripe_chunks(plan, stripe) else ()):
            if not self.cluster.put_fragment(plan, holder, stripe, index):
                return False
        self.memory[plan.run].plans[plan.plan_id] = plan
        work.jobs.add(("encoded", plan.plan_id))
        self.changed()
        return True

    def store_fragment(self, plan: Plan, stripe: int, index: int) -> None:
        memory = self.memory.setdefault(plan.run, RunMemory())
        memory.plans[plan.plan_id] = plan
        memory.fragments.add((plan.plan_id, stripe, index))
        self.changed()

    # -- rebuild ------------------------------------------------------------------------------------------------------

    def _decode(self, rebuild: Rebuild, task: RebuildTask) -> bool:
        plan = rebuild.plan
        desired = self.work[plan.run].desired
        if desired is None or rebuild not in desired.rebuilds:
            return True
        order = geometry.data_members(task.stripe, n=len(plan.members), m=plan.m)
        readable = sum(self.cluster.read_source(plan, task.stripe, source, order) for source in task.sources)
        if readable < plan.k:
            return False
        for target in rebuild.targets:
            if target.member_index in order:
                chunks = geometry.block_range(plan, task.stripe, target.member_index)
                if any(s.rank == target.rank for s in geometry.segments(plan, target.member_index, chunks)):
                    node = self.cluster.reach(target.node)
                    if node is None:
                        return False
                    node.store_piece(plan, target.member_index, target.rank, target.digest, task.stripe)
        return True

    def store_piece(self, plan: Plan, member: int, rank: int, digest: str, stripe: int) -> None:
        memory = self.memory.setdefault(plan.run, RunMemory())
        pieces = memory.pieces.setdefault(digest, set())
        pieces.add(stripe)
        needed = {
            s
            for s in geometry.member_stripes(member, n=len(plan.members), m=plan.m)
            if any(g.rank == rank for g in geometry.segments(plan, member, geometry.block_range(plan, s, member)))
        }
        if needed <= pieces:
            shard = next(s for s in plan.members[member].shards if s.rank == rank)
            self.store_shard(plan, rank, shard.size_bytes, digest)
            memory.pieces.pop(digest)

    def shard_at(self, run: str, place: tuple[int, int, int]) -> ShardRecord | None:
        """The shard of (attempt, step, rank) that lies here."""
        memory = self.memory.get(run)
        return memory.shards.get(place) if memory is not None else None

    def store_shard(self, plan: Plan, rank: int, size_bytes: int, digest: str) -> None:
        memory = self.memory.setdefault(plan.run, RunMemory())
        memory.shards[plan.attempt, plan.step, rank] = ShardRecord(
            attempt=plan.attempt,
            step=plan.step,
            rank=rank,
            world_size=plan.world_size,
            size_bytes=size_bytes,
            digest=digest,
            world_id=self.cluster.writer_of(digest),
        )
        self.changed()

    # -- corruption ---------------------------------------------------------------------------------------------------

    def quarantine_shard(self, run: str, shard: ShardRecord) -> None:
        memory = self.memory[run]
        memory.shards.pop((shard.attempt, shard.step, shard.rank), None)
        memory.corrupt.discard(shard.digest)
        what = f"shard rank {shard.rank} of step {shard.step}"
        memory.quarantined.append(
            Quarantined(what=what, attempt=shard.attempt, step=shard.step, reason="chunk 0", rank=shard.rank)
        )
        self.changed()

    def quarantine_fragment(self, plan: Plan, stripe: int, index: int) -> None:
        memory = self.memory[plan.run]
        memory.fragments.discard((plan.plan_id, stripe, index))
        memory.corrupt.discard((plan.plan_id, stripe, index))
        what = f"parity stripe {stripe} index {index} of plan {plan.plan_id[:8]}"
        memory.quarantined.append(
            Quarantined(
                what=what,
                attempt=plan.attempt,
                step=plan.step,
                reason="chunk 0",
                plan_id=plan.plan_id,
                stripe=stripe,
                index=index,
            )
        )
        self.changed()

    # -- training -----------------------------------------------------------------------------------------------------

    def free_slots(self, trainer: Trainer) -> int:
        memory = self.memory.get(trainer.run, RunMemory())
        used = sum(
            1
            for (_, _, rank), shard in memory.shards.items()
            if rank == trainer.rank and shard.world_size == trainer.world_size
        )
        desired = self.work.get(trainer.run, RunWork()).desired
        limit = SLOTS_PER_RANK if desired is None else desired.keep + 1 + desired.extra_slots
        return limit - used - trainer.capturing

    def may_write(self, trainer: Trainer) -> bool:
        """Whether the daemon is there and takes this trainer's world for the current one."""
        if not (self.is_running and trainer.is_attached and not self.is_paused):
            return False
        memory = self.memory.get(trainer.run, RunMemory())
        desired = self.work.get(trainer.run, RunWork()).desired
        is_recorded = memory.decision is not None and memory.decision.world_id == trainer.world_id
        return is_recorded and (desired is None or desired.world_id in ("", trainer.world_id))

    def commit(self, trainer: Trainer, shard: ShardRecord) -> None:
        trainer.capturing -= 1
        if trainer.is_alive and self.may_write(trainer):
            self.memory[trainer.run].shards[shard.attempt, shard.step, shard.rank] = shard
            self.cluster.committed(trainer, shard)
        self.changed()
