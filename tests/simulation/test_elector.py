"""The election under every fault its store and its machines can have: never two at once, and one in the end."""

from __future__ import annotations

import os

import pytest

from tests.simulation.elections import LEASE_S, Simulation, TwoLeadersError

SEEDS = [int(os.environ["BACKSTAY_SEED"])] if os.environ.get("BACKSTAY_SEED") else range(15)


def elect(seed: int, *, count: int, is_forgetful: bool = False) -> Simulation:
    simulation = Simulation(seed, count=count, is_forgetful=is_forgetful)
    simulation.disturb(40 * LEASE_S)
    simulation.run(40 * LEASE_S)
    simulation.heal()
    simulation.run(46 * LEASE_S)
    return simulation


@pytest.mark.parametrize("count", [2, 3, 5])
def test_never_two_act_at_once_terms_grow_and_in_the_end_one_leads(count: int) -> None:
    reigns = 0
    for seed in SEEDS:
        simulation = elect(seed, count=count)
        assert len(simulation.acting()) == 1, f"seed {seed}: nobody leads after all faults ended"
        reigns += len(simulation.reigns)
    assert reigns > 3 * len(SEEDS), "leadership changed hands often enough for this to mean something"


def test_a_record_that_somebody_deletes_makes_no_second_leader() -> None:
    for seed in SEEDS:
        simulation = elect(seed, count=3, is_forgetful=True)
        assert len(simulation.acting()) == 1, f"seed {seed}"


def test_a_leader_without_faults_is_never_replaced() -> None:
    simulation = Simulation(7, count=3)
    simulation.heal()
    simulation.run(100 * LEASE_S)
    assert len(simulation.reigns) == 1


def test_clocks_beyond_the_stated_bound_do_break_it_so_the_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.simulation.elections.CLOCK_RATIO", 6.0)
    assert any(_breaks(seed) for seed in range(100)), "clocks four times as far apart as is allowed made no two leaders"


def _breaks(seed: int) -> bool:
    try:
        elect(seed, count=3)
    except TwoLeadersError:
        return True
    return False
