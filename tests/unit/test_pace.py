"""When the snapshot interval changes: only for want of slots, only ahead, and back again."""

from __future__ import annotations

from backstayd.core.pace import Pace
from backstayd.core.records import SessionPhase, SessionRecord


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


def _update(pace: Pace, sessions: list[SessionRecord], now_s: float = 0.0) -> str | None:
    return pace.update(sessions, is_protected=True, lease_s=3.0, now_s=now_s)


def test_a_step_skipped_for_want_of_a_slot_raises_the_interval_at_a_step_ahead() -> None:
    pace = Pace()
    note = _update(pace, _sessions(last_step=10, skipped_step=10, is_short_of_slots=True))
    assert note is not None
    assert "some reason" in note
    assert pace.schedule.interval_steps == 2
    assert pace.schedule.from_step > 10
    assert pace.schedule.includes(11), "until then the old interval holds for every rank"


def test_a_capture_that_was_abandoned_for_another_reason_does_not_change_the_interval() -> None:
    pace = Pace()
    assert _update(pace, _sessions(last_step=10, skipped_step=10)) is None
    assert pace.schedule.interval_steps == 1


def test_the_interval_comes_back_after_a_smooth_while() -> None:
    pace = Pace()
    _update(pace, _sessions(last_step=10, skipped_step=10, is_short_of_slots=True))
    for step in range(11, 200):
        _update(pace, _sessions(last_step=step, skipped_step=10, is_short_of_slots=True), now_s=float(step))
    assert pace.schedule.interval_steps == 1
    assert pace.schedule.includes(201)
