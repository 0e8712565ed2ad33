"""When training counts as behind its protection: never in the usual distance, always after a lease out of it."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from backstayd.core.protect.lag import LAG_INTERVALS, Lag, Training, behind_sentence

LEASE_S = 3.0


def at(
    trained: int, protected: int, *, interval: int = 1, silent: tuple[int, ...] = (), step_s: float = 0.1
) -> Training:
    return Training(
        trained_step=trained,
        protected_step=protected,
        restorable_step=protected,
        interval_steps=interval,
        step_s=step_s,
        silent_ranks=silent,
        silent_nodes={f"node-{rank}" for rank in silent},
    )


@given(st.integers(1, 100), st.integers(0, 1000), st.lists(st.integers(0, LAG_INTERVALS), min_size=1, max_size=20))
def test_the_usual_distance_is_never_behind_however_long_it_lasts(interval: int, base: int, ahead: list[int]) -> None:
    lag = Lag()
    for turn, intervals in enumerate(ahead):
        lag.update(at(base + intervals * interval, base, interval=interval), lease_s=LEASE_S, now_s=100.0 * turn)
        assert lag.behind is None


@given(st.integers(1, 100), st.integers(1, 10_000))
def test_steps_beyond_the_usual_distance_are_behind_after_a_lease_and_not_before(interval: int, more: int) -> None:
    lag = Lag()
    lag.update(at(0, 0, interval=interval), lease_s=LEASE_S, now_s=10.0)
    far = at(LAG_INTERVALS * interval + more, 0, interval=interval)
    lag.update(far, lease_s=LEASE_S, now_s=10.0 + LEASE_S - 0.1)
    assert lag.behind is None, "a report of steps comes before that of parity"
    lag.update(far, lease_s=LEASE_S, now_s=10.0 + LEASE_S)
    assert lag.behind is not None
    assert (lag.behind.steps, lag.behind.since_s) == (far.trained_step, 10.0)
    lag.update(dataclasses.replace(far, protected_step=far.trained_step), lease_s=LEASE_S, now_s=20.0)
    assert lag.behind is None


def test_ranks_that_nobody_reports_are_behind_once_they_could_have_left_the_usual_distance() -> None:
    lag = Lag()
    silent = at(10, 10, silent=(2,), step_s=4.0)
    for now_s, is_behind in ((0.0, False), (LEASE_S, False), (11.9, False), (12.0, True)):
        lag.update(silent, lease_s=LEASE_S, now_s=now_s)
        assert (lag.behind is not None) is is_behind, now_s
    assert lag.behind is not None
    assert "rank 2 on node-2" in behind_sentence(lag.behind)
    lag.stop()
    assert lag.behind is None


def test_a_protected_snapshot_that_is_being_repaired_is_not_left_behind_unless_it_is_gone() -> None:
    lag = Lag()
    lag.update(at(10, 10), lease_s=LEASE_S, now_s=0.0)
    repairing = dataclasses.replace(at(11, 0), restorable_step=10)
    lag.update(repairing, lease_s=LEASE_S, now_s=100.0)
    assert lag.behind is None
    for now_s in (101.0, 101.0 + LEASE_S):
        lag.update(at(11, 0), lease_s=LEASE_S, now_s=now_s)
    assert lag.behind is not None
    assert lag.behind.protected_step == 0


def test_a_silent_rank_beside_others_that_take_no_step_is_not_behind() -> None:
    lag = Lag()
    waiting = dataclasses.replace(at(11, 10, silent=(2,)), is_heard=True)
    for now_s in (0.0, 100.0, 1000.0):
        lag.update(waiting, lease_s=LEASE_S, now_s=now_s)
        assert lag.behind is None, "a lost node's world waits for its restart and trains nothing"
    lag.update(dataclasses.replace(waiting, trained_step=14), lease_s=LEASE_S, now_s=1000.0 + LEASE_S)
    assert lag.behind is not None
