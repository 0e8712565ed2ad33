"""The planner's mathematics: published figures come out, closed forms agree with enumeration and with Monte Carlo."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backstay.errors import CapacityError, ConfigError, UsageError
from backstayd import cli
from backstayd.cli.plan import command as plan_command
from backstayd.core.inventory import geometry
from backstayd.core.policy import CorePolicy
from backstayd.core.protect.groups import admission_bytes, parity_fraction
from backstayd.sizing import failures, survival
from backstayd.sizing.plan import Question, answer
from tests.kit import played_losses
from tests.kit.wording import refuses

GIB = 1 << 30
CLUSTER = Question(nodes=64, state_bytes=5600 * GIB, memory_bytes=500 * GIB, bandwidth_bytes_per_s=25e9, step_s=4.0)

# scheme, wanted group size, m: P(survive 2, 3, 4, 8 losses) on 64 and on 256 nodes
SURVIVAL_TABLE = {
    ("pair copy", 2, 1): ((0.984, 0.952, 0.906, 0.608), (0.996, 0.988, 0.977, 0.893)),
    ("XOR of 4", 4, 1): ((0.952, 0.860, 0.733, 0.191), (0.988, 0.965, 0.931, 0.708)),
    ("XOR of 8", 8, 1): ((0.889, 0.688, 0.451, 0.004), (0.973, 0.919, 0.843, 0.431)),
    ("parity 6+2", 8, 2): ((1, 0.989, 0.960, 0.589), (1, 0.999, 0.997, 0.966)),
    ("parity 5+3", 8, 3): ((1, 1, 0.999, 0.951), (1, 1, 1, 0.999)),
    ("parity 12+4", 16, 4): ((1, 1, 1, 0.923), (1, 1, 1, 0.9996)),
}


@pytest.mark.parametrize(("scheme", "group_size", "m"), SURVIVAL_TABLE)
def test_the_survival_table_of_the_field_is_reproduced(scheme: str, group_size: int, m: int) -> None:
    for nodes, wanted in zip((64, 256), SURVIVAL_TABLE[scheme, group_size, m], strict=True):
        sizes = survival.group_sizes(nodes, group_size=group_size, m=m)
        found = [survival.survive_losses(sizes, m, losses) for losses in (2, 3, 4, 8)]
        assert found == pytest.approx(wanted, abs=6e-4), f"{scheme} on {nodes} nodes"


def test_xor_alone_survives_double_failures_worse_than_pair_copies() -> None:
    pairs = survival.group_sizes(64, group_size=2, m=1)
    eights = survival.group_sizes(64, group_size=8, m=1)
    assert survival.survive_losses(eights, 1, 2) == pytest.approx(0.889, abs=5e-4)
    assert survival.survive_losses(pairs, 1, 2) == pytest.approx(0.984, abs=5e-4)


def test_geminis_published_figure_comes_out() -> None:
    assert survival.survive_losses([2] * 8, 1, 2) == pytest.approx(14 / 15)


def test_geminis_bound_lies_below_the_exact_probability() -> None:
    nodes, copies = 16, 2
    for lost in range(copies, 9):
        bound = 1 - nodes * math.comb(nodes - copies, lost - copies) / (copies * math.comb(nodes, lost))
        assert survival.survive_losses([2] * 8, 1, lost) >= max(0.0, bound) - 1e-12


small = st.lists(st.integers(1, 4), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(small, st.integers(0, 3), st.data())
def test_the_closed_form_is_what_counting_gives(sizes: list[int], m: int, data: st.DataObject) -> None:
    nodes = [group for group, size in enumerate(sizes) for _ in range(size)]
    losses = data.draw(st.integers(0, len(nodes)))
    cases = list(itertools.combinations(nodes, losses))
    good = sum(all(case.count(group) <= m for group in set(case)) for case in cases)
    assert survival.survive_losses(sizes, m, losses) == pytest.approx(good / len(cases))


@given(st.integers(2, 300), st.integers(2, 16), st.integers(1, 3), st.integers(0, 12))
def test_more_parity_never_survives_less(nodes: int, group_size: int, m: int, losses: int) -> None:
    sizes = survival.group_sizes(nodes, group_size=group_size, m=m)
    less, more = (survival.survive_losses(sizes, parity, losses) for parity in (m, m + 1))
    assert less <= more + 1e-12
    if losses <= min(m, nodes):
        assert less == 1.0


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(0, 3), st.floats(1e-7, 1e-4), st.floats(60, 3600), st.floats(60, 86400))
def test_a_window_is_survived_less_often_the_longer_it_is_and_the_less_parity_there_is(
    size: int, m: int, rate: float, repair_s: float, window_s: float
) -> None:
    found = survival.survive_window([size], m, rate_per_s=rate, repair_s=repair_s, window_s=window_s)
    assert 0 <= found <= 1
    more = survival.survive_window([size], m + 1, rate_per_s=rate, repair_s=repair_s, window_s=window_s)
    longer = survival.survive_window([size], m, rate_per_s=rate, repair_s=repair_s, window_s=2 * window_s)
    assert more >= found - 1e-9
    assert longer <= found + 1e-9


def test_without_parity_the_window_is_an_exponential() -> None:
    found = survival.survive_window([8], 0, rate_per_s=1e-5, repair_s=600, window_s=5000)
    assert found == pytest.approx(math.exp(-8 * 1e-5 * 5000))


def test_a_very_long_window_goes_on_as_the_steady_state_does() -> None:
    months = survival.survive_window([8], 1, rate_per_s=3e-8, repair_s=30.0, window_s=86400 * 60)
    rate = -math.log(survival.survive_window([8], 1, rate_per_s=3e-8, repair_s=30.0, window_s=86400)) / 86400
    assert months == pytest.approx(math.exp(-rate * 86400 * 60), rel=1e-3)


@pytest.mark.parametrize(("group_size", "m", "losses"), [(2, 1, 3), (8, 1, 2), (8, 2, 4), (8, 3, 8), (16, 4, 8)])
def test_monte_carlo_agrees_about_simultaneous_losses(group_size: int, m: int, losses: int) -> None:
    sizes = survival.group_sizes(64, group_size=group_size, m=m)
    rounds = 4000
    found = played_losses.simulate_losses(sizes, m, losses, rounds=rounds, seed=7)
    exact = survival.survive_losses(sizes, m, losses)
    assert abs(found - exact) <= played_losses.confidence(found, rounds)


@pytest.mark.parametrize(("m", "rate", "repair_s"), [(0, 2e-7, 600.0), (1, 3e-6, 1800.0), (2, 1.2e-5, 3000.0)])
def test_monte_carlo_agrees_about_a_window_between_durable_copies(m: int, rate: float, repair_s: float) -> None:
    sizes = survival.group_sizes(30, group_size=8, m=m)
    rounds, window_s = 1500, 86_400.0
    exact = survival.survive_window(sizes, m, rate_per_s=rate, repair_s=repair_s, window_s=window_s)
    found = played_losses.simulate_window(
        sizes, m, rate_per_s=rate, repair_s=repair_s, window_s=window_s, rounds=rounds, seed=11
    )
    assert 0.3 < exact < 0.95, "the case says something"
    assert abs(found - exact) <= played_losses.confidence(found, rounds)


@pytest.mark.parametrize(
    ("question", "m"),
    [
        (Question(nodes=20_000, state_bytes=102_400 * GIB), 3),
        (Question(nodes=7, state_bytes=GIB, repair_s=1e-9, durable_every_s=1e9), 1),
        (Question(nodes=64, state_bytes=GIB, repair_s=1e9, durable_every_s=1.0, node_losses_per_day=1e-3), 2),
    ],
)
def test_rounding_never_makes_more_parity_look_worse(question: Question, m: int) -> None:
    rows = sorted((choice.m, choice.survive_window) for choice in answer(question).choices if choice.group_size == 8)
    assert [p for _, p in rows] == sorted(p for _, p in rows)
    assert all(p == 1.0 for parity, p in rows if parity > m), "what is lost is far below a rounding"


def test_a_loss_that_is_hardly_likely_is_as_exact_as_any_other() -> None:
    once = survival._lose_window(4, 3, rate_per_s=1e-9, repair_s=1e12, window_s=1.0)
    assert once == pytest.approx(1e-36, rel=1e-6), "each of four nodes goes within a second, none comes back"


def test_domains_that_take_too_many_of_a_group_are_found() -> None:
    assert survival.fatal_domains(64, nodes_per_domain=4, group_size=8, m=2) == 0
    assert survival.fatal_domains(8, nodes_per_domain=4, group_size=8, m=2) == 2
    assert survival.fatal_domains(8, nodes_per_domain=2, group_size=8, m=2) == 0
    assert survival.fatal_domains(8, nodes_per_domain=0, group_size=8, m=1) == 0


def test_youngs_interval_is_the_best_of_all() -> None:
    mean_s, save_s = 6 * 3600.0, 60.0
    best_s = failures.best_interval_s(save_s=save_s, mean_between_failures_s=mean_s)
    assert best_s == pytest.approx(1610, abs=1)

    def goodput(interval_s: float) -> float:
        return failures.losses(save_s=save_s, interval_s=interval_s, failures_per_s=1 / mean_s, restart_s=120).goodput

    assert all(goodput(best_s) >= goodput(best_s * factor) for factor in (0.25, 0.5, 0.9, 1.1, 2, 4))


def test_memory_and_network_follow_the_rules_that_the_daemons_go_by() -> None:
    found = answer(CLUSTER)
    size = CLUSTER.node_state_bytes
    for choice in found.choices:
        fraction = parity_fraction(64, group_size=choice.group_size, m=choice.m)
        assert fraction == pytest.approx(choice.m / choice.k)
        assert choice.admission_bytes == admission_bytes(size, keep=1, fraction=fraction)
        assert choice.admission_bytes == pytest.approx(2 * size * (1 + choice.m / choice.k), rel=1e-6)
        if choice.m:
            n = choice.k + choice.m
            reads = sum(len(geometry.data_members(s, n=n, m=choice.m)) for s in range(n)) / n
            sends = reads + choice.m - 1  # blocks a member takes part in sending, each of size / k
            assert choice.network_bytes == pytest.approx(size * sends / choice.k, rel=1e-6)


def test_two_losses_are_survived_from_six_nodes_on_as_the_coordinator_chooses() -> None:
    for nodes in (2, 5, 6, 64):
        chosen = answer(replace(CLUSTER, nodes=nodes, memory_bytes=0)).chosen
        assert chosen.m >= CorePolicy().wanted_parity(nodes)
    assert answer(replace(CLUSTER, survive=1)).chosen.m == 1
    assert answer(replace(CLUSTER, survive=3)).chosen.m == 3


def test_where_nothing_reaches_the_target_what_must_be_survived_still_is() -> None:
    """A rack that holds every node takes all choices alike: the cheapest of them is none at all."""
    rack = replace(CLUSTER, nodes=2, memory_bytes=0, node_losses_per_day=0.0, nodes_per_domain=2)
    found = answer(replace(rack, survive=1, domain_failures_per_day=1.0))
    assert max(choice.survive_window for choice in found.choices) < found.question.target
    assert found.chosen.m == 1


def test_what_does_not_fit_says_what_would() -> None:
    with refuses(CapacityError, "state_does_not_fit", 4, "1.4", 34):
        answer(replace(CLUSTER, nodes=4))
    chosen = answer(replace(CLUSTER, nodes=64, memory_bytes=300 * GIB)).chosen
    assert chosen.fits
    assert "No choice that fits" in answer(replace(CLUSTER, nodes=64, memory_bytes=280 * GIB)).reason


def test_a_slow_network_raises_the_interval() -> None:
    chosen = answer(replace(CLUSTER, bandwidth_bytes_per_s=1e9, interval_steps=1)).chosen
    assert chosen.interval_steps == chosen.least_interval_steps == math.ceil(chosen.protect_s / CLUSTER.step_s) > 20


def test_checkpoints_alone_give_less_where_they_stop_training() -> None:
    found = answer(replace(CLUSTER, checkpoint_s=60.0))
    assert found.checkpoint_goodput is not None
    assert found.chosen.goodput is not None
    assert found.checkpoint_goodput < found.chosen.goodput < 1


def test_the_default_rates_are_those_of_the_source() -> None:
    total = failures.NODE_LOSSES_PER_NODE_DAY + failures.TRAINER_FAILURES_PER_NODE_DAY
    assert total * 54 * 2048 == pytest.approx(419)
    hours = 24 / (total * 2048)
    assert hours == pytest.approx(3.1, abs=0.05), "one every three hours, as was reported"


ARGUMENTS = [
    "plan",
    "--nodes",
    "64",
    "--state",
    "5600GiB",
    "--memory",
    "500GiB",
    "--bandwidth",
    "25GB",
    "--step-s",
    "4",
]


def test_the_command_prints_a_table_and_a_recommendation(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*ARGUMENTS, "--checkpoint-s", "60", "--ranks", "512"]) == 0
    text = capsys.readouterr().out
    assert "parity of 8 *" in text
    assert "the loss of any 2 nodes of a group" in text
    assert "checkpoints alone" in text
    header, first = text.splitlines()[2:4]
    assert header.index("k+m") == first.index("8+0")


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*ARGUMENTS, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"] == {"name": "parity", "parity": 2, "group_size": 8}
    assert {"survive", "admission_bytes", "network_bytes", "goodput"} <= set(found["choices"][0])


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--nodes", "0", "--state", "1GiB"], 64, "'0' is not a number"),
        (["--nodes", "4", "--state", "much"], 64, "is not a size"),
        (["--nodes", "4", "--state", "1" + "0" * 400], 64, "is not a size"),
        (["--nodes", "4", "--state", "1GiB", "--step-s", "1e-300"], 64, "from 1e-09 to 1e+09"),
        (["--nodes", "4", "--state", "1GiB", "--repair-s", "nan"], 64, "from 1e-09 to 1e+09"),
        (["--nodes", "4"], 64, "one of the arguments --state --state-per-node --measure is required"),
        (["--nodes", "4", "--state", "1TiB", "--memory", "10GiB"], 73, "the state does not fit"),
        (["--nodes", "4", "--measure", "no_such_module:build"], 64, "could not be measured"),
        (["--nodes", "4", "--state", "1GiB", "--group-size", "40"], 64, "a group size from 2 to 16"),
    ],
)
def test_what_cannot_be_planned_is_said(
    arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *arguments]) == status
    assert message in capsys.readouterr().err


def test_a_model_is_measured_without_being_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    (tmp_path / "made_up.py").write_text(
        "import torch\n"
        "def build():\n"
        "    model = torch.nn.Linear(200_000, 100_000)\n"  # 80 GB of parameters: only if nothing is allocated
        "    return model, torch.optim.AdamW(model.parameters())\n"
    )
    monkeypatch.chdir(tmp_path)
    parameters = 4 * (200_000 * 100_000 + 100_000)
    assert plan_command.measure("made_up:build") == pytest.approx(3 * parameters, abs=64)
    with refuses(UsageError, "not_measured", "made_up:nothing"):
        plan_command.measure("made_up:nothing")


def test_a_plot_is_drawn_or_it_is_said_what_is_missing(tmp_path: Path) -> None:
    from backstayd.cli.plan.plot import draw

    try:
        import matplotlib  # noqa: F401, ICN001
    except ImportError:
        with pytest.raises(ConfigError, match="pip install matplotlib"):
            draw(answer(CLUSTER), tmp_path / "plan.png")
        return
    draw(answer(CLUSTER), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    with refuses(UsageError, "bad_arguments"):
        draw(answer(CLUSTER), tmp_path / "nowhere" / "plan.png")
