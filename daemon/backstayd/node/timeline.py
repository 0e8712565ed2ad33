"""The last things that happened on this node, for people: a bounded list of sentences, never read by the daemon."""

from __future__ import annotations

from collections import deque
from typing import Any, Final

from backstayd.clock import Clock

MAX_EVENTS: Final = 500


class Timeline:
    """Newest last."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)

    def add(self, kind: str, run: str, message: str) -> None:
        event = {"time_unix_s": self._clock.unix_s(), "run": run, "kind": kind, "message": message}
        self._events.append(event)

    def document(self) -> list[dict[str, Any]]:
        return list(self._events)
