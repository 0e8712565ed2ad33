"""The ledger's arithmetic: bounded, sums that folding does not change, a goodput between nothing and all."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backstay.format import json_records
from backstayd.core.messages.decisions import Interruption, Ledger
from backstayd.core.recover.ledger import MAX_ENTRIES, add_entry, ledger_sentence, summary

BEGAN = 1000.0


@st.composite
def histories(draw: st.DrawFn) -> list[Interruption]:
    """Interruptions one after another, as a run has them."""
    found, now, step = [], BEGAN, 0
    for attempt in range(1, draw(st.integers(1, 3 * MAX_ENTRIES)) + 1):
        worked, silent, waited = draw(st.tuples(st.integers(1, 500), st.integers(0, 9), st.integers(0, 99)))
        base = draw(st.integers(max(0, step - 3), step + worked))
        now += worked + silent
        found.append(
            Interruption(
                attempt=attempt,
                cause="trainer_died",
                heard_unix_s=now - silent,
                noticed_unix_s=now,
                opened_unix_s=now + waited / 2,
                decided_unix_s=now + waited,
                released_unix_s=now + waited,
                new_attempt=attempt + 1,
                newest_step=step + worked,
                base_step=base,
                step_s=0.25,
                blocked_s=worked / 100,
            )
        )
        now, step = now + waited, base
    return found


def written(history: list[Interruption]) -> Ledger:
    ledger = Ledger(began_unix_s=BEGAN, is_whole=True)
    for entry in history:
        ledger = add_entry(ledger, entry)
    return ledger


@settings(max_examples=60, deadline=None)
@given(histories())
def test_folding_old_entries_changes_no_sum(history: list[Interruption]) -> None:
    ledger = written(history)
    assert len(ledger.entries) <= MAX_ENTRIES
    end = history[-1].released_unix_s + 50
    found = summary(ledger, list(ledger.entries), now_unix_s=end, blocked_s=0.0)
    whole = summary(Ledger(began_unix_s=BEGAN), history, now_unix_s=end, blocked_s=0.0)
    assert found["interruption_count"] == len(history) == whole["interruption_count"]
    assert found["steps_lost"] == whole["steps_lost"] == sum(e.newest_step - e.base_step for e in history)
    for name in ("down_s", "recompute_s", "blocked_s", "productive_s", "goodput"):
        assert found[name] == pytest.approx(whole[name]), name
    assert 0 <= found["goodput"] <= 1


def test_a_ledger_in_numbers() -> None:
    entry = Interruption(
        attempt=1,
        cause="node_lost",
        heard_unix_s=1100.0,
        noticed_unix_s=1103.0,
        opened_unix_s=1113.0,
        decided_unix_s=1114.0,
        released_unix_s=1120.0,
        new_attempt=2,
        newest_step=50,
        base_step=48,
        step_s=2.0,
        has_storage=True,
        persisted_step=40,
    )
    found = summary(Ledger(began_unix_s=1000.0), [entry], now_unix_s=1200.0, blocked_s=1.0)
    (row,) = found["interruptions"]
    assert (row["detect_s"], row["restart_s"], row["decide_s"], row["release_s"]) == (3.0, 10.0, 1.0, 6.0)
    assert (row["down_s"], row["steps_lost"], row["recompute_s"], row["seconds_lost"]) == (20.0, 2, 4.0, 24.0)
    assert row["steps_lost_from_storage"] == 10
    assert found["goodput"] == pytest.approx((200 - 20 - 4 - 1) / 200)
    assert ledger_sentence(found) == "1 interruption, 2 steps lost, 25.0 of 200.0 s lost: goodput 0.8750"


def test_an_entry_whose_release_is_not_known_lasts_until_the_next() -> None:
    first = Interruption(attempt=1, cause="trainer_died", heard_unix_s=10.0, noticed_unix_s=10.0, new_attempt=2)
    second = dataclasses.replace(first, attempt=2, heard_unix_s=14.0, noticed_unix_s=14.0, released_unix_s=20.0)
    found = summary(Ledger(began_unix_s=0.0), [first, second], now_unix_s=40.0, blocked_s=0.0)
    assert [row["down_s"] for row in found["interruptions"]] == [4.0, 6.0]
    assert found["interruptions"][0]["release_s"] is None


def test_an_interruption_under_way_has_lost_time_and_not_yet_steps() -> None:
    under_way = Interruption(attempt=3, cause="trainer_died", heard_unix_s=50.0, noticed_unix_s=51.0, newest_step=9)
    found = summary(Ledger(began_unix_s=0.0), [under_way], now_unix_s=60.0, blocked_s=0.0)
    assert (found["down_s"], found["steps_lost"], found["interruptions"][0]["is_over"]) == (10.0, 0, False)


def test_a_ledger_survives_its_json() -> None:
    ledger = written([Interruption(attempt=1, cause="node_lost", new_attempt=2)])
    assert json_records.loads(Ledger, json_records.dumps(ledger)) == ledger
