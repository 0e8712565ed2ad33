"""Liveness and readiness of a daemon, from the heartbeats of its own loops. Must not ask a peer or the event loop.

A daemon is *alive* while each registered loop beats within a bound; only a restart would help one that does not. It is *ready*
when it serves. Other threads read both, so that a loop that hangs is noticed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from backstay import faults

logger = logging.getLogger(__name__)

PULSE_S: Final = 2.0
LEAST_BOUND_S: Final = 10.0
BOUND_LEASES: Final = 3


class Health:
    """Beats and readiness of one daemon.

    Args:
        lease_s: The daemon's lease: a loop may be silent for three of them, at least 10 s.
        monotonic_s: The clock.
    """

    def __init__(self, *, lease_s: float, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self.bound_s = max(LEAST_BOUND_S, BOUND_LEASES * lease_s)
        self.monotonic_s = monotonic_s
        self._beats: dict[str, float] = {}
        self._checks: dict[str, Callable[[], str]] = {}
        self._not_ready = "starting"
        self._sentence: Callable[[], str] = lambda: "ready"

    def beat(self, loop: str) -> None:
        """``loop`` ran once more; its first beat registers it."""
        self._beats[loop] = self.monotonic_s()

    def watch(self, part: str, broken: Callable[[], str]) -> None:
        """Have ``broken`` say whether ``part`` needs a restart: what is wrong, or "". Called from any thread."""
        self._checks[part] = broken

    def set_ready(self, sentence: Callable[[], str]) -> None:
        """Everything is served; ``sentence`` describes the state for people, and is called from any thread."""
        self._sentence = sentence
        self._not_ready = ""

    def set_unready(self, why: str) -> None:
        """No longer serving, or not yet."""
        self._not_ready = why

    def not_alive(self) -> str:
        """What needs a restart, as a sentence; empty if nothing does."""
        now = self.monotonic_s()
        for loop, beat in list(self._beats.items()):
            if now - beat > self.bound_s:
                return f"{loop} has not run for {now - beat:.1f} s; the limit is {self.bound_s:g} s"
        for part, broken in list(self._checks.items()):
            if why := broken():
                return f"{part}: {why}"
        return ""

    def alive(self) -> str:
        """The sentence of a daemon that is alive."""
        now = self.monotonic_s()
        return "alive: " + ", ".join(f"{loop} {now - beat:.1f} s ago" for loop, beat in list(self._beats.items()))

    def not_ready(self) -> str:
        """Why nothing is served, as a sentence; empty when ready."""
        return self._not_ready

    def ready(self) -> str:
        """The sentence of a daemon that serves."""
        return self._sentence()


async def pulse(health: Health, *, period_s: float = PULSE_S, on_beat: Callable[[], None] = lambda: None) -> None:
    """The event loop's own beat, until cancelled. ``on_beat`` is called after each."""
    while True:
        faults.reach("pulse")
        health.beat("the event loop")
        try:
            on_beat()
        except Exception:  # a daemon that cannot report its state is alive nevertheless
            logger.exception("cannot report the state of this daemon")
        await asyncio.sleep(period_s)
