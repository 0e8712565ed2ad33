"""Time as the daemon sees it, as a value that is passed in: code that decides gets a number, not a clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """Two clocks: ``monotonic_s`` for waits and deadlines, ``unix_s`` for people."""

    monotonic_s: Callable[[], float] = time.monotonic
    unix_s: Callable[[], float] = time.time
