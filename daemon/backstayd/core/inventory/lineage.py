"""Which histories of a run are alive: arithmetic of attempts. Pure.

Each decision begins an *attempt*, a history of its own, from a base (attempt, step) of an older one; snapshots order by
(attempt, step). Invariant: at most one chain of attempts is live. A snapshot is live if its attempt is in the chain and its
step is at or below the one where the next attempt left it. What was trained above a base and then left behind is dead for
good: a world that restored it would mix two histories, of which other ranks know nothing.

Two things keep that true while nodes are away. The chain is that of the decision of the highest *generation*, for each decision
raises the generation above every one seen before, on all nodes, before it is made. And an attempt is never given twice: a
coordinator that may not know the newest decisions leaps ahead (``recover/numbering.py``); where even that fails, because
every node that recorded a decision is gone, the world that wrote an attempt tells the two apart.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from backstay.ids import SnapshotKey
from backstayd.core.inventory.catalog import SnapshotView
from backstayd.core.messages.decisions import Decision, Lineage, Outcome
from backstayd.core.messages.durable import PersistedSnapshot

KEPT_ATTEMPTS = 32  # of which nothing need be left: nodes that are away may hold parts of them


def newest_decision(decisions: Iterable[Decision]) -> Decision | None:
    """The decision that the run's history follows: of the highest generation, which fenced off the others."""
    made = [decision for decision in decisions if decision.outcome is not Outcome.REFUSED]
    return max(made, key=lambda d: (d.generation.number, d.attempt, d.decision_id), default=None)


def live_lineage(
    head: Decision | None,
    views: Sequence[SnapshotView],
    decisions: Iterable[Decision] = (),
    records: Iterable[PersistedSnapshot] = (),
) -> tuple[Lineage, ...]:
    """The live attempts, newest first: those of the newest decision, or of what a later one left on durable storage.

    An attempt above the newest decision that belongs to no known decision has lost every node that recorded its decision:
    where it began is not known, so only its own snapshots are trusted.
    """
    known = head.lineage if head is not None else ()
    for record in records:
        if record.attempt > (known[0].attempt if known else 0):
            known = record.lineage or (Lineage(attempt=record.attempt, base_attempt=0, base_step=0),)
    top = known[0].attempt if known else 0
    decided = {entry.attempt for decision in decisions for entry in decision.lineage}
    newest = max((view.key.attempt for view in views if view.key.attempt not in decided), default=0)
    if newest > top:
        return (Lineage(attempt=newest, base_attempt=0, base_step=0),)
    return known


def is_live(view: SnapshotView, lineage: Sequence[Lineage]) -> bool:
    """Whether ``view`` belongs to one of the live attempts, at or below the step where the next one left it."""
    return is_live_place(view.key, lineage, world_id=view.world_id)


def is_live_place(key: SnapshotKey, lineage: Sequence[Lineage], *, world_id: str = "") -> bool:
    """As :func:`is_live`, for a snapshot of which only the place and maybe its world are known."""
    limit: int | None = None
    expected = lineage[0].attempt if lineage else 0
    for entry in lineage:
        if entry.attempt != expected:
            return False
        if key.attempt == entry.attempt:
            is_same_world = not entry.world_id or not world_id or entry.world_id == world_id
            return is_same_world and (limit is None or key.step <= limit)
        expected, limit = entry.base_attempt, entry.base_step
    return False


def trimmed(lineage: Sequence[Lineage], *, needed: Collection[int]) -> tuple[Lineage, ...]:
    """``lineage`` without old attempts of which nothing is left: it travels in every report, and a run restarts for months.

    What began from an attempt that goes counts as begun where that one did, so that the same snapshots are live as before.
    """
    kept: list[Lineage] = []
    for place, entry in enumerate(lineage):
        if place < KEPT_ATTEMPTS or entry.attempt in needed:
            kept.append(entry)
        elif entry.base_attempt:
            kept[-1] = replace(kept[-1], base_attempt=entry.base_attempt, base_step=entry.base_step)
    return tuple(kept)


def extend(lineage: Sequence[Lineage], *, attempt: int, base: tuple[int, int], world_id: str) -> tuple[Lineage, ...]:
    """The lineage of a new attempt that begins from ``base`` (attempt, step); attempt 0 is from scratch."""
    entry = Lineage(attempt=attempt, base_attempt=base[0], base_step=base[1], world_id=world_id)
    if base[0] == 0:
        return (entry,)
    places = [index for index, old in enumerate(lineage) if old.attempt == base[0]]
    return (entry, *(lineage[places[0] :] if places else ()))
