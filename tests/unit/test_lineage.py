"""The lineage of a run that restarts for months: bounded, and the same snapshots are live as before."""

from __future__ import annotations

import random

import pytest

from backstay.ids import SnapshotKey
from backstayd.core.inventory.catalog import SnapshotView
from backstayd.core.inventory.lineage import KEPT_ATTEMPTS, extend, is_live, trimmed
from backstayd.core.messages.decisions import Lineage


def view(attempt: int, step: int) -> SnapshotView:
    return SnapshotView(
        key=SnapshotKey(attempt, step),
        world_size=1,
        snapshot_id="",
        world_id=f"w{attempt}",
        digests={},
        sizes={},
        holders={},
        plans=(),
        rank_spares={},
    )


def long_lineage(draw: random.Random, count: int) -> tuple[Lineage, ...]:
    """A run that restarts ``count`` times, mostly from where it was and now and then from further back."""
    made: tuple[Lineage, ...] = ()
    for attempt in range(1, count + 1):
        back = 0 if draw.random() < 0.8 else draw.randrange(min(3, max(1, len(made))))
        base = (made[back].attempt, made[back].base_step + draw.randrange(1, 50)) if made else (0, 0)
        made = extend(made, attempt=attempt, base=base, world_id=f"w{attempt}")
    return made


@pytest.mark.parametrize("seed", range(5))
def test_old_attempts_of_which_nothing_is_left_go_and_nothing_else_becomes_dead_or_live(seed: int) -> None:
    draw = random.Random(seed)
    whole = long_lineage(draw, 300)
    needed = set(draw.sample(range(1, 301), 10))
    short = trimmed(whole, needed=needed)
    assert len(short) <= KEPT_ATTEMPTS + len(needed)
    assert short[: KEPT_ATTEMPTS - 1] == whole[: KEPT_ATTEMPTS - 1]
    for attempt in needed | {entry.attempt for entry in whole[:KEPT_ATTEMPTS]}:
        for step in range(0, whole[0].base_step + 100, 7):
            shown = view(attempt, step)
            assert is_live(shown, short) == is_live(shown, whole), (attempt, step)


def test_a_lineage_does_not_grow_with_restarts() -> None:
    made: tuple[Lineage, ...] = ()
    for attempt in range(1, 2000):
        made = extend(
            trimmed(made, needed={attempt - 1}), attempt=attempt, base=(attempt - 1, 10 * attempt), world_id="w"
        )
    assert len(made) == KEPT_ATTEMPTS + 1
