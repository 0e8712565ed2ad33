"""How close heartbeats come to the end of a lease: the least margin over the last minute. Pure: time is an argument."""

from __future__ import annotations

from typing import Final

WINDOW_S: Final = 60.0


class LeastMargin:
    """The least margin noted within the last one to two halves of the window; the lease itself while nothing was noted."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._half_began_s = float("-inf")
        self._now = self._before = lease_s

    def note(self, margin_s: float, now_s: float) -> None:
        self._turn(now_s)
        self._now = min(self._now, margin_s)

    def least_s(self, now_s: float) -> float:
        """Never over the lease; below 0 when it ran out."""
        self._turn(now_s)
        return min(self._now, self._before)

    def _turn(self, now_s: float) -> None:
        elapsed_s = now_s - self._half_began_s
        if elapsed_s < WINDOW_S / 2:
            return
        self._before = self._now if elapsed_s < WINDOW_S else self._lease_s
        self._now, self._half_began_s = self._lease_s, now_s
