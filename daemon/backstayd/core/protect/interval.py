"""At which steps snapshots are taken: the same for all ranks, changed only at a step announced ahead. Pure.

Where a rank waits for more than one twentieth of its time, or skips a step because no slot came free, snapshots are taken less
often; where there is room, more often again.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from backstay.protocol.messages import Schedule
from backstayd.core.messages.report import SessionRecord

INTERVAL_LIMIT = 4096  # steps: rarer snapshots protect next to nothing, and doubling must end
SMOOTH_INTERVALS = 8  # without a skip or a long wait before the interval is halved: one quiet interval proves nothing
SMOOTH_LIMIT = 4096  # each raise doubles the number above, so that a job at its limit is not disturbed again and again
WAIT_LIMIT = 0.05  # the share of its time that training may wait for snapshots
WAIT_ROOM = WAIT_LIMIT / 2  # below it, twice as many would still keep to the limit
WAIT_NOISE_S = 0.005  # a shorter mean wait is a thread that wakes late, which no interval changes
WAIT_SNAPSHOTS = 4  # a share is measured over so many, and over a lease: reports come a sixth of that late


@dataclass(slots=True)
class WaitShare:
    """The share of its time for which the rank that waits longest waited for slots and for copying.

    Invariant: each measurement covers one interval and one world.
    """

    share: float = 0.0
    rank: int = 0  # whose it is
    _began: tuple[float, int] = (0.0, 0)
    _waited_s: dict[int, float] = field(default_factory=dict)

    def begin(self, sessions: Collection[SessionRecord], newest: int, now_s: float) -> None:
        """Measure from now on."""
        self._began = (now_s, newest)
        self._waited_s = {session.rank: session.waited_s for session in sessions}

    def measure(
        self, sessions: Collection[SessionRecord], newest: int, *, interval: int, lease_s: float, now_s: float
    ) -> bool:
        """Whether there is a new measurement now."""
        began_s, began = self._began
        snapshots = (newest - began) // interval
        if snapshots < WAIT_SNAPSHOTS or now_s - began_s < lease_s:
            return False
        waited_s, self.rank = max((s.waited_s - self._waited_s.get(s.rank, s.waited_s), s.rank) for s in sessions)
        is_noise = waited_s <= WAIT_NOISE_S * snapshots  # or a session that began anew counts from 0
        self.share = 0.0 if is_noise else min(1.0, waited_s / (now_s - began_s))
        self.begin(sessions, newest, now_s)
        return True


@dataclass(slots=True)
class Interval:
    """The interval of one run. Invariant: a change takes effect at a step that no rank has reached when it is announced."""

    schedule: Schedule = field(default_factory=Schedule)
    handled_skip: int = 0  # the newest skipped step that was taken into account
    smooth_from: int = 0  # the step since which nothing was skipped or waited for long
    smooth_needed: int = SMOOTH_INTERVALS
    waits: WaitShare = field(default_factory=WaitShare)
    _is_lowered: bool = False  # by the last change
    _window: tuple[float, int] = (0.0, 0)  # time and step since which the speed is measured
    _steps_per_s: float = 0.0

    def restart(self) -> None:
        """A new world begins: steps may go back, the interval stays."""
        interval = max(self.schedule.interval_steps, 1)
        self.schedule = Schedule(interval_steps=interval, from_step=0, previous_interval_steps=interval)
        self.handled_skip = 0
        self.smooth_from = 0
        self.waits = WaitShare()
        self._window = (0.0, 0)

    def update(
        self, sessions: Collection[SessionRecord], *, is_protected: bool, lease_s: float, now_s: float
    ) -> str | None:
        """Raise the interval after a skip or long waits, lower it after a smooth while. Returns a sentence when it changed.

        Args:
            is_protected: some snapshot of this world is as well protected as can be. Before that, skips and waits mean that
                slots wait for a repair, not that snapshots come too fast.
        """
        newest = max((session.last_step for session in sessions), default=0)
        self._measure(newest, now_s)
        is_settled = newest >= self.schedule.from_step
        trouble = self._skipped(sessions, newest)
        if newest < self.schedule.from_step + self.schedule.interval_steps:  # the first one waits for those before
            self.waits.begin(sessions, newest, now_s)
        else:
            trouble = trouble or self._waited(sessions, newest, lease_s, now_s)
        interval = self.schedule.interval_steps
        if trouble:
            if not is_protected or interval >= INTERVAL_LIMIT:
                return None
            self.smooth_needed, self._is_lowered = min(SMOOTH_LIMIT, self.smooth_needed * 2), False
            return self._change(interval * 2, newest, lease_s, trouble)
        if is_protected and interval > 1 and is_settled and newest - self.smooth_from > self.smooth_needed * interval:
            self.smooth_from = newest
            reason = f"{self.smooth_needed} snapshots were protected in time"
            if self._is_lowered:  # the last lowering held: what made it slow has passed
                self.smooth_needed = SMOOTH_INTERVALS
            self._is_lowered = True
            return self._change(interval // 2, newest, lease_s, reason)
        return None

    def _skipped(self, sessions: Collection[SessionRecord], newest: int) -> str:
        """Why the interval is too short: a step was skipped for want of a slot; "" if none was since the last look."""
        skip = max((session.skipped_step for session in sessions if session.is_short_of_slots), default=0)
        if skip <= self.handled_skip:
            return ""
        self.handled_skip, self.smooth_from = skip, newest
        if skip < self.schedule.from_step:
            return ""
        reason = next((s.skip_reason for s in sessions if s.skipped_step == skip and s.skip_reason), "no free slot")
        return f"step {skip} was skipped ({reason})"

    def _waited(self, sessions: Collection[SessionRecord], newest: int, lease_s: float, now_s: float) -> str:
        """Why the interval is too short: training waited for more than the limit. "" if it did not."""
        waits = self.waits
        interval = self.schedule.interval_steps
        if not waits.measure(sessions, newest, interval=interval, lease_s=lease_s, now_s=now_s):
            return ""
        if waits.share > WAIT_ROOM:
            self.smooth_from = newest
        return (
            f"rank {waits.rank} waited {waits.share:.0%} of its time for snapshots" if waits.share > WAIT_LIMIT else ""
        )

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
