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

    def note(self, text: str) -> None:
        """``text`` says who was refused and why, without what differs from try to try, such as a port."""
        now = time.monotonic()
        with self._lock:
            known = self._known.get(text)
            if known is not None and now - known.said_s < AGAIN_S:
                known.unsaid += 1
                return
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[text] = _Known(now)
        times = f" ({known.unsaid} more times meanwhile)" if known is not None and known.unsaid else ""
        self._logger.warning("refused: %s%s", text, times)
