"""Tasks of a node by name: one of a name at a time, tried again with growing pauses, bounded in number.

Knows names and outcomes, not what a task is about.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from backstayd.clock import Clock

logger = logging.getLogger(__name__)

FIRST_PAUSE_S: Final = 0.1
MAX_REMEMBERED: Final = 10_000
FOREVER: Final = float("inf")


@dataclass(slots=True)
class _Record:
    run: str
    failure_count: int = 0
    settled_until_s: float = 0.0


class Tasks:
    """``on_end`` is called after every task, and when a pause is over."""

    def __init__(self, clock: Clock, on_end: Callable[[], None], *, last_pause_s: float) -> None:
        self._clock = clock
        self._on_end = on_end
        self._last_pause_s = last_pause_s
        self._running: dict[str, tuple[str, asyncio.Task[None]]] = {}
        self._records: dict[str, _Record] = {}

    def running(self, run: str) -> frozenset[str]:
        return frozenset(key for key, (owner, _) in self._running.items() if owner == run)

    def settled(self, run: str) -> frozenset[str]:
        """Names that are done, given up, or wait for their next try."""
        now = self._clock.monotonic_s()
        return frozenset(key for key, r in self._records.items() if r.run == run and r.settled_until_s > now)

    def start(self, key: str, run: str, work: Callable[[], Awaitable[None]]) -> None:
        """Run ``work`` under ``key``; an exception of it is a failure that is logged and tried again."""
        assert key not in self._running, key
        task = asyncio.create_task(self._run(key, run, work), name=key)
        self._running[key] = (run, task)
        task.add_done_callback(lambda _: self._ended(key))  # also of a task that was cancelled before it began

    def cancel(self, key: str) -> None:
        if key in self._running:
            self._running[key][1].cancel()

    def settle(self, key: str, run: str, *, for_s: float = FOREVER) -> None:
        """Do not start ``key`` again for that long."""
        entry = self._record(key, run)
        entry.settled_until_s = self._clock.monotonic_s() + for_s
        if for_s != FOREVER:
            asyncio.get_running_loop().call_later(for_s, self._on_end)

    def fail(self, key: str, run: str) -> int:
        """Note a failure; the next try is after a growing pause. Returns how many there were."""
        entry = self._record(key, run)
        entry.failure_count += 1
        self.settle(key, run, for_s=min(self._last_pause_s, FIRST_PAUSE_S * 2 ** min(entry.failure_count - 1, 10)))
        return entry.failure_count

    async def close(self) -> None:
        """Cancel everything and wait for it."""
        tasks = [task for _, task in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # the callbacks of the last ones

    async def _run(self, key: str, run: str, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except Exception:  # the boundary of a task: it is tried again
            logger.exception("%s of run %s failed", key, run)
            self.fail(key, run)

    def _ended(self, key: str) -> None:
        del self._running[key]
        self._on_end()

    def _record(self, key: str, run: str) -> _Record:
        if key not in self._records:
            while len(self._records) >= MAX_REMEMBERED:
                del self._records[next(iter(self._records))]
            self._records[key] = _Record(run)
        return self._records[key]
