"""The one way to wake code that waits for a change. Carries no data: a waiter reads the state itself."""

from __future__ import annotations

import asyncio
import contextlib


class Signal:
    """A broadcast condition: waiters re-check their own predicate. Several notifications before they do are one.

    A waiter that must miss nothing reads :attr:`count` before it looks and passes it to :meth:`wait`.
    """

    def __init__(self) -> None:
        self.count = 0
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Wake every waiter."""
        self.count += 1
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, timeout_s: float, *, since: int | None = None) -> None:
        """Return at the next notification (after the ``since``-th), at the latest after ``timeout_s``."""
        if since is not None and since != self.count:
            await asyncio.sleep(0)  # a waiter that notifies itself must not starve others
            return
        event = self._event
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, timeout_s)):
                await event.wait()
