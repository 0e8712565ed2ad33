"""The Accelerate adapter, with the real package and real daemons: nothing changes, and a killed run goes on bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from backstay.testing import LocalCluster
from tests.kit import accelerate_training
from tests.kit.adapter_tests import run_script
from tests.kit.adapter_runs import lines_of, steps_of

CASES = accelerate_training.CASES
RANKS = [(case, rank) for case, size in CASES.items() for rank in range(size)]
pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("accelerate")
    with LocalCluster(1, 0, lease_s=1.0) as cluster:
        run_script(accelerate_training.__file__, cluster, out)
        yield out


@pytest.mark.parametrize(("case", "rank"), RANKS)
def test_an_attached_accelerator_takes_the_same_steps_as_one_alone(out: Path, case: str, rank: int) -> None:
    control, first = steps_of(out, case, "control", rank), steps_of(out, case, "first", rank)
    last = accelerate_training.DIE_AT[case]
    assert len(control) > last
    assert first == {step: control[step] for step in range(1, last + 1)}


@pytest.mark.parametrize(("case", "rank"), RANKS)
def test_an_accelerator_that_was_killed_goes_on_bit_for_bit(out: Path, case: str, rank: int) -> None:
    control, second = steps_of(out, case, "control", rank), steps_of(out, case, "second", rank)
    last = accelerate_training.DIE_AT[case]
    assert lines_of(out, case, "second", rank)[0] == {"restored": last, "outcome": "EXACT"}
    assert second == {step: control[step] for step in control if step > last}
    evaluated = [line for line in lines_of(out, case, "control", rank) if "evaluated" in line]
    again = [line for line in lines_of(out, case, "second", rank) if "evaluated" in line]
    assert again
    assert again == evaluated[-len(again) :]
