"""Faults that hit half of something, or in the middle of a recovery: lines that carry one way, memory that is half gone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backstayd.core.recover.recovery import Stage

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster
    from tests.simulation.node import Node

ONE_WAY = ("deaf", "mute")
IN_RECOVERY = ("kill", "destroy", "drain", "crash_coordinator")
MISHAPS = (*ONE_WAY, "lose_half", "lose_half", *IN_RECOVERY)


def cut_one_way(cluster: Cluster, node: Node, direction: str, for_s: float) -> None:
    """A deaf node's reports arrive and nothing reaches it; a mute one hears and is not heard."""
    until_s = cluster.engine.now_s + for_s
    if direction == "deaf":
        node.deaf_until_s = until_s
    else:
        node.mute_until_s = until_s
    node.steady_since_s = max(node.steady_since_s, until_s)


def lose_half(cluster: Cluster, node: Node, after_s: float) -> None:
    """The daemon dies and comes back with half of its files: as much of a loss as that of the node."""
    draw = cluster.engine.random
    cluster.checker.destroyed(node)
    for memory in node.memory.values():
        memory.shards = {place: memory.shards[place] for place in sorted(memory.shards) if draw.random() < 0.5}
        memory.plans = {plan_id: memory.plans[plan_id] for plan_id in sorted(memory.plans) if draw.random() < 0.7}
        kept = {place for place in sorted(memory.fragments) if draw.random() < 0.5}
        memory.fragments = {place for place in kept if place[0] in memory.plans}
    cluster.restart_daemon(node.name, after_s)


def begin_recovery(cluster: Cluster) -> bool:
    """Kill a rank and wait until the next world decides; False if none does."""
    engine = cluster.engine
    alive = [trainer for job in cluster.jobs for trainer in job.trainers.values() if trainer.is_alive]
    if not alive or any(cluster.checker.protected_step(job.run) == 0 for job in cluster.jobs):
        return False
    cluster.kill_trainer(engine.random.choice(alive))

    def is_deciding() -> bool:
        runs = cluster.core().runs.values() if cluster.control is not None else ()
        return any(state.recovery.stage in (Stage.FENCING, Stage.PREPARE, Stage.RECORD) for state in runs)

    is_begun = engine.run_until(is_deciding, limit_s=6.0)
    engine.run_for(engine.between(0.0, 0.15))
    return is_begun and cluster.control is not None
