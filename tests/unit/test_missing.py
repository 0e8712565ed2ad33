"""Whom the others wait for: named after a lease, and never a rank that is only slow."""

from __future__ import annotations

from collections.abc import Mapping

from backstayd.core.inventory.missing_ranks import Missing
from backstayd.core.inventory.run_context import LiveSession
from backstayd.core.messages.report import SessionPhase, SessionRecord

LEASE_S = 3.0
SIZE = 4


def world(
    steps: Mapping[int, int], *, size: int = SIZE, phase: SessionPhase = SessionPhase.TRAINING
) -> dict[int, LiveSession]:
    return {
        rank: LiveSession(
            f"n{rank}",
            SessionRecord(world_id="w", rank=rank, world_size=size, phase=phase, last_step=step),
        )
        for rank, step in steps.items()
    }


def look(missing: Missing, steps: Mapping[int, int], now_s: float) -> None:
    missing.look({"w": world(steps)}, training="w", size=SIZE, base_step=0, lease_s=LEASE_S, now_s=now_s)


def ask(missing: Missing, ranks: list[int], now_s: float, *, size: int = SIZE) -> None:
    there = world(dict.fromkeys(ranks, 0), size=size, phase=SessionPhase.RESTORING)
    missing.look({"w": there}, training="", size=0, base_step=0, lease_s=LEASE_S, now_s=now_s)


def test_a_rank_that_takes_no_snapshots_is_named_once_the_others_went_on_without_it() -> None:
    missing = Missing()
    for step in range(1, 6):
        assert missing.found is None
        look(missing, {0: step, 1: 0, 2: step, 3: step}, now_s=10.0 + 1.5 * step)
    assert missing.found is not None
    assert (missing.found.ranks, missing.found.count, missing.found.is_training) == ((1,), 1, True)
    assert missing.sentence.startswith(
        "rank 1 on n1 has taken no snapshot since restore(), so none of the others becomes"
    )
    look(missing, {0: 6, 1: 6, 2: 6, 3: 6}, now_s=18.0)
    assert missing.found is None


def test_ranks_that_are_late_are_not_missing_whether_snapshots_are_frequent_or_rare() -> None:
    missing = Missing()
    for step in range(1, 200):  # rank 1 is always five steps late
        look(missing, {0: step, 1: max(0, step - 5), 2: step, 3: step}, now_s=10.0 + step)
        assert missing.found is None
    missing = Missing()
    for step in range(100, 2000, 100):  # a snapshot an hour; rank 1 comes to each of them a minute later
        look(missing, {0: step, 1: step - 100, 2: step, 3: step}, now_s=36.0 * step)
        assert missing.found is None
        look(missing, {0: step, 1: step, 2: step, 3: step}, now_s=36.0 * step + 60)
        assert missing.found is None


def test_nobody_is_missing_while_all_stand_still() -> None:
    missing = Missing()
    for now in range(100):
        look(missing, {0: 7, 1: 0, 2: 7, 3: 7}, now_s=float(now))
        assert missing.found is None, "an evaluation, a hang: the others did not go on without it"


def test_ranks_that_did_not_call_restore_are_named_a_lease_after_the_last_one_did() -> None:
    missing = Missing()
    ask(missing, [0], now_s=10.0)
    ask(missing, [0, 2, 3], now_s=12.0)
    ask(missing, [0, 2, 3], now_s=14.9)
    assert missing.found is None
    ask(missing, [0, 2, 3], now_s=15.0)
    assert missing.found is not None
    assert missing.found.sentence == "rank 1 of 4 has not called restore()"
    assert missing.sentence == "", "that is about snapshots"
    ask(missing, [0, 1, 2, 3], now_s=16.0)
    assert missing.found is None


def test_a_rank_that_gave_up_at_its_deadline_is_not_named_to_those_who_still_wait() -> None:
    missing = Missing()
    for now in (10.0, 13.0):
        ask(missing, [0, 2, 3], now_s=now)
    ask(missing, [3], now_s=13.1)
    assert missing.found is not None
    assert missing.found.sentence == "rank 1 of 4 has not called restore()"


def test_what_a_trainer_claims_of_its_world_costs_nothing() -> None:
    missing = Missing()
    for now in (10.0, 14.0):
        ask(missing, [5], now, size=1 << 62)
    assert missing.found is not None
    assert missing.found.ranks == (0, 1, 2, 3, 4, 6, 7, 8)
    assert f"{(1 << 62) - 1} ranks (0, 1, " in missing.found.sentence
