"""Random scenarios: a seed draws cluster, policy and faults; promises are checked all the way, liveness at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from backstayd.core.drain_orders import DrainState
from backstayd.core.policy import CorePolicy
from tests.simulation.checker import BrokenPromiseError
from tests.simulation.cluster import Cluster, Job
from tests.simulation.engine import Engine, Network
from tests.simulation.mishaps import MISHAPS, ONE_WAY, begin_recovery, cut_one_way, lose_half
from tests.simulation.storage import URL

FAULTS = (
    "kill_trainer", "restart_daemon", "destroy", "destroy_two", "crash_coordinator", "second_coordinator", "cut", "pause",
    "corrupt", "destroy_for_good", "resize", "resize", "distrust", "drain", "drain", "undrain", "stop_drained", "fill",
)  # fmt: skip


STORAGE_FAULTS = (*FAULTS, "storage", "black_out", "black_out", "bring_back", "bring_back")


@dataclass(slots=True)
class Scenario:
    """What one seed draws."""

    seed: int
    is_harsh: bool = False  # loses more than parity covers, and corrupts
    has_mishaps: bool = False  # lines carry one way, memory is half gone, recoveries are hit in the middle
    has_storage: bool = False  # which can be down; whole clusters are lost, and parts of them come back

    def run(self) -> Cluster:
        """Play it; raises BrokenPromiseError, with the seed in its text."""
        engine = Engine(self.seed)
        cluster = self._build(engine)
        for job in cluster.jobs:
            cluster.start_job(job)
        engine.run_for(engine.between(1.0, 4.0))
        for _ in range(engine.random.randint(2, 5)):
            if self.has_mishaps and engine.random.random() < 0.5:
                self._mishap(engine, cluster)
            else:
                self._break(engine, cluster)
            engine.run_for(engine.between(0.02, 2.5))
        self._heal(engine, cluster)
        self._check_liveness(engine, cluster)
        return cluster

    def _build(self, engine: Engine) -> Cluster:
        draw = engine.random
        node_count = draw.choice([2, 3, 4, 4, 5, 6])
        policy = CorePolicy(
            parity=draw.choice([None, None, 1, 2]) if node_count > 2 else None,
            group_size=draw.choice([3, 8, 8]),
            keep=draw.choice([1, 1, 2]),
            lease_s=1.5,
            persist_url=URL if self.has_storage else "",
            persist_every_steps=draw.choice([1, 2, 3]) if self.has_storage else 0,
            persist_keep_last=draw.choice([1, 2, 3]) if self.has_storage else 3,
        )
        domains = ("a", "b") if draw.random() < 0.3 else ()
        cluster = Cluster(engine, node_count=node_count, policy=policy, domains=domains)
        cluster.network = Network(
            delay_s=(0.001, draw.choice([0.005, 0.05])),
            drop_rate=draw.choice([0.0, 0.0, 0.05]),
            duplicate_rate=draw.choice([0.0, 0.05]),
        )
        cluster.work_s = draw.choice([(0.005, 0.03), (0.02, 0.3)])
        cluster.checker.is_tolerant_of_corruption = self.is_harsh
        ranks = draw.randint(max(1, node_count - 1), node_count + 1)
        cluster.jobs.append(
            Job("default/gpt", {rank: f"n{rank % node_count + 1}" for rank in range(ranks)}, allow_fresh=self.is_harsh)
        )
        if draw.random() < 0.2:
            cluster.jobs.append(Job("default/other", {rank: f"n{rank % node_count + 1}" for rank in range(2)}))
            cluster.jobs[1].allow_fresh = self.is_harsh
        return cluster

    def _break(self, engine: Engine, cluster: Cluster) -> None:
        draw = engine.random
        fault = draw.choice(STORAGE_FAULTS if self.has_storage else FAULTS)
        name = draw.choice(sorted(cluster.nodes))
        if fault == "kill_trainer":
            trainers = [t for job in cluster.jobs for t in job.trainers.values() if t.is_alive]
            if trainers:
                cluster.kill_trainer(draw.choice(trainers))
        elif fault == "restart_daemon" and cluster.nodes[name].is_running:
            cluster.restart_daemon(name, engine.between(0.05, 2.5))
        elif fault.startswith("destroy"):
            self._destroy(engine, cluster, fault)
        elif fault == "crash_coordinator":
            cluster.crash_coordinator(engine.between(0.05, 2.5))
        elif fault == "second_coordinator":
            cluster.second_coordinator(engine.between(0.1, 3.0))
        elif fault == "cut":
            cluster.cut(name, engine.between(0.1, 3.0))
        elif fault == "pause" and cluster.nodes[name].is_running:
            cluster.pause(name, engine.between(0.1, 3.0))
        elif fault in STORAGE_FAULTS[len(FAULTS) :]:
            self._break_storage(engine, cluster, fault)
        elif fault == "distrust":
            self._distrust(engine, cluster)
        elif fault == "resize":
            self._resize(engine, cluster)
        elif fault == "corrupt" and self.is_harsh:
            cluster.corrupt(name)
        elif fault in ("drain", "undrain", "stop_drained", "fill"):
            self._drain(engine, cluster, fault, name)

    def _mishap(self, engine: Engine, cluster: Cluster) -> None:
        fault = engine.random.choice(MISHAPS)
        node = cluster.nodes[engine.random.choice(sorted(cluster.nodes))]
        if fault in ONE_WAY:
            cut_one_way(cluster, node, fault, engine.between(0.1, 4.0))
        elif fault == "lose_half":
            if node.is_running and (self.is_harsh or cluster.checker.can_lose(1)):
                lose_half(cluster, node, engine.between(0.05, 2.0))
        elif begin_recovery(cluster):
            trainers = [t for job in cluster.jobs for t in job.trainers.values() if t.is_alive]
            if fault == "kill" and trainers:
                cluster.kill_trainer(engine.random.choice(trainers))
            elif fault == "destroy":
                self._destroy(engine, cluster, engine.random.choice(("destroy", "destroy_for_good")))
            elif fault == "drain":
                cluster.drain(node.name)
            elif fault == "crash_coordinator":
                cluster.crash_coordinator(engine.between(0.05, 2.0))

    def _break_storage(self, engine: Engine, cluster: Cluster, fault: str) -> None:
        if fault == "storage":
            cluster.disturb_storage(engine.between(0.5, 6.0))
        elif fault == "bring_back":
            cluster.bring_back()
        elif all(cluster.storage.records(job.run) for job in cluster.jobs):
            cluster.black_out(engine.random.randint(0, 2))
            engine.run_for(engine.between(0.5, 12.0))

    def _resize(self, engine: Engine, cluster: Cluster) -> None:
        """The job comes back with another number of ranks, on some of the nodes."""
        job = engine.random.choice(cluster.jobs)
        names = engine.random.sample(sorted(cluster.nodes), engine.random.randint(1, len(cluster.nodes)))
        ranks = engine.random.randint(len(names), len(names) + 1)
        job.placements = {rank: names[rank % len(names)] for rank in range(ranks)}
        for trainer in [t for t in job.trainers.values() if t.is_alive]:
            cluster.kill_trainer(trainer)

    def _drain(self, engine: Engine, cluster: Cluster, fault: str, name: str) -> None:
        """An operator drains nodes, stops one that may be stopped, or changes his mind."""
        if cluster.control is None:
            return
        if fault == "fill":
            cluster.nodes[name].is_full = not cluster.nodes[name].is_full
        elif fault == "drain":
            cluster.drain(name)
        elif fault == "undrain":
            for drained in sorted(cluster.core().drains):
                cluster.drain(drained, undo=True)
        elif len(cluster.nodes) > 2:
            if not cluster.core().drains:
                cluster.drain(name)
            engine.run_for(3.2 * cluster.lease_s)
            engine.run_until(lambda: cluster.control is not None and self._is_drained(cluster), limit_s=8.0)
            drained = [] if cluster.control is None else sorted(set(cluster.core().drains) & set(cluster.nodes))
            if drained:
                told_s = self._hesitate(engine, cluster)
                after_s = engine.between(0.05, 3.0) if engine.random.random() < 0.7 else None
                if cluster.control is not None:
                    cluster.stop_drained(drained[0], replace_after_s=after_s, told_s=told_s)

    def _hesitate(self, engine: Engine, cluster: Cluster) -> float | None:
        """The operator takes his time while room runs out. Returns when he was told that the nodes are safe."""
        drains = cluster.core().drains
        if self.seed % 4 != 2 or not all(verdict.state is DrainState.SAFE for verdict in drains.values()):
            return None
        told_s = engine.now_s
        for node in cluster.nodes.values():
            node.is_full = True
        engine.run_for(self.seed % 9 * cluster.lease_s)
        return told_s

    def _is_drained(self, cluster: Cluster) -> bool:
        """Whether some node is called safe to stop."""
        return any(verdict.state is DrainState.SAFE for verdict in cluster.core().drains.values())

    def _distrust(self, engine: Engine, cluster: Cluster) -> None:
        """NaN after a restore, and, once everybody can know of it, a restart."""
        job = engine.random.choice(cluster.jobs)
        if cluster.distrust(job):
            engine.run_for(engine.between(0.5, 4.0) * cluster.lease_s)
            for trainer in [t for t in job.trainers.values() if t.is_alive][:1]:
                cluster.kill_trainer(trainer)

    def _destroy(self, engine: Engine, cluster: Cluster, fault: str) -> None:
        """Never more than every job survives, unless the scenario is harsh."""
        count = 2 if fault == "destroy_two" else 1
        if len(cluster.nodes) - count < 2:
            return
        if not self.is_harsh and not cluster.checker.can_lose(count):
            return
        for name in engine.random.sample(sorted(cluster.nodes), count):
            if fault == "destroy_for_good":
                cluster.destroy(name, replace_after_s=None)
            else:
                new_name = name if engine.random.random() < 0.5 else f"{name}x"
                cluster.destroy(name, replace_after_s=engine.between(0.05, 3.0), new_name=new_name)

    def _heal(self, engine: Engine, cluster: Cluster) -> None:
        """All faults end; everything that is still away comes back."""
        engine.run_for(3.2)
        cluster.network = Network()
        engine.run_for(3.2)  # a coordinator that came last has settled
        cluster.trust()
        for node in cluster.nodes.values():
            node.is_full = False
        if engine.random.random() < 0.5:
            for name in sorted(cluster.core().drains):
                cluster.drain(name, undo=True)
        cluster.work_s = (0.005, 0.03)

    def _check_liveness(self, engine: Engine, cluster: Cluster) -> None:
        """Every job trains again, is protected, and goes forward."""

        def is_well() -> bool:
            return all(cluster.is_training(job) and cluster.is_protected(job.run) for job in cluster.jobs)

        def fail(what: str) -> None:
            states = [
                (job.run, cluster.redundancy(job.run), [t.phase.value for t in job.trainers.values()], job.refusals)
                for job in cluster.jobs
            ]
            raise BrokenPromiseError(f"seed {self.seed}: {what}: {states}")

        if not engine.run_until(is_well, limit_s=40.0):
            fail("not training and protected 40 s after the last fault")
        steps = {job.run: cluster.checker.protected_step(job.run) for job in cluster.jobs}

        def has_moved() -> bool:
            return is_well() and all(cluster.checker.protected_step(run) > step + 2 for run, step in steps.items())

        if not engine.run_until(has_moved, limit_s=40.0):
            fail(f"protected steps do not advance from {steps}")
        self._check_drains(engine, cluster, fail)

    def _check_drains(self, engine: Engine, cluster: Cluster, fail: Callable[[str], None]) -> None:
        """Every node that drains may be stopped in the end, if another stays."""

        def is_done() -> bool:
            leaving = {name for name, node in cluster.nodes.items() if node.is_draining}
            drains = cluster.core().drains
            is_safe = all(name in drains and drains[name].state is DrainState.SAFE for name in leaving)
            return is_safe or leaving == set(cluster.nodes)

        if not engine.run_until(is_done, limit_s=40.0):
            fail(f"not drained after 40 s: {cluster.core().drains}")
