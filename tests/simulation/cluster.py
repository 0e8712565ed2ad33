"""The simulated cluster: nodes, coordinators running the real core, jobs that train, faults that break them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from backstay.errors import BackstayError
from backstay.ids import SnapshotKey
from backstayd.core.coordinator import Coordinator
from backstayd.core.drain_orders import DrainState
from backstayd.core.messages.decisions import Base, Decision, Outcome
from backstayd.core.messages.desired import NodeDesired
from backstayd.core.messages.plans import FragmentSource, Plan, ShardRecord
from backstayd.core.messages.report import NodeReport, SessionPhase
from backstayd.core.policy import CorePolicy
from tests.simulation.checker import Checker
from tests.simulation.coordinator import Control
from tests.simulation.engine import Engine, Network
from tests.simulation.node import Node, RunMemory, Trainer
from tests.simulation.orders import distrust
from tests.simulation.storage import Storage

WAIT_POLL_S = 0.01


@dataclass(slots=True)
class Life:
    """A world that trained, as it truly was."""

    decision: Decision
    released_s: float
    step: int
    world_id: str
    died_s: float = 0.0


@dataclass(slots=True, eq=False)
class Job:
    """A job under a supervisor that restarts the whole world when one rank dies, as torchrun does."""

    run: str
    placements: dict[int, str]
    allow_fresh: bool = False
    step_s: float = 0.4
    max_wait_s: float = 0.0  # how long a step is held up for a slot; all ranks wait for the slowest
    world_id: str = ""
    world_count: int = 0
    trainers: dict[int, Trainer] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)
    is_stopped: bool = False
    is_starting: bool = False
    step: int = 0
    decision: Decision | None = None
    lives: list[Life] = field(default_factory=list)  # each world that trained, for those who check the ledger

    @classmethod
    def on(cls, run: str, node_count: int, **options: Any) -> Self:
        """One rank on each of the first nodes."""
        return cls(run, {rank: f"n{rank + 1}" for rank in range(node_count)}, **options)

    @property
    def decided(self) -> Decision:
        """With what the world that trains was released."""
        assert self.decision is not None
        return self.decision

    @property
    def base(self) -> Base:
        """The snapshot that the world that trains began from."""
        assert self.decided.base is not None
        return self.decided.base


class Cluster:
    def __init__(
        self, engine: Engine, *, node_count: int, policy: CorePolicy | None = None, domains: tuple[str, ...] = ()
    ) -> None:
        self.engine = engine
        self.policy = policy or CorePolicy(lease_s=1.5)
        self.lease_s = self.policy.lease_s
        self.network = Network()
        self.work_s = (0.01, 0.06)
        self.restart_s = (0.1, 0.6)
        self.nodes: dict[str, Node] = {}
        self.jobs: list[Job] = []
        self.checker = Checker(self)
        self.storage = Storage()
        self.away: list[Node] = []  # switched off with all they hold
        self.quiet_since_s = engine.now_s  # no coordinator was disturbed since
        self.control: Control | None = None
        for index in range(node_count):
            name = f"n{index + 1}"
            self.nodes[name] = Node(self, name, domains[index % len(domains)] if domains else "")
            self.nodes[name].start()
        self.control = Control(self)
        engine.after_event = self.checker.after_event

    # -- network ------------------------------------------------------------------------------------------------------

    def fates(self) -> list[float]:
        """Delays of the copies of one message that arrive."""
        delays = [self.engine.between(*self.network.delay_s)]
        if self.engine.random.random() < self.network.drop_rate:
            return []
        if self.engine.random.random() < self.network.duplicate_rate:
            delays.append(self.engine.between(*self.network.delay_s) * 3)
        return delays

    def send_report(self, node: Node, report: NodeReport) -> None:
        control, is_heard = self.control, not node.is_cut and node.mute_until_s <= self.engine.now_s
        if is_heard:
            node.heard_s = self.engine.now_s
        if control is not None and is_heard:
            for delay_s in self.fates():
                self.engine.after(delay_s, control.receive, report, self.engine.now_s)

    def deliver(self, control: Control, name: str, incarnation: str, desired: NodeDesired, answered_s: float) -> None:
        node = self.nodes.get(name)
        if node is None or node.deaf_until_s > self.engine.now_s:
            return
        if not node.is_cut and (control is self.control or control.is_paused is False):
            node.receive(desired, incarnation, answered_s)

    def work_delay(self) -> float:
        return self.engine.between(*self.work_s)

    def reach(self, name: str) -> Node | None:
        node = self.nodes.get(name)
        return node if node is not None and node.is_running and not node.is_paused else None

    # -- bytes --------------------------------------------------------------------------------------------------------

    def read_shard(self, plan: Plan, member: int, rank: int) -> str:
        return self._read(plan.members[member].node, plan, rank)

    def _read(self, name: str, plan: Plan, rank: int) -> str:
        node = self.reach(name)
        digest = next(s.digest for m in plan.members for s in m.shards if s.rank == rank)
        memory = node.memory.get(plan.run, RunMemory()) if node is not None else RunMemory()
        shard = memory.shards.get((plan.attempt, plan.step, rank))
        if node is None or shard is None or shard.digest != digest:
            return "absent"
        if digest in memory.corrupt:
            node.quarantine_shard(plan.run, shard)
            return "corrupt"
        return "ok"

    def read_source(self, plan: Plan, stripe: int, source: FragmentSource, order: tuple[int, ...]) -> bool:
        if source.index < plan.k:
            from backstayd.core.inventory import geometry

            member = order[source.index]
            chunks = geometry.block_range(plan, stripe, member)
            ranks = {segment.rank for segment in geometry.segments(plan, member, chunks)}
            return all(self._read(source.node, plan, rank) == "ok" for rank in sorted(ranks))
        node = self.reach(source.node)
        place = (plan.plan_id, stripe, source.index - plan.k)
        memory = node.memory.get(plan.run, RunMemory()) if node is not None else RunMemory()
        if node is None or place not in memory.fragments:
            return False
        if place in memory.corrupt:
            node.quarantine_fragment(plan, stripe, source.index - plan.k)
            return False
        return True

    def put_fragment(self, plan: Plan, member: int, stripe: int, index: int) -> bool:
        node = self.reach(plan.members[member].node)
        if node is None:
            return False
        delay_s = 0.0 if self.engine.random.random() < 0.9 else self.engine.between(0.0, 1.0)
        self.engine.after(delay_s, self._arrive, node, node.incarnation, plan, stripe, index)
        return True

    def _arrive(self, node: Node, incarnation: str, plan: Plan, stripe: int, index: int) -> None:
        if node.is_running and node.incarnation == incarnation:
            node.store_fragment(plan, stripe, index)

    def writer_of(self, digest: str) -> str:
        return digest.split("/")[1]

    # -- training -----------------------------------------------------------------------------------------------------

    def start_job(self, job: Job) -> None:
        if job not in self.jobs:
            self.jobs.append(job)
        job.is_starting = False
        if job.is_stopped:
            return
        job.world_count += 1
        job.world_id = f"w{job.world_count}-{self.engine.random.getrandbits(32):08x}"
        job.trainers = {}
        job.decision = None
        for rank, name in job.placements.items():
            trainer = Trainer(job.run, job.world_id, rank, len(job.placements), name, allow_fresh=job.allow_fresh)
            job.trainers[rank] = trainer
            node = self.nodes[name]
            node.trainers.append(trainer)
            self.engine.after(self.engine.between(0.01, 0.3), node.attach, trainer, node.incarnation)
            self.engine.after(self.lease_s, self._attach_late, trainer, node)

    def _attach_late(self, trainer: Trainer, node: Node) -> None:
        """A trainer whose daemon was away when it asked tries again."""
        if trainer.is_alive and not trainer.is_attached:
            node.attach(trainer, node.incarnation)
            self.engine.after(self.lease_s, self._attach_late, trainer, node)

    def kill_trainer(self, trainer: Trainer) -> None:
        if trainer.is_alive:
            trainer.is_alive = False
            node = self.nodes.get(trainer.node)
            if node is not None:
                if trainer in node.trainers:
                    node.trainers.remove(trainer)
                node.changed()
        self.supervise()

    def stop_job(self, job: Job) -> None:
        """Its processes die, and nobody restarts them."""
        job.is_stopped = True
        self.kill_world(job)

    def kill_world(self, job: Job) -> None:
        for trainer in list(job.trainers.values()):
            self.kill_trainer(trainer)

    def wait_training(self, job: Job, *, limit_s: float = 20.0, is_protected: bool = False) -> None:
        """Run until every rank trains, and the run is protected if that is wanted."""
        assert self.engine.run_until(
            lambda: self.is_training(job) and (not is_protected or self.is_protected(job.run)), limit_s=limit_s
        ), job.refusals

    def restart(self, job: Job, rank: int = 0) -> None:
        """A rank dies, and the next world trains."""
        world = job.world_id
        self.kill_trainer(job.trainers[rank])
        self.wait_restarted(job, world)

    def wait_restarted(self, job: Job, world_id: str) -> None:
        """Run until the job trains in another world than ``world_id``."""
        assert self.engine.run_until(lambda: job.world_id != world_id and self.is_training(job), limit_s=30), (
            job.refusals
        )

    def supervise(self) -> None:
        """Restart the world of each job that has a dead rank."""
        for job in self.jobs:
            if job.is_starting or job.is_stopped or not job.trainers:
                continue
            if any(not trainer.is_alive for trainer in job.trainers.values()):
                job.is_starting = True
                if job.lives and job.lives[-1].world_id == job.world_id:
                    job.lives[-1].died_s = self.engine.now_s
                self.engine.after(self.engine.between(*self.restart_s), self._restart, job)

    def _restart(self, job: Job) -> None:
        for trainer in job.trainers.values():
            trainer.is_alive = False
            node = self.nodes.get(trainer.node)
            if node is not None and trainer in node.trainers:
                node.trainers.remove(trainer)
                node.changed()
        running = [name for name, node in self.nodes.items() if node.is_running and not node.is_paused]
        if not running:
            self.engine.after(0.5, self._restart, job)
            return
        load = dict.fromkeys(running, 0)
        for name in job.placements.values():
            if name in load:
                load[name] += 1
        for rank, name in job.placements.items():
            if name not in load:
                job.placements[rank] = min(load, key=lambda other: (load[other], other))
                load[job.placements[rank]] += 1
        self.start_job(job)

    def refused(self, trainer: Trainer, decision: Decision) -> None:
        job = self._job_of(trainer)
        self.checker.refused(decision)
        if job is not None and decision.message not in job.refusals:
            job.refusals.append(decision.message)
        trainer.refusal = decision.message
        self.kill_trainer(trainer)

    def released(self, node: Node, trainer: Trainer, decision: Decision) -> None:
        self.checker.released(node, trainer, decision)
        job = self._job_of(trainer)
        if job is not None and job.decision is None:
            job.decision = decision
            job.step = decision.base.step if decision.base is not None else 0
            job.lives.append(Life(decision, self.engine.now_s, job.step, job.world_id))
            self.engine.after(job.step_s, self._step, job, job.world_id)

    def recorded(self, node: Node, decision: Decision) -> None:
        self.checker.recorded(node, decision)

    def _job_of(self, trainer: Trainer) -> Job | None:
        return next((job for job in self.jobs if job.world_id == trainer.world_id), None)

    def _step(self, job: Job, world_id: str) -> None:
        if job.world_id != world_id or job.is_stopped or any(not t.is_alive for t in job.trainers.values()):
            return
        if any(t.phase is not SessionPhase.TRAINING for t in job.trainers.values()):
            self.engine.after(0.05, self._step, job, world_id)
            return
        held_up = [trainer for trainer in job.trainers.values() if self._is_held_up(trainer, job.max_wait_s)]
        if held_up:
            self.engine.after(WAIT_POLL_S, self._step, job, world_id)
            return
        job.step += 1
        job.lives[-1].step = job.step
        for trainer in job.trainers.values():
            if not trainer.is_mute:
                self.engine.after(self.engine.between(0.0, job.step_s * 0.5), self._snapshot, trainer, job.step)
        self.engine.after(job.step_s * self.engine.between(0.9, 1.2), self._step, job, world_id)

    def _snapshot(self, trainer: Trainer, step: int) -> None:
        node = self.nodes.get(trainer.node)
        if not trainer.is_alive or node is None or not node.is_running or not trainer.is_attached:
            return
        desired = node.work[trainer.run].desired if trainer.run in node.work else None
        if desired is not None and not desired.schedule.includes(step):
            return
        if node.is_paused:
            return
        trainer.last_step = step
        if not node.may_write(trainer) or node.free_slots(trainer) <= 0:
            trainer.waiting_step, trainer.held_s = step, 0.0
            job = self._job_of(trainer)
            if job is None or job.max_wait_s == 0.0 or (desired is not None and not desired.is_release_possible):
                self._skip(trainer)
            return
        self._capture(trainer, node, step)

    def _is_held_up(self, trainer: Trainer, max_wait_s: float) -> bool:
        """Whether the optimizer's step must wait for a slot of ``trainer`` still; captures or skips where it need not."""
        node, step = self.nodes.get(trainer.node), trainer.waiting_step
        if step == 0 or node is None:
            return False
        if node.may_write(trainer) and node.free_slots(trainer) > 0:
            trainer.waiting_step = 0
            self._capture(trainer, node, step)
            return False
        desired = node.work[trainer.run].desired if trainer.run in node.work else None
        if trainer.held_s >= max_wait_s or (desired is not None and not desired.is_release_possible):
            self._skip(trainer)
            return False
        trainer.held_s += WAIT_POLL_S
        trainer.waited_s += WAIT_POLL_S
        return True

    def _skip(self, trainer: Trainer) -> None:
        trainer.skipped_step, trainer.waiting_step = trainer.waiting_step, 0
        self.nodes[trainer.node].changed()

    def _capture(self, trainer: Trainer, node: Node, step: int) -> None:
        trainer.capturing += 1
        shard = ShardRecord(
            attempt=trainer.attempt,
            step=step,
            rank=trainer.rank,
            world_size=trainer.world_size,
            size_bytes=(1 + trainer.rank % 3) * 300_000,
            digest=f"{step}/{trainer.world_id}/{trainer.rank}",
            world_id=trainer.world_id,
        )
        self.engine.after(self.engine.between(0.01, 0.08), node.commit, trainer, shard)

    def committed(self, trainer: Trainer, shard: ShardRecord) -> None:
        self.checker.committed(trainer.run, shard)

    # -- faults -------------------------------------------------------------------------------------------------------

    def destroy(self, name: str, *, replace_after_s: float | None, new_name: str = "") -> None:
        """The machine is gone with all it held; maybe an empty one comes, under the old or a new name."""
        node = self.nodes.pop(name)
        self.checker.destroyed(node)
        node.destroy()
        if replace_after_s is not None:
            self.engine.after(replace_after_s, self._replace, new_name or name, node.domain)
        self.supervise()

    def black_out(self, survivors: int) -> None:
        """Every machine and the coordinator go at once; new ones come. ``survivors`` can be switched on again later."""
        for name in sorted(self.nodes):
            node = self.nodes.pop(name)
            self.checker.destroyed(node)
            if len(self.away) < survivors:
                node.stop()
                for trainer in node.trainers:
                    trainer.is_alive = False
                node.trainers = []
                self.away.append(node)
            else:
                node.destroy()
            self._replace(f"{name}y", node.domain)
        self.crash_coordinator(self.engine.between(0.05, 1.0))
        self.supervise()

    def drain(self, name: str, *, undo: bool = False) -> bool:
        """An operator's order; whether the coordinator took it."""
        try:
            self.core().drain(name, undo=undo)
        except BackstayError:
            return False
        return True

    def stop_drained(self, name: str, *, replace_after_s: float | None, told_s: float | None = None) -> bool:
        """Stop a node for good that the coordinator calls drained, if nothing else has happened for a while.

        ``told_s``: it called it so then, for the last time for all we know.
        """
        engine, verdict = self.engine, self.core().drains.get(name)
        steady_s = engine.now_s - 3 * self.lease_s
        is_steady = self.quiet_since_s < steady_s and all(n.steady_since_s < steady_s for n in self.nodes.values())
        if verdict is None or (told_s is None and verdict.state is not DrainState.SAFE) or not is_steady:
            return False
        self.checker.stopped_drained({n for n in self.core().drains if n in self.nodes}, told_s or engine.now_s)
        node = self.nodes.pop(name)
        node.destroy()
        if replace_after_s is not None:
            engine.after(replace_after_s, self._replace, name, node.domain)
        self.supervise()
        return True

    def bring_back(self) -> None:
        """Switch on again what outlived a black-out: it remembers another time."""
        while self.away:
            node = self.away.pop()
            if node.name not in self.nodes:
                self.nodes[node.name] = node
                node.is_paused = node.is_cut = False
                node.start()

    def disturb_storage(self, for_s: float) -> None:
        """Storage does not answer for a while."""
        self.storage.is_up = False
        self.storage.down_until_s = self.engine.now_s + for_s
        self.engine.after(for_s, self._restore_storage)

    def _restore_storage(self) -> None:
        if self.engine.now_s >= self.storage.down_until_s - 1e-9:
            self.storage.is_up = True

    def _replace(self, name: str, domain: str) -> None:
        if name not in self.nodes:
            self.nodes[name] = Node(self, name, domain)
            self.nodes[name].start()

    def restart_daemon(self, name: str, after_s: float) -> None:
        node = self.nodes[name]
        node.stop()
        node.steady_since_s = self.engine.now_s + after_s
        self.engine.after(after_s, self._start_again, node)

    def _start_again(self, node: Node) -> None:
        if self.nodes.get(node.name) is node:
            node.start()

    def crash_coordinator(self, after_s: float) -> None:
        if self.control is not None:
            self.control.is_running = False
            self.control = None
            self.quiet_since_s = self.engine.now_s + after_s
            self.engine.after(after_s, self._new_coordinator)

    def _new_coordinator(self) -> None:
        self.quiet_since_s = self.engine.now_s
        if self.control is None:
            self.control = Control(self)

    def second_coordinator(self, resume_after_s: float) -> None:
        """The coordinator freezes, another takes over, then the first thaws and goes on talking for a while."""
        old = self.control
        if old is None:
            return
        old.is_paused = True
        self.quiet_since_s = self.engine.now_s + resume_after_s + self.lease_s
        self.control = Control(self)
        self.engine.after(resume_after_s, self._thaw, old)

    def _thaw(self, old: Control) -> None:
        if old is not self.control:
            old.is_paused = False
            self.engine.after(self.lease_s, self._stop, old)

    def _stop(self, control: Control) -> None:
        control.is_running = False

    def cut(self, name: str, for_s: float) -> None:
        self.nodes[name].is_cut = True
        self.nodes[name].steady_since_s = self.engine.now_s + for_s
        self.engine.after(for_s, self._heal, self.nodes[name])

    def _heal(self, node: Node) -> None:
        node.is_cut = False
        node.steady_since_s = self.engine.now_s

    def pause(self, name: str, for_s: float) -> None:
        self.nodes[name].is_paused = True
        self.nodes[name].steady_since_s = self.engine.now_s + for_s
        self.engine.after(for_s, self._resume, self.nodes[name])

    def _resume(self, node: Node) -> None:
        if node.is_running:
            node.resume()
        node.is_paused = False

    def distrust(self, job: Job) -> bool:
        """A rank of a world that trains sees NaN and says so to its daemon."""
        trainers = [t for t in job.trainers.values() if t.is_alive and t.phase is SessionPhase.TRAINING]
        for trainer in trainers:
            node = self.reach(trainer.node)
            if node is not None and trainer.is_attached and distrust(node, trainer) is not None:
                self.checker.distrusted(job.run, trainer.world_id)
                return True
        return False

    def trust(self) -> None:
        """The operator takes everything back."""
        for job in self.jobs:
            if self.control is not None and job.run in self.core().runs:
                self.core().trust(job.run)
                self.checker.trusted(job.run)

    def corrupt(self, name: str) -> bool:
        """Flip a byte of something that the node holds; found out when it is next read."""
        node = self.nodes[name]
        for memory in node.memory.values():
            targets: list[object] = [shard.digest for shard in memory.shards.values()] + sorted(memory.fragments)
            if targets:
                memory.corrupt.add(self.engine.random.choice(targets))
                return True
        return False

    # -- the true state -----------------------------------------------------------------------------------------------

    def core(self) -> Coordinator:
        assert self.control is not None
        return self.control.core

    def redundancy(self, run: str) -> str:
        state = self.core().runs.get(run) if self.control is not None else None
        return state.evaluation.redundancy if state is not None and state.evaluation is not None else ""

    def is_protected(self, run: str) -> bool:
        """As well as the nodes that are left allow."""
        state = self.core().runs.get(run) if self.control is not None else None
        evaluation = state.evaluation if state is not None else None
        return evaluation is not None and 0 <= evaluation.spares >= evaluation.target

    def is_training(self, job: Job) -> bool:
        return bool(job.trainers) and all(
            t.is_alive and t.phase is SessionPhase.TRAINING for t in job.trainers.values()
        )

    def kept_keys(self, run: str) -> set[SnapshotKey]:
        return {
            SnapshotKey(attempt, step)
            for node in self.nodes.values()
            for attempt, step, _ in node.memory.get(run, RunMemory()).shards
        }

    def outcome(self, job: Job) -> Outcome | None:
        return job.decision.outcome if job.decision is not None else None
