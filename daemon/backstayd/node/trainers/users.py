"""Users of this machine: whose run it is, and how many connections, trainers and runs one of them may have.

A run belongs to the user that the coordinator names, else to the first that attached here. A user at a limit is refused, or
loses its oldest silent connection; no other user notices. Bytes are limited by ``user_quota_bytes``.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

from backstay.errors import CapacityError, UsageError
from backstayd.node.node_state import NodeState
from backstayd.node.session import Session
from backstayd.store.index import UNKNOWN_UID
from backstayd.store.store import Store

MAX_UNATTACHED: Final = 64  # connections of one user that have not attached
MAX_UNATTACHED_IN_ALL: Final = 256
MAX_CONNECTIONS: Final = 1024  # of one user
MAX_TRAINERS: Final = 128  # of one user; a machine has a dozen accelerators
MAX_RUNS: Final = 128  # names of one user


class Connections:
    """The connections of the local socket, by user. Invariant: a user below MAX_CONNECTIONS can always connect.

    Room is made by closing the connection that has been silent longest, of the same user or of the one with most of them:
    a connection that attaches at once never is that one for long.
    """

    def __init__(self) -> None:
        self._all: dict[asyncio.Task[None], int] = {}  # task -> user
        self._unknown: dict[asyncio.Task[None], int] = {}  # those that have not attached, oldest first

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        return list(self._all)

    def is_full(self, uid: int) -> bool:
        return sum(1 for user in self._all.values() if user == uid) >= MAX_CONNECTIONS

    def enter(self, task: asyncio.Task[None], uid: int) -> None:
        """Add a connection; closes the oldest silent one if there are too many."""
        counts = Counter(self._unknown.values())
        crowded = None
        if counts[uid] >= MAX_UNATTACHED:
            crowded = uid
        elif counts.total() >= MAX_UNATTACHED_IN_ALL:
            crowded = counts.most_common(1)[0][0]
        oldest = next((other for other, user in self._unknown.items() if user == crowded), None)
        if oldest is not None:
            del self._unknown[oldest]
            oldest.cancel()
        self._all[task] = self._unknown[task] = uid
        task.add_done_callback(self._leave)

    def note(self, task: asyncio.Task[None] | None, *, is_known: bool) -> None:
        """Note whether the connection that ``task`` serves has attached or reads a snapshot."""
        if task is None or task not in self._all:
            return
        if is_known:
            self._unknown.pop(task, None)
        else:
            self._unknown.setdefault(task, self._all[task])

    def _leave(self, task: asyncio.Task[None]) -> None:
        self._all.pop(task, None)
        self._unknown.pop(task, None)


def check_trainers(sessions: Iterable[Session], uid: int, *, former: Session | None) -> None:
    """Raise CapacityError if the user has as many trainers here as one may have; ``former`` is being replaced."""
    count = sum(1 for session in sessions if session.uid == uid and session is not former)
    if count >= MAX_TRAINERS:
        raise CapacityError(
            f"user {uid} has {count} trainers attached to this daemon, the most per user; stop some first",
            reason="too_many_trainers",
        )


def check_names(store: Store, run: str, uid: int) -> None:
    """Raise CapacityError if ``run`` would be one run too many for the user."""
    if run in store.runs:
        return
    count = sum(1 for index in store.runs.values() if index.owner_uid == uid)
    if count >= MAX_RUNS:
        raise CapacityError(
            f"user {uid} has {count} runs on this node, the most per user; forget some (`backstay forget`) before {run} can "
            "begin",
            reason="too_many_runs",
        )


def drop_unused_names(store: Store, used: set[str]) -> None:
    """Forget each run of which nothing lies here and that is not in ``used``, by a trainer or the coordinator."""
    for run in [run for run, index in store.runs.items() if run not in used and index.is_bare]:
        store.forget(run)


def check_owner(node: NodeState, run: str, uid: int) -> None:
    """Raise UsageError (``not_owner``) if ``run`` is known to be another user's than ``uid``."""
    owner = node.run_desired(run).owner
    index = node.store.runs.get(run)
    if not owner and index is not None and index.owner_uid != UNKNOWN_UID:
        owner = str(index.owner_uid)
    if owner and owner != str(uid):
        raise UsageError(
            f"run {run} belongs to user {owner}, not to user {uid}; choose another run_id, or another job name",
            reason="not_owner",
        )


def adopt_owner(node: NodeState, run: str, owner: str) -> None:
    """Store the owner that the coordinator names beside the data of ``run``, so that this node reports it to the next one.

    Replaces the claim of a user without data here; data of another user's history is left to that user.
    """
    index = node.store.runs.get(run)
    if not owner or index is None or index.owner_uid == int(owner):
        return
    is_unclaimed = index.owner_uid == UNKNOWN_UID
    has_memory = bool(index.shards or index.plans or index.slots or index.staged or index.decision)
    if is_unclaimed == has_memory:  # unclaimed memory, or a claim without any
        node.store.write_owner(run, int(owner))
        index.owner_uid = int(owner)


def visible_to(uid: int, document: dict[str, Any], store: Store) -> dict[str, Any]:
    """The status document without what belongs to other users; root and the daemon's own user see everything."""
    if uid in (0, os.geteuid()):
        return document
    own = {"", *(run for run, index in store.runs.items() if index.owner_uid in (uid, UNKNOWN_UID))}
    shown = {name: [item for item in document[name] if item["run"] in own] for name in ("runs", "timeline")}
    return document | shown | {"foreign": []}
