"""Waking everybody who waits for "something changed", without saying what: they look again themselves."""

from __future__ import annotations

import asyncio
import contextlib


class Bell:
    """Rung on every change; each waiter bounds its own wait."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, timeout_s: float) -> None:
        """Return at the next ring or after ``timeout_s``."""
        event = self._event
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, timeout_s)):
                await event.wait()
