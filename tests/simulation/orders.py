"""What a simulated node does when the coordinator tells it of tombstones, of distrusted snapshots and of copies to make."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backstay.ids import SnapshotKey
from backstayd.core.messages.decisions import Distrusted
from backstayd.core.messages.desired import NodeDesired, RunDesired
from backstayd.core.messages.plans import ShardCopy
from backstayd.core.messages.report import SessionPhase
from backstayd.core.messages.tombstone import Cause, Tombstone

if TYPE_CHECKING:
    from tests.simulation.node import Node, RunMemory, Trainer

FORGET_LEASES = 10


def apply_tombstones(node: Node, desired: NodeDesired) -> None:
    """Obey what is said of tombstones."""
    for one in desired.lifted:
        if node.tombstones.get(one.run) == one:
            del node.tombstones[one.run]
            node.changed()
    for one in desired.tombstones:
        if one.cause is not Cause.UNUSED and node.tombstones.get(one.run) != one:
            node.tombstones[one.run] = one
            node.changed()
        _apply_tombstone(node, one)


def _apply_tombstone(node: Node, tombstone: Tombstone) -> None:
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


def remember_distrust(node: Node, memory: RunMemory, desired: RunDesired) -> None:
    """Keep what the coordinator says, and strike out what an operator trusts again."""
    before = dict(memory.distrusted)
    for item in desired.distrusted:
        memory.distrusted.setdefault(item.snapshot_id, item)
    for snapshot_id in desired.trusted:
        memory.distrusted.pop(snapshot_id, None)
    if memory.distrusted != before:
        node.changed()


def distrust(node: Node, trainer: Trainer) -> Distrusted | None:
    """A trainer saw NaN: what its world restored is remembered here, and reported."""
    memory = node.memory.get(trainer.run)
    decision = memory.decision if memory is not None else None
    if memory is None or decision is None or decision.world_id != trainer.world_id or decision.base is None:
        return None
    base = decision.base
    item = Distrusted(snapshot_id=base.snapshot_id, attempt=base.attempt, step=base.step, reason="nan")
    memory.distrusted[base.snapshot_id] = item
    node.changed()
    return item


def copy_shards(node: Node, desired: RunDesired) -> None:
    """Begin with what the coordinator wants copied here."""
    work = node.work[desired.run]
    for copy in desired.copies:
        if not _is_here(node, desired.run, copy) and copy.digest not in work.failed_copies:
            node.job(desired.run, ("copy", copy.digest), _copy, node, desired.run, copy)


def _is_here(node: Node, run: str, copy: ShardCopy) -> bool:
    held = node.memory[run].shards.get((copy.attempt, copy.step, copy.rank))
    return held is not None and held.digest == copy.digest


def _copy(node: Node, run: str, copy: ShardCopy) -> bool:
    """One try; a job that is not wanted any more is over."""
    work = node.work[run]
    if work.desired is None or copy not in work.desired.copies or _is_here(node, run, copy):
        return True
    if node.is_full:
        work.failed_copies.add(copy.digest)
        node.cluster.engine.after(FORGET_LEASES * node.cluster.lease_s, _try_again, node, run, copy.digest)
        node.changed()
        return True
    for holder in copy.holders:
        other = node.cluster.reach(holder)
        theirs = other.memory[run].shards.get((copy.attempt, copy.step, copy.rank)) if _knows(other, run) else None
        if other is None or theirs is None or theirs.digest != copy.digest:
            continue
        if theirs.digest in other.memory[run].corrupt:
            other.quarantine_shard(run, theirs)
            continue
        node.memory[run].shards[copy.attempt, copy.step, copy.rank] = theirs
        node.changed()
        return True
    return False


def _try_again(node: Node, run: str, digest: str) -> None:
    if run in node.work:
        node.work[run].failed_copies.discard(digest)
        node.changed()


def _knows(node: Node | None, run: str) -> bool:
    return node is not None and run in node.memory
