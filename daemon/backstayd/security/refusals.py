"""What others do again and again, in the log: each cause once, and again after a while with how often.

Refused peers try again every second or so, and people watch a status each second.
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
    held_back: int = 0


class Damper:
    """Whether a cause is to be logged now. Safe for threads.

    Of more than MAX_KNOWN causes the one that was not seen for longest is forgotten.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._lock = threading.Lock()

    def due(self, cause: str) -> int | None:
        """How often ``cause`` was held back since it was last due; None: it was due less than AGAIN_S ago."""
        now = time.monotonic()
        with self._lock:
            known = self._known.pop(cause, None)
            if known is not None and now - known.written_s < AGAIN_S:
                known.held_back += 1
                self._known[cause] = known
                return None
            self._known[cause] = _Known(now)
            while len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        return known.held_back if known is not None else 0


class Refusals:
    """Lines about refused peers. Safe for threads; bounded."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._damper = Damper()

    def note(
        self, text: str, *, cause: str = "", level: int = logging.WARNING, error: BaseException | None = None
    ) -> None:
        """Log ``text``: who was refused and why.

        Args:
            cause: What is logged once a while; by default ``text``, which then must not say what differs from try to try,
                such as a port.
            error: Its stack trace is logged, too: a mistake of ours.
        """
        held_back = self._damper.due(cause or text)
        if held_back is None:
            return
        times = f" ({held_back} more times meanwhile)" if held_back else ""
        self._logger.log(level, "refused: %s%s", text, times, exc_info=error)
