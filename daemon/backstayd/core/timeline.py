"""What happened, for people: bounded, and without repeating a sentence before it changes. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

KEPT_EVENTS = 500  # a day of a troubled cluster, and no large document
FREQUENT_KINDS = frozenset({"complete", "protected", "released_snapshot"})  # one each per snapshot: kept apart


class LogEvent(Protocol):
    """Adds an event of one run; ``cause`` is for code that decides on more than the kind."""

    def __call__(self, kind: str, message: str, *, cause: str = "") -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """``at_s`` is in the clock the core is driven with."""

    at_s: float
    run: str
    kind: str
    message: str
    cause: str = ""


class Timeline:
    """The newest events, oldest first; frequent kinds cannot push the rare ones out."""

    def __init__(self) -> None:
        self._rare: deque[Event] = deque(maxlen=KEPT_EVENTS - 150)
        self._frequent: deque[Event] = deque(maxlen=150)
        self._fresh: deque[Event] = deque(maxlen=2 * KEPT_EVENTS)
        self._last: dict[tuple[str, str], str] = {}

    def add(self, at_s: float, run: str, kind: str, message: str, *, cause: str = "") -> None:
        """Add an event, unless the last one of this run and kind has the same message."""
        if self._last.get((run, kind)) == message:
            return
        self._last[run, kind] = message
        event = Event(at_s=at_s, run=run, kind=kind, message=message, cause=cause)
        (self._frequent if kind in FREQUENT_KINDS else self._rare).append(event)
        self._fresh.append(event)

    def allow_again(self, run: str, kind: str) -> None:
        """The state that the last event described has passed: the same message is a new event."""
        self._last.pop((run, kind), None)

    def forget(self, run: str) -> None:
        """Free what is kept to recognise repetitions of ``run``."""
        for key in [key for key in self._last if key[0] == run]:
            del self._last[key]

    def take_fresh(self) -> list[Event]:
        """Events since the last call, for the log."""
        fresh = list(self._fresh)
        self._fresh.clear()
        return fresh

    def all(self) -> list[Event]:
        return sorted([*self._rare, *self._frequent], key=lambda event: event.at_s)
