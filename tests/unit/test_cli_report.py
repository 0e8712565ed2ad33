"""What `backstay report` prints for a status document."""

from __future__ import annotations

from typing import Any

import pytest

from backstay.errors import SnapshotNotFoundError
from backstayd.cli import report
from backstayd.cli.tables import duration
from backstayd.core.messages.decisions import Interruption, Ledger
from backstayd.core.recover.ledger import summary


def ledger(*entries: Interruption, **changes: Any) -> dict[str, Any]:
    found = summary(
        Ledger(began_unix_s=1_000_000.0, is_whole=True), list(entries), now_unix_s=1_007_200.0, blocked_s=3.0
    )
    rest = {"attempt": 2, "newest_step": 900, "step_s": 8.0, "is_interrupted": False, "ended_unix_s": 0.0}
    return found | rest | changes


def interruption(**changes: Any) -> Interruption:
    values: dict[str, Any] = {
        "attempt": 1,
        "cause": "node_lost",
        "detail": "node-3 lost what was held there",
        "heard_unix_s": 1_001_000.0,
        "noticed_unix_s": 1_001_003.0,
        "opened_unix_s": 1_001_063.0,
        "decided_unix_s": 1_001_064.0,
        "released_unix_s": 1_001_070.0,
        "new_attempt": 2,
        "outcome": "EXACT",
        "source": "rebuild",
        "newest_step": 120,
        "base_step": 118,
        "step_s": 8.0,
    }
    return Interruption(**values | changes)


def document(**runs: dict[str, Any] | None) -> dict[str, Any]:
    entries = [{"run": f"default/{name}", "ledger": found} for name, found in runs.items()]
    return {"runs": entries, "finished": [], "is_settled": True}


def test_a_run_is_described_with_what_it_lost() -> None:
    (found,) = report._runs(document(gpt=ledger(interruption())), "gpt")
    text = report.describe(found)
    assert "goodput 0.9876" in text
    assert "70.0 s  without training, in 1 interruption" in text
    assert "16.0 s  recomputing 2 lost steps" in text
    assert "EXACT; node-3 lost what was held there" in text
    assert "since its first step" in text
    assert "durable storage" not in text, "nothing is known of it, so nothing is said"


def test_what_storage_alone_would_have_lost_is_shown_only_if_every_interruption_knows_it() -> None:
    known = interruption(has_storage=True, persisted_step=100)
    (found,) = report._runs(document(gpt=ledger(known)), None)
    assert "would have lost 20 steps (2 min 40 s) instead of 2 (16.0 s)" in report.describe(found)
    (mixed,) = report._runs(document(gpt=ledger(known, interruption(attempt=2, new_attempt=3))), None)
    assert "would have lost" not in report.describe(mixed)


def test_a_run_that_is_over_is_found_where_the_coordinator_saw_its_end() -> None:
    found = document(other=None) | {"finished": [{"run": "default/gpt", "ledger": ledger()}]}
    assert [entry["run"] for entry in report._runs(found, None)] == ["default/other", "default/gpt"]
    (over,) = report._runs(found, "gpt")
    assert "finished" in report.describe(over)
    assert "no world of it has trained yet" in report.describe(report._runs(found, "other")[0])


def test_an_unknown_run_says_where_ledgers_of_old_ones_are() -> None:
    with pytest.raises(SnapshotNotFoundError, match=r"known: default/gpt.*its log keeps one line about it"):
        report._runs(document(gpt=ledger()), "llama")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(8.24, "8.2 s"), (99.96, "1 min 40 s"), (200, "3 min 20 s"), (18_720, "5 h 12 min"), (273_600, "3 d 4 h")],
)
def test_durations_are_written_as_people_do(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
