"""Tasks of a node by key: one of a key at a time, tried again with growing pauses, bounded in number.

Knows keys and outcomes, not what a task does.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from backstayd.bounded import drop_oldest
from backstayd.clock import Clock

logger = logging.getLogger(__name__)

FIRST_PAUSE_S: Final = 0.1
MAX_REMEMBERED: Final = 10_000
FOREVER: Final = float("inf")


class TaskKind(enum.StrEnum):
    """What a task is for; behind each, what its key names besides the run."""

    VERIFY = "verify"  # decision, rank
    VERIFY_STORED = "verify-stored"  # decision, rank: a file of durable storage on this machine
    FETCH = "fetch"  # decision, rank
    RECORD = "record"  # decision
    ENCODE = "encode"  # plan
    FETCH_PLAN = "fetch-plan"  # rebuild, rank
    PREPARE = "prepare"  # rebuild, rank
    DECODE = "decode"  # rebuild, stripe
    VERIFY_STAGED = "verify-staged"  # rebuild, rank
    COPY = "copy"  # digest, rank
    CHECK_SUSPECT = "suspect"  # the suspect source, rank
    SURVEY = "survey"  # survey
    UPLOAD = "upload"  # snapshot, rank
    COMPLETE = "complete"  # snapshot: its completion record on durable storage
    PRUNE = "prune"  # snapshot, and where it lies
    DISTRUST = "distrust"  # snapshot
    TRUST = "trust"  # snapshot


DURABLE_KINDS: Final = frozenset(
    {TaskKind.SURVEY, TaskKind.UPLOAD, TaskKind.COMPLETE, TaskKind.PRUNE, TaskKind.DISTRUST, TaskKind.TRUST}
)


@dataclass(frozen=True, slots=True, order=True)
class TaskKey:
    """At most one task of a key runs at a time. ``subject`` is an id, ``index`` a rank or a stripe (:class:`TaskKind`)."""

    run: str
    kind: TaskKind
    subject: str
    index: int = -1

    def __str__(self) -> str:
        return f"{self.kind}:{self.subject}" + (f":{self.index}" if self.index >= 0 else "")


@dataclass(slots=True)
class _Record:
    failure_count: int = 0
    settled_until_s: float = 0.0


class Tasks:
    """The tasks under way, and when those that ended may start again.

    Args:
        on_end: Called after every task, and when a pause is over.
        last_pause_s: The longest pause between two tries; ``durable_pause_s``: of tasks on durable storage.
    """

    def __init__(
        self, clock: Clock, on_end: Callable[[], None], *, last_pause_s: float, durable_pause_s: float
    ) -> None:
        self._clock = clock
        self._on_end = on_end
        self._last_pause_s = last_pause_s
        self._durable_pause_s = durable_pause_s
        self._running: dict[TaskKey, asyncio.Task[None]] = {}
        self._records: dict[TaskKey, _Record] = {}

    def running(self, run: str) -> frozenset[TaskKey]:
        return frozenset(key for key in self._running if key.run == run)

    def count(self, kind: TaskKind) -> int:
        """How many tasks of a kind are under way, over all runs."""
        return sum(1 for key in self._running if key.kind is kind)

    def settled(self, run: str) -> frozenset[TaskKey]:
        """Those that are done, given up, or wait for their next try."""
        now = self._clock.monotonic_s()
        return frozenset(key for key, r in self._records.items() if key.run == run and r.settled_until_s > now)

    def start(self, key: TaskKey, work: Callable[[], Awaitable[None]]) -> None:
        """Run ``work`` under ``key``; an exception of it is a failure that is logged and tried again."""
        assert key not in self._running, key
        task = asyncio.create_task(self._run(key, work), name=str(key))
        self._running[key] = task
        task.add_done_callback(lambda _: self._ended(key))  # also of a task that was cancelled before it began

    def cancel(self, key: TaskKey) -> None:
        if key in self._running:
            self._running[key].cancel()

    def settle(self, key: TaskKey, *, for_s: float = FOREVER) -> None:
        """Do not start ``key`` again for that long."""
        self._record(key).settled_until_s = self._clock.monotonic_s() + for_s
        if for_s != FOREVER:
            asyncio.get_running_loop().call_later(for_s, self._on_end)

    def fail(self, key: TaskKey) -> int:
        """Note a failure; the next try is after a growing pause. Returns how many there were."""
        entry = self._record(key)
        entry.failure_count += 1
        longest_s = self._durable_pause_s if key.kind in DURABLE_KINDS else self._last_pause_s
        self.settle(key, for_s=min(longest_s, FIRST_PAUSE_S * 2 ** min(entry.failure_count - 1, 10)))
        return entry.failure_count

    async def close(self) -> None:
        """Cancel everything and wait for it."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # the callbacks of the last ones

    async def _run(self, key: TaskKey, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except Exception:  # the boundary of a task: it is tried again
            logger.exception("task %s of run %s failed; it will be retried", key, key.run)
            self.fail(key)

    def _ended(self, key: TaskKey) -> None:
        del self._running[key]
        self._on_end()

    def _record(self, key: TaskKey) -> _Record:
        if key not in self._records:
            drop_oldest(self._records, MAX_REMEMBERED - 1)
            self._records[key] = _Record()
        return self._records[key]
