"""Forgetting runs on a node: stores the tombstones that the coordinator names, and deletes what they cover.

Must not delete what no tombstone covers, nor what a trainer here writes; a tombstone is on tmpfs before anything is deleted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from backstayd.core.messages.decisions import Decision
from backstayd.core.messages.desired import NodeDesired
from backstayd.core.messages.report import SessionPhase
from backstayd.core.messages.tombstone import Cause, Tombstone
from backstayd.node.node_state import NodeState
from backstayd.node.session import Session
from backstayd.node.trainers.sessions import Sessions
from backstayd.store import remove
from backstayd.store.index import HeldShard, RunIndex

logger = logging.getLogger(__name__)


class ForgottenRuns:
    """Deletes what the coordinator has forgotten. ``on_forgotten`` is called with a run of which nothing is left here."""

    def __init__(self, node: NodeState, sessions: Sessions, on_forgotten: Callable[[str], None]) -> None:
        self._node = node
        self._store = node.store
        self._sessions = sessions
        self._on_forgotten = on_forgotten
        self._ordered: tuple[Tombstone, ...] = ()  # those of the coordinator's last answer

    def on_desired(self, desired: NodeDesired) -> None:
        """Store the tombstones of an answer."""
        self._ordered = ()
        lasting = [one for one in desired.tombstones if one.cause is not Cause.UNUSED]
        try:
            is_lifted, is_buried = self._store.lift(desired.lifted), self._store.bury(lasting)
        except OSError as error:
            logger.error("cannot store tombstones, so nothing is deleted: %s", error)
            return
        self._ordered = desired.tombstones
        if is_lifted or is_buried:
            self._node.changed()

    def act(self) -> None:
        """Delete what the tombstones cover."""
        for tombstone in self._ordered:
            run = tombstone.run
            if run in self._store.runs or self._sessions.of_run(run):
                try:
                    self._delete(run, tombstone)
                except OSError as error:
                    logger.error("run %s: cannot delete what its tombstone covers: %s", run, error)

    def _delete(self, run: str, tombstone: Tombstone) -> None:
        sessions = self._sessions.of_run(run)
        if any(_is_spared(session, tombstone) for session in sessions):
            return  # the coordinator learns of it from the report, and lifts the tombstone
        index = self._store.runs.get(run) or RunIndex(run=run)
        ended = [one for one in sessions if one.phase is SessionPhase.ENDED and one.attempt <= tombstone.attempt]
        for session in ended:
            self._sessions.drop(session)
        if not _has_living(index, tombstone) and len(ended) == len(sessions):
            self._store.forget(run)
            self._on_forgotten(run)
            self._node.changed()
        elif self._delete_covered(index, tombstone):
            self._node.changed()

    def _delete_covered(self, index: RunIndex, tombstone: Tombstone) -> bool:
        """Delete only what is covered: the name is in use again. Returns whether there was anything."""
        keys = {key for key, _ in index.shards} | {plan.key for plan in index.plans.values()}
        kept = {held.record.key for held in index.shards.values() if not _covers_shard(tombstone, held)}
        doomed = sorted(key for key in keys - kept if tombstone.covers(key))
        for key in doomed:
            remove.release_snapshot(self._store, index.run, key)
        is_decided = index.decision is not None and _covers_decision(tombstone, index.decision)
        if is_decided:
            remove.drop_decision(self._store, index.run)
        return bool(doomed) or is_decided


def _is_spared(session: Session, tombstone: Tombstone) -> bool:
    """Whether this session forbids to delete anything."""
    if tombstone.cause is Cause.UNUSED:
        return session.phase is not SessionPhase.ENDED
    return session.phase is SessionPhase.TRAINING and session.attempt <= tombstone.attempt


def _has_living(index: RunIndex, tombstone: Tombstone) -> bool:
    return (
        any(not _covers_shard(tombstone, held) for held in index.shards.values())
        or any(not tombstone.covers(plan.key) for plan in index.plans.values())
        or (index.decision is not None and not _covers_decision(tombstone, index.decision))
    )


def _covers_shard(tombstone: Tombstone, held: HeldShard) -> bool:
    return tombstone.covers(held.record.key, held.record.world_id)


def _covers_decision(tombstone: Tombstone, decision: Decision) -> bool:
    return tombstone.covers_decision(decision.attempt, decision.generation)
