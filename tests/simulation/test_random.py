"""Random scenarios by seed: promises after every event, progress once the faults end. ``make simulate SEED=7`` plays one."""

from __future__ import annotations

import os
import sys

import pytest

from tests.simulation.lifetimes import play
from tests.simulation.scenario import Scenario

SEEDS_PER_TEST = 10
TESTS = 16
ONE_SEED = os.environ.get("BACKSTAY_SEED", "")


def seeds_of(part: int) -> range:
    return range(part * SEEDS_PER_TEST, (part + 1) * SEEDS_PER_TEST)


@pytest.mark.skipif(bool(ONE_SEED), reason="one seed was asked for")
@pytest.mark.parametrize("part", range(TESTS))
def test_promises_hold_under_random_faults(part: int) -> None:
    for seed in seeds_of(part):
        Scenario(seed, is_harsh=seed % 3 == 2).run()


@pytest.mark.skipif(not ONE_SEED, reason="no seed was asked for: make simulate SEED=7")
def test_promises_hold_under_the_faults_of_one_seed() -> None:
    cluster = Scenario(int(ONE_SEED), is_harsh=int(ONE_SEED) % 3 == 2).run()
    for event in cluster.core().timeline.all():
        print(f"{event.at_s - 1000:8.3f}  {event.run:14} {event.kind:18} {event.message}", file=sys.stderr)


@pytest.mark.skipif(bool(ONE_SEED), reason="one seed was asked for")
@pytest.mark.parametrize("part", range(TESTS // 2))
def test_promises_hold_with_durable_storage_when_clusters_are_lost_and_parts_of_them_return(part: int) -> None:
    for seed in seeds_of(part):
        Scenario(seed, is_harsh=seed % 3 == 2, has_storage=True).run()


@pytest.mark.skipif(bool(ONE_SEED), reason="one seed was asked for")
@pytest.mark.parametrize("part", range(TESTS // 2))
def test_promises_hold_when_half_of_something_fails_or_in_the_middle_of_a_recovery(part: int) -> None:
    for seed in seeds_of(part):
        Scenario(seed, is_harsh=seed % 3 == 2, has_mishaps=True).run()


@pytest.mark.skipif(bool(ONE_SEED), reason="one seed was asked for")
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_promises_hold_when_a_name_is_used_again_and_again_while_nodes_are_away(seed: int) -> None:
    play(seed)


@pytest.mark.skipif(bool(ONE_SEED), reason="one seed was asked for")
def test_promises_hold_when_a_job_moves_while_nodes_are_away_and_storage_is_kept() -> None:
    play(0, has_storage=True)
