"""What one user of this machine may take of its daemon: connections, trainers, names of runs. Bytes: ``user_quota_bytes``.

A user at a limit is refused by name and number, or loses a connection that has said nothing; no other user notices. Must not
decide whose run it is (``ownership``).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Final

from backstay.errors import CapacityError
from backstayd.node.trainers.session import Session

if TYPE_CHECKING:
    from backstayd.node.trainers.sessions import Sessions
    from backstayd.store.store import Store

MAX_UNATTACHED: Final = 64  # connections of one user that are not known yet
MAX_UNATTACHED_IN_ALL: Final = 256
MAX_CONNECTIONS: Final = 1024  # of one user
MAX_TRAINERS: Final = 128  # of one user; a machine has a dozen accelerators
MAX_RUNS: Final = 128  # names of one user


class Places:
    """The connections of the local socket, by user. Invariant: whoever comes gets in unless that user has MAX_CONNECTIONS.

    Room is made by closing the connection that has been silent longest, of the same user or of the one who has most: one
    who attaches at once is never the longest silent for long.
    """

    def __init__(self) -> None:
        self._all: dict[asyncio.Task[None], int] = {}  # to the user
        self._unknown: dict[asyncio.Task[None], int] = {}  # those that did not attach, oldest first

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        return list(self._all)

    def is_full(self, uid: int) -> bool:
        return sum(1 for user in self._all.values() if user == uid) >= MAX_CONNECTIONS

    def enter(self, task: asyncio.Task[None], uid: int) -> None:
        """A new connection; the oldest silent one goes if there are too many."""
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
        """Whether the connection that ``task`` serves belongs to somebody now."""
        if task is None or task not in self._all:
            return
        if is_known:
            self._unknown.pop(task, None)
        else:
            self._unknown.setdefault(task, self._all[task])

    def _leave(self, task: asyncio.Task[None]) -> None:
        self._all.pop(task, None)
        self._unknown.pop(task, None)


def check_trainers(sessions: Sessions, uid: int, *, former: Session | None) -> None:
    """Raise CapacityError if the user has as many trainers here as one may have; ``former`` is being replaced."""
    count = sum(1 for session in sessions if session.uid == uid and session is not former)
    if count >= MAX_TRAINERS:
        raise CapacityError(
            f"user {uid} has {count} trainers attached to this daemon, the most that one user may have; end some first",
            reason="too_many_trainers",
        )


def check_names(store: Store, run: str, uid: int) -> None:
    """Raise CapacityError if ``run`` would be one name too many for the user."""
    if run in store.runs:
        return
    count = sum(1 for index in store.runs.values() if index.owner_uid == uid)
    if count >= MAX_RUNS:
        raise CapacityError(
            f"user {uid} has {count} runs on this node, the most that one user may have; forget some (`backstay forget`) "
            f"before {run} can begin",
            reason="too_many_runs",
        )


def drop_unused_names(store: Store, sessions: Sessions, desired: set[str]) -> None:
    """A name under which nothing lies, which nobody uses and of which the coordinator says nothing is given up."""
    used = {session.run for session in sessions} | desired
    for run in [run for run, index in store.runs.items() if run not in used and index.is_bare]:
        store.forget(run)
