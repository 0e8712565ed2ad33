"""What a trainer says of the time that it waits for snapshots."""

from __future__ import annotations

import pytest

from backstay.capture.overhead import Waits


def _waits(count: int, *, slot_s: float = 0.0, copy_s: float = 0.0, step_s: float = 0.3) -> Waits:
    waits, now_s = Waits(left_out=0), 50.0
    for _ in range(count):
        now_s += step_s + slot_s + copy_s
        waits.note(slot_s=slot_s, copy_s=copy_s, now_s=now_s)
    return waits


def test_the_share_is_what_was_waited_of_the_time_of_the_last_snapshots() -> None:
    assert _waits(30, slot_s=0.9).share == pytest.approx(0.75)
    assert _waits(30, copy_s=0.1).share == pytest.approx(0.25)


def test_nothing_is_concluded_from_too_few_snapshots() -> None:
    assert _waits(4, slot_s=0.9).share == 0.0
    assert _waits(4, slot_s=0.9).warning() == ""
    assert _waits(5, slot_s=0.9).warning()


def test_the_first_snapshots_whose_slots_are_being_made_do_not_count() -> None:
    waits = Waits(left_out=2)
    assert [waits.note(slot_s=1.0, copy_s=0.5, now_s=float(now)) for now in range(4)] == [0.0, 0.0, 1.5, 1.5]
    assert waits.total_s == 3.0


def test_the_warning_names_numbers_cause_and_remedy() -> None:
    assert (
        _waits(9, slot_s=0.9)
        .warning()
        .startswith(
            "training waits 75% of its time for snapshots (0.90 of 1.20 s from one to the next): a slot is not free"
        )
    )
    assert "not copied when the optimizer wants to change it" in _waits(9, copy_s=0.9).warning()


def test_there_is_no_warning_of_what_nobody_notices() -> None:
    assert _waits(9, slot_s=0.01, step_s=0.3).warning() == "", "less than one twentieth"
    assert _waits(9, copy_s=0.004, step_s=0.01).warning() == "", "a thread that wakes late"
