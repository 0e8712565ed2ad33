"""The generation and the attempt of a new decision: numbers that nobody has given yet. Pure.

Invariant: a new decision has a generation above, and begins an attempt above, every one that any node or durable storage
knows, *also those that are away*. Generations order decisions (the higher one fenced the lower one off), attempts order
snapshots; would a number be given twice, a node that comes back could end the world that trains, or its shards be taken for
those of another history.

What is away cannot be asked. So a coordinator that may not know the newest decision leaps: further than nodes can have got
without it. It may not know it where durable storage is ahead of what nodes remember, and where it has decided nothing itself
and not yet seen all hosts of the newest decision that it knows. Each term of an election has a range of generations of its own.
"""

from __future__ import annotations

from backstayd.core.inventory.run_context import RunContext
from backstayd.core.recover.choice import Memory

LEAP_GENERATIONS = 1_000_000  # more decisions and restarts than any cluster sees between two durable copies
LEAP_ATTEMPTS = 1000  # more restores than one run sees in that time
TERM_GENERATIONS = 1_000_000_000  # of one term of an election: room for 999 leaps


def generation_floor(context: RunContext, memory: Memory) -> int:
    """What the generation of a decision must be above."""
    known = [context.storage.newest_generation, context.head.generation.number if context.head is not None else 0]
    return max(known) + (LEAP_GENERATIONS if _may_be_behind(context, memory) else 0)


def next_attempt(context: RunContext, memory: Memory) -> int:
    """An attempt that was never given; remembered as given from now on."""
    seen = [view.key.attempt for view in context.views]
    seen.extend(decision.attempt for decision, _ in context.inventory.decisions.values())
    seen.extend(entry.attempt for entry in context.lineage)
    seen.append(context.storage.newest_attempt)
    seen.append(context.tombstone.attempt if context.tombstone is not None else 0)
    leap = LEAP_ATTEMPTS - 1 if _may_be_behind(context, memory) else 0
    memory.newest_attempt = max(memory.newest_attempt, max(seen) + leap) + 1
    return memory.newest_attempt


def attempts_in_use(context: RunContext) -> set[int]:
    """Attempts of which anything is left, in memory or on durable storage, or which are distrusted."""
    found = {view.key.attempt for view in context.views} | {record.attempt for record in context.storage.records}
    return found | {distrusted.attempt for distrusted in context.distrusted}


def _may_be_behind(context: RunContext, memory: Memory) -> bool:
    """Whether nodes that are away may know later decisions than any that is known here."""
    if context.storage.is_ahead_of(context.head):
        return True
    return context.head is not None and memory.newest_attempt == 0 and context.head.decision_id != memory.whole_head_id
