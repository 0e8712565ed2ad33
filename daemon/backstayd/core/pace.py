"""At which steps snapshots are taken: the same for all ranks, changed only at a step announced ahead. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from backstayd.core.records import Schedule, SessionRecord

INTERVAL_LIMIT = 4096
SMOOTH_INTERVALS = 8  # so many without a skip, and the interval is halved again
SMOOTH_LIMIT = 4096


@dataclass(slots=True)
class Pace:
    """The interval of one run. Invariant: a change takes effect at a step that no rank has reached when it is announced."""

    schedule: Schedule = field(default_factory=Schedule)
    handled_skip: int = 0
    smooth_from: int = 0
    smooth_needed: int = SMOOTH_INTERVALS
    _window: tuple[float, int] = (0.0, 0)
    _steps_per_s: float = 0.0

    def restart(self) -> None:
        """A new world begins: steps may go back, the interval stays."""
        interval = max(self.schedule.interval_steps, 1)
        self.schedule = Schedule(interval_steps=interval, from_step=0, previous_interval_steps=interval)
        self.handled_skip = 0
        self.smooth_from = 0
        self._window = (0.0, 0)

    def update(
        self, sessions: Collection[SessionRecord], *, is_protected: bool, lease_s: float, now_s: float
    ) -> str | None:
        """Raise the interval after a skip, lower it after a smooth while. Returns a sentence when it changed.

        ``is_protected``: some snapshot of this world is as well protected as can be. Before that, skips mean that slots
        wait for a repair, not that steps come too fast.
        """
        newest = max((session.last_step for session in sessions), default=0)
        self._measure(newest, now_s)
        skip = max((session.skipped_step for session in sessions if session.is_short_of_slots), default=0)
        if skip > self.handled_skip:
            self.handled_skip = skip
            self.smooth_from = newest
            if not is_protected or skip < self.schedule.from_step or self.schedule.interval_steps >= INTERVAL_LIMIT:
                return None
            reason = next((s.skip_reason for s in sessions if s.skipped_step == skip and s.skip_reason), "no free slot")
            self.smooth_needed = min(SMOOTH_LIMIT, self.smooth_needed * 2)
            return self._change(
                self.schedule.interval_steps * 2, newest, lease_s, f"step {skip} was skipped ({reason})"
            )
        interval = self.schedule.interval_steps
        is_settled = newest >= self.schedule.from_step
        if is_protected and interval > 1 and is_settled and newest - self.smooth_from > self.smooth_needed * interval:
            self.smooth_from = newest
            return self._change(
                interval // 2, newest, lease_s, f"{self.smooth_needed} snapshots were protected in time"
            )
        return None

    def _change(self, interval: int, newest: int, lease_s: float, reason: str) -> str:
        previous = self.schedule.interval_steps
        ahead = max(2 * max(interval, previous), int(self._steps_per_s * lease_s / 2))
        from_step = -(-(newest + ahead) // interval) * interval
        self.schedule = Schedule(interval_steps=interval, from_step=from_step, previous_interval_steps=previous)
        return f"a snapshot every {interval} steps from step {from_step} on: {reason}"

    def _measure(self, newest: int, now_s: float) -> None:
        began_s, began = self._window
        if newest < began or began_s == 0.0:
            self._window = (now_s, newest)
        elif now_s - began_s >= 1.0:
            self._steps_per_s = (newest - began) / (now_s - began_s)
            self._window = (now_s, newest)
