"""Rate-limits log lines about repeated events: each cause is logged once, then after a while again with a count.

Rejected peers retry about every second, and people watch a status each second.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

AGAIN_S: Final = 60.0
MAX_KNOWN: Final = 256


@dataclass(slots=True)
class _Known:
    written_s: float
    suppressed: int = 0


class Damper:
    """Decides whether a cause is logged now. Safe for threads.

    Beyond MAX_KNOWN causes, the least recently seen is forgotten.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._lock = threading.Lock()

    def due(self, cause: str) -> int | None:
        """How often ``cause`` was suppressed since it was last logged; None: it was logged less than AGAIN_S ago."""
        now = time.monotonic()
        with self._lock:
            known = self._known.pop(cause, None)
            if known is not None and now - known.written_s < AGAIN_S:
                known.suppressed += 1
                self._known[cause] = known
                return None
            self._known[cause] = _Known(now)
            while len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        return known.suppressed if known is not None else 0


class Refusals:
    """Logs rejected peers. Safe for threads; bounded."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._damper = Damper()

    def note(
        self, text: str, *, cause: str = "", level: int = logging.WARNING, error: BaseException | None = None
    ) -> None:
        """Log ``text``: who was rejected and why.

        Args:
            cause: The key of the rate limit; by default ``text``, which then must not contain what differs between tries,
                such as a port.
            error: Its stack trace is logged too: a bug of ours.
        """
        suppressed = self._damper.due(cause or text)
        if suppressed is None:
            return
        times = f" ({suppressed} more times meanwhile)" if suppressed else ""
        self._logger.log(level, "refused: %s%s", text, times, exc_info=error)
