"""Random scenarios in which runs end and begin again under one name while parts of the cluster are away for long, by seed."""

from __future__ import annotations

from dataclasses import dataclass, field

from backstay.errors import BackstayError
from backstayd.core.messages.report import SessionPhase
from backstayd.core.policy import CorePolicy
from tests.simulation.checker import BrokenPromiseError
from tests.simulation.cluster import Cluster, Job
from tests.simulation.engine import Engine, Network
from tests.simulation.storage import URL

RUN = "default/gpt"
NODES = 8
OPERATIONS = (
    "finish", "finish", "forget", "idle", "move", "move", "cut_many", "cut_many", "cut_many", "crash_coordinator",
    "kill_trainer", "kill_trainer", "restart_daemon", "destroy", "distrust", "drain",
)  # fmt: skip


@dataclass(slots=True)
class Lifetimes:
    """What one seed draws. One job at a time uses the name."""

    seed: int
    has_storage: bool = False
    ended: list[str] = field(default_factory=list)  # how each run of the name ended
    engine: Engine = field(init=False)
    cluster: Cluster = field(init=False)
    job: Job = field(init=False)

    def run(self) -> Cluster:
        """Play it; raises BrokenPromiseError, with the seed in its text."""
        engine = self.engine = Engine(self.seed)
        draw = engine.random
        policy = CorePolicy(
            lease_s=1.5,
            keep=draw.choice([1, 1, 2]),
            job_ttl_s=draw.choice([0.0, 25.0]),
            persist_url=URL if self.has_storage else "",
            persist_every_steps=draw.choice([1, 3]) if self.has_storage else 0,
            persist_keep_last=draw.choice([1, 2]) if self.has_storage else 3,
        )
        self.cluster = Cluster(engine, node_count=NODES, policy=policy)
        self.cluster.network = Network(delay_s=(0.001, draw.choice([0.005, 0.05])), drop_rate=draw.choice([0.0, 0.03]))
        for name in draw.sample(sorted(self.cluster.nodes), draw.choice([0, 0, 3])):  # these hear of the first one late
            self.cluster.cut(name, engine.between(5.0, 20.0))
        self._begin(allow_fresh=True)
        engine.run_for(engine.between(2.0, 5.0))
        for _ in range(draw.randint(3, 7)):
            self._operate(draw.choice(OPERATIONS))
            engine.run_for(engine.between(0.05, 4.0))
        self._end()
        return self.cluster

    def _reachable(self) -> list[str]:
        nodes = self.cluster.nodes
        return [name for name in sorted(nodes) if nodes[name].is_running and not nodes[name].is_cut]

    def _begin(self, *, allow_fresh: bool) -> None:
        names = self._reachable()
        names = self.engine.random.sample(names, min(len(names), self.engine.random.randint(2, 4)))
        if not names:
            self.engine.run_for(10.0)
            return self._begin(allow_fresh=allow_fresh)
        ranks = len(names) + self.engine.random.choice([0, 0, 1])
        self.job = Job(RUN, {rank: names[rank % len(names)] for rank in range(ranks)}, allow_fresh=allow_fresh)
        self.cluster.start_job(self.job)
        return None

    def _stop(self) -> None:
        self.job.is_stopped = True
        for trainer in list(self.job.trainers.values()):
            self.cluster.kill_trainer(trainer)

    def _operate(self, what: str) -> None:
        engine, cluster, draw = self.engine, self.cluster, self.engine.random
        name = draw.choice(sorted(cluster.nodes))
        if what == "kill_trainer":
            cluster.kill_trainer(draw.choice(list(self.job.trainers.values())))
        elif what == "crash_coordinator":
            cluster.crash_coordinator(engine.between(0.05, 4.0))
        elif what == "restart_daemon" and cluster.nodes[name].is_running:
            cluster.restart_daemon(name, engine.between(0.05, 2.5))
        elif what == "cut_many":
            for cut in draw.sample(sorted(cluster.nodes), draw.randint(1, 5)):
                cluster.cut(cut, engine.between(2.2, 7.0) * cluster.lease_s)
        elif what == "destroy" and len(cluster.nodes) > 4 and cluster.checker.can_lose(1):
            cluster.destroy(name, replace_after_s=draw.choice([None, 1.0]))
        elif what == "distrust":
            if cluster.distrust(self.job):
                engine.run_for(engine.between(0.5, 4.0) * cluster.lease_s)
                self._kill_one()
        elif what == "drain" and cluster.control is not None:
            cluster.drain(name, undo=draw.random() < 0.3)
        elif what == "move":
            self._stop()
            engine.run_for(engine.between(0.0, 4.0))
            self._begin(allow_fresh=True)
        elif what in ("finish", "forget", "idle") and not self.has_storage:  # which keeps what memory forgets
            self._end_run(what)

    def _kill_one(self) -> None:
        alive = [trainer for trainer in self.job.trainers.values() if trainer.is_alive]
        if alive:
            self.cluster.kill_trainer(self.engine.random.choice(alive))

    def _end_run(self, how: str) -> None:
        """The run ends in one of three ways, and its name is used again, maybe while nodes are away."""
        engine, cluster, job = self.engine, self.cluster, self.job
        if not engine.run_until(lambda: cluster.control is not None and cluster.is_training(job), limit_s=15.0):
            return
        if how == "idle" and not cluster.policy.job_ttl_s:
            return
        job.is_stopped = True
        engine.run_for(0.5)
        if not cluster.is_training(job):
            job.is_stopped = False
            cluster.supervise()
            return
        if how == "finish":
            for trainer in job.trainers.values():
                trainer.phase = SessionPhase.ENDED
                cluster.nodes[trainer.node].changed()
        else:
            self._stop()
        before = self._tombstone()
        cluster.checker.forget(RUN)
        if how == "forget":
            engine.run_until(self._forget, limit_s=30.0)
        if not engine.run_until(lambda: self._is_kept(before), limit_s=40.0):
            raise _UndecidedError
        self.ended.append(how)
        if engine.random.random() < 0.6:
            engine.run_for(engine.between(0.0, 12.0))
        if engine.random.random() < 0.3:
            cluster.crash_coordinator(engine.between(0.05, 3.0))
        for trainer in list(job.trainers.values()):  # processes that called finish() end
            node = cluster.nodes.get(trainer.node)
            trainer.is_alive = False
            if node is not None and trainer in node.trainers:
                node.trainers.remove(trainer)
                node.changed()
        self._begin(allow_fresh=True)

    def _tombstone(self) -> object:
        return self.cluster.core().tombstones.get(RUN) if self.cluster.control is not None else None

    def _is_kept(self, before: object) -> bool:
        """Whether a new tombstone lies on a node that the coordinator hears."""
        found, nodes = self._tombstone(), self.cluster.nodes
        return found not in (before, None) and any(
            nodes[name].tombstones.get(RUN) == found for name in self._reachable()
        )

    def _forget(self) -> bool:
        try:
            self.cluster.core().forget(RUN)
        except (BackstayError, AssertionError):
            return False
        return True

    def _end(self) -> None:
        """Everything comes back; the job trains, is protected and goes forward, and nothing is left of the others."""
        engine, cluster, job = self.engine, self.cluster, self.job
        engine.run_for(8 * cluster.lease_s)
        cluster.network = Network()
        cluster.trust()
        for name in sorted(cluster.core().drains):
            cluster.drain(name, undo=True)
        if self.has_storage:
            cluster.disturb_storage(0.1)

        def is_well() -> bool:
            return cluster.is_training(job) and cluster.is_protected(RUN)

        def fail(problem: str) -> None:
            raise BrokenPromiseError(f"seed {self.seed}: {problem} ({self.ended}, {job.refusals})")

        if not engine.run_until(is_well, limit_s=60.0):
            fail("not training and protected")
        step = cluster.checker.protected_step(RUN)
        if not engine.run_until(lambda: is_well() and cluster.checker.protected_step(RUN) > step + 4, limit_s=40.0):
            fail(f"protected steps do not advance from {step}")
        worlds = set(cluster.checker.runs[RUN].worlds)

        def is_clean() -> bool:
            writers = {
                s.world_id for n in cluster.nodes.values() if RUN in n.memory for s in n.memory[RUN].shards.values()
            }
            return writers <= worlds

        if not engine.run_until(is_clean, limit_s=20.0):
            fail("what was forgotten is still held")


class _UndecidedError(Exception):
    """The run did not end: nothing of what follows can be judged."""


def play(seed: int, *, has_storage: bool = False) -> str:
    """One scenario; how the runs of the name ended, for those who look whether enough is drawn."""
    scenario = Lifetimes(seed, has_storage=has_storage)
    try:
        scenario.run()
    except _UndecidedError:
        return "undecided"
    return ",".join(scenario.ended)
