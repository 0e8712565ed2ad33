"""What a simulated node does about runs that are forgotten: it keeps what names them, and deletes what that covers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backstay.ids import SnapshotKey
from backstayd.core.messages.desired import NodeDesired
from backstayd.core.messages.report import SessionPhase
from backstayd.core.messages.tombstone import Cause, Tombstone

if TYPE_CHECKING:
    from tests.simulation.node import Node


def bury(node: Node, desired: NodeDesired) -> None:
    """Obey what is said of tombstones."""
    for one in desired.lifted:
        if node.tombstones.get(one.run) == one:
            del node.tombstones[one.run]
            node.changed()
    for one in desired.tombstones:
        if one.cause is not Cause.UNUSED and node.tombstones.get(one.run) != one:
            node.tombstones[one.run] = one
            node.changed()
        _delete(node, one)


def _delete(node: Node, tombstone: Tombstone) -> None:
    run = tombstone.run
    trainers = [one for one in node.trainers if one.run == run and one.is_alive and one.is_attached]
    is_used = {one.phase for one in trainers} - {SessionPhase.ENDED}
    if any(one.phase is SessionPhase.TRAINING and one.attempt <= tombstone.attempt for one in trainers) or (
        tombstone.cause is Cause.UNUSED and is_used
    ):
        return
    for one in trainers:
        if one.phase is SessionPhase.ENDED and one.attempt <= tombstone.attempt:
            node.trainers.remove(one)
            node.changed()
    memory = node.memory.get(run)
    if memory is None:
        return
    keys = {SnapshotKey(one.attempt, one.step): one.world_id for one in memory.shards.values()}
    keys |= {plan.key: keys.get(plan.key, "") for plan in memory.plans.values()}
    covered = {key for key, world_id in keys.items() if tombstone.covers(key, world_id)}
    decision = memory.decision
    if decision is not None and tombstone.covers_decision(decision.attempt, decision.generation):
        memory.decision = None
        node.changed()
    if memory.decision is None and covered == set(keys) and not is_used:
        del node.memory[run]
        if run in node.work:
            node.work[run].jobs.clear()
        node.changed()
        return
    node.delete(memory, lambda attempt, step: SnapshotKey(attempt, step) in covered)
