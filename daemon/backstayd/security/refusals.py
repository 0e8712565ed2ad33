"""Refused peers in the log: each once, and again after a while with how often; they try again every second or so."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Final

AGAIN_S: Final = 60.0
MAX_KNOWN: Final = 256


@dataclass(slots=True)
class _Known:
    said_s: float
    unsaid: int = 0


class Refusals:
    """What was said lately. Safe for threads; bounded."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._known: dict[str, _Known] = {}
        self._lock = threading.Lock()

    def note(
        self, text: str, *, cause: str = "", level: int = logging.WARNING, error: BaseException | None = None
    ) -> None:
        """Log ``text``: who was refused and why.

        Args:
            cause: What is logged once a while; by default ``text``, which then must not say what differs from try to try,
                such as a port.
            error: Its stack trace is logged, too: a mistake of ours.
        """
        now = time.monotonic()
        cause = cause or text
        with self._lock:
            known = self._known.get(cause)
            if known is not None and now - known.said_s < AGAIN_S:
                known.unsaid += 1
                return
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[cause] = _Known(now)
        times = f" ({known.unsaid} more times meanwhile)" if known is not None and known.unsaid else ""
        self._logger.log(level, "refused: %s%s", text, times, exc_info=error)
