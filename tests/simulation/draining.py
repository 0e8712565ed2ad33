"""How a simulated node drains: it remembers that it does, and copies what leaving nodes hold when it is asked to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backstayd.core.messages.desired import RunDesired
from backstayd.core.messages.plans import ShardCopy

if TYPE_CHECKING:
    from tests.simulation.node import Node

FORGET_LEASES = 10


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
