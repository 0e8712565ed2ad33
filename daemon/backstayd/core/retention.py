"""Which snapshots may go, and at which steps new ones are taken. Pure.

Law 1: a protected snapshot is never given up before another is as well protected now.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from backstay.ids import SnapshotKey
from backstayd.core.catalog import SnapshotView
from backstayd.core.records import Schedule, SessionPhase, SessionRecord

INTERVAL_LIMIT = 4096
SMOOTH_INTERVALS = 8  # so many without a skip, and the interval is halved again
SMOOTH_LIMIT = 4096


def releasable(
    views: Sequence[SnapshotView],
    *,
    live: Collection[int],
    dead: Collection[int],
    keep: int,
    target: int,
    abandoned: Collection[SnapshotKey],
) -> dict[int, str]:
    """Which of ``views`` (newest first) may be released, by index, and why.

    Args:
        live: indexes of the views that belong to the live history.
        dead: indexes of the views that a decision has left behind; they can never be restored again.
        keep: how many snapshots that protect are held.
        target: the spares that new snapshots reach. Where a job has shrunk, no more can be asked of the newer one.
        abandoned: steps that can never become complete, because a rank went past them without a shard.
    """
    chosen: dict[int, str] = {}
    for index, view in enumerate(views):
        if index in dead:
            reason = _why_release_dead(views, index, live=live, dead=dead, target=target)
        elif index not in live:
            continue
        elif view.key in abandoned and not view.is_restorable:
            reason = "a rank went past it without a snapshot"
        else:
            newer = [other for place, other in enumerate(views[:index]) if place in live and other.is_restorable]
            good = [other for other in newer if other.spares >= (target if view.is_restorable else 0)]
            is_enough = len(good) >= (keep if view.is_restorable else 1)
            reason = f"step {good[0].key.step} is as well protected ({good[0].spares} spares)" if is_enough else ""
        if reason:
            chosen[index] = reason
    return chosen


def _why_release_dead(
    views: Sequence[SnapshotView], index: int, *, live: Collection[int], dead: Collection[int], target: int
) -> str:
    """A dead snapshot that protects goes when a live one is as good; the others only fill slots."""
    view = views[index]
    if not view.is_restorable:
        return "its history ended, and shards of it are missing"
    for place, other in enumerate(views):
        if place in live and other.is_restorable and other.spares >= min(view.spares, target):
            return f"its history ended; step {other.key.step} is as well protected"
        if place in dead and place < index and other.spares >= view.spares:
            return f"its history ended, and so did that of step {other.key.step}, which is as well protected"
    return ""


def abandoned_keys(
    views: Sequence[SnapshotView], *, attempt: int, sessions: Mapping[int, SessionRecord]
) -> set[SnapshotKey]:
    """Steps of ``attempt`` that some rank of the running world passed, or skipped, and whose shard nobody holds."""
    found = set()
    for view in views:
        if view.key.attempt != attempt or view.is_restorable:
            continue
        for rank in view.unheld_ranks:
            session = sessions.get(rank)
            if session is None or session.phase is not SessionPhase.TRAINING:
                continue
            if session.last_step > view.key.step or session.skipped_step >= view.key.step:
                found.add(view.key)
                break
    return found


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
