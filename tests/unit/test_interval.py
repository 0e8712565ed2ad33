"""When the snapshot interval changes: only for want of slots, only ahead, and back again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from backstayd.core.messages.report import SessionPhase, SessionRecord
from backstayd.core.protect.interval import Interval


def _sessions(*, last_step: int, skipped_step: int = 0, is_short_of_slots: bool = False) -> list[SessionRecord]:
    return [
        SessionRecord(
            world_id="w",
            rank=rank,
            world_size=2,
            phase=SessionPhase.TRAINING,
            last_step=last_step,
            skipped_step=skipped_step if rank == 1 else 0,
            skip_reason="some reason" if skipped_step else "",
            is_short_of_slots=is_short_of_slots and rank == 1,
        )
        for rank in range(2)
    ]


def _update(interval: Interval, sessions: list[SessionRecord], now_s: float = 0.0) -> str | None:
    return interval.update(sessions, is_protected=True, lease_s=3.0, now_s=now_s)


def test_a_step_skipped_for_want_of_a_slot_raises_the_interval_at_a_step_ahead() -> None:
    interval = Interval()
    note = _update(interval, _sessions(last_step=10, skipped_step=10, is_short_of_slots=True))
    assert note is not None
    assert "some reason" in note
    assert interval.schedule.interval_steps == 2
    assert interval.schedule.from_step > 10
    assert interval.schedule.includes(11), "until then the old interval holds for every rank"


def test_a_capture_that_was_abandoned_for_another_reason_does_not_change_the_interval() -> None:
    interval = Interval()
    assert _update(interval, _sessions(last_step=10, skipped_step=10)) is None
    assert interval.schedule.interval_steps == 1


def test_the_interval_comes_back_after_a_smooth_while() -> None:
    interval = Interval()
    _update(interval, _sessions(last_step=10, skipped_step=10, is_short_of_slots=True))
    for step in range(11, 200):
        _update(interval, _sessions(last_step=step, skipped_step=10, is_short_of_slots=True), now_s=float(step))
    assert interval.schedule.interval_steps == 1
    assert interval.schedule.includes(201)


@dataclass
class _Training:
    """Two ranks in lockstep: a step takes ``step_s``, and rank 1 waits at each snapshot until the one before is protected."""

    protect_s: float
    step_s: float = 0.3
    interval: Interval = field(default_factory=Interval)
    now_s: float = 100.0
    step: int = 0
    protected_s: float = 0.0
    waited_s: float = 0.0
    notes: list[str] = field(default_factory=list)

    def run(self, steps: int) -> float:
        """Train; returns the share of the time that was waited."""
        began_s, waited_s = self.now_s, self.waited_s
        for _ in range(steps):
            self.step += 1
            self.now_s += self.step_s
            if self.interval.schedule.includes(self.step):
                wait_s = max(0.0, self.protected_s - self.now_s)
                self.waited_s += wait_s
                self.now_s += wait_s
                self.protected_s = self.now_s + self.protect_s
            note = _update(self.interval, self.sessions(), self.now_s)
            self.notes += [note] if note else []
        return (self.waited_s - waited_s) / (self.now_s - began_s)

    def sessions(self) -> list[SessionRecord]:
        still, waiting = _sessions(last_step=self.step)
        return [still, replace(waiting, waited_s=self.waited_s)]


def test_steps_that_wait_for_more_than_a_twentieth_of_their_time_raise_the_interval_until_they_do_not() -> None:
    training = _Training(protect_s=1.1)
    assert training.run(4) > 0.5
    training.run(60)
    assert training.run(60) < 0.02
    assert training.interval.schedule.interval_steps == 4
    assert "rank 1 waited 7" in training.notes[0], training.notes
    assert "% of its time" in training.notes[0]


def test_waits_of_less_than_a_twentieth_leave_the_interval_as_it_is() -> None:
    training = _Training(protect_s=0.31)
    assert 0.02 < training.run(200) < 0.05
    assert not training.notes


def test_the_share_that_is_waited_is_that_of_the_last_few_snapshots() -> None:
    training = _Training(protect_s=0.4)
    training.run(12)
    assert training.interval.waits.share == pytest.approx(0.25)
    assert training.interval.waits.rank == 1


def test_room_lowers_the_interval_and_a_lowering_that_slows_training_is_tried_ever_less_often() -> None:
    training = _Training(protect_s=1.1)
    training.run(100)
    assert training.interval.schedule.interval_steps == 4
    assert training.run(5_000) < 0.03, "trying whether there is room costs little"
    training.protect_s = 0.1
    training.run(40_000)
    assert training.interval.schedule.interval_steps == 1


def test_a_rank_that_attached_anew_does_not_count_what_it_waited_before() -> None:
    training = _Training(protect_s=0.1, waited_s=50.0)
    training.run(20)
    training.waited_s = 0.0  # its daemon restarted: it counts from then on
    training.run(20)
    assert training.interval.waits.share == 0.0
    training.protect_s = 0.6
    training.run(20)
    assert training.interval.waits.share > 0.3
    assert len(training.notes) == 1


def test_a_thread_that_wakes_late_is_no_reason_to_take_fewer_snapshots() -> None:
    training = _Training(protect_s=0.012, step_s=0.01)
    assert training.run(2_000) > 0.1
    assert training.interval.schedule.interval_steps == 1
