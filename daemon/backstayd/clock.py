"""Time as the daemon sees it, passed in as a value: code that decides gets a number, not a clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


def boot_s() -> float:
    """Seconds since this machine booted, including time asleep; cannot be set."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """``monotonic_s`` for waits and deadlines, ``unix_s`` for people, ``boot_s`` for what expires while the machine sleeps."""

    monotonic_s: Callable[[], float] = time.monotonic
    unix_s: Callable[[], float] = time.time
    boot_s: Callable[[], float] = boot_s
