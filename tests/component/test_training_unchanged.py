"""Attaching changes nothing, and a restored run goes on bit for bit: against a run that never imported backstay."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit import unchanged_training
from tests.kit.forked_ranks import run_script
from tests.kit.local_daemon import LocalDaemon
from tests.kit.unchanged_training import KINDS, OPTIMIZERS, STEPS

CASES = [(kind, name, rank) for kind, size in KINDS.items() for name in OPTIMIZERS for rank in range(size)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Digests of the control, of an attached first half, and of a second half restored in fresh processes."""
    out = tmp_path_factory.mktemp("runs")
    with LocalDaemon() as daemon:
        for part in ("control", "first", "second"):
            run_script(unchanged_training.__file__, daemon.socket_path, out, "--part", part)
        yield out


def _digests(runs: Path, part: str, kind: str, rank: int) -> dict[str, list[str]]:
    return json.loads((runs / f"{part}-{kind}-{rank}.json").read_text())


@pytest.mark.parametrize(("kind", "name", "rank"), CASES)
def test_an_attached_run_takes_the_same_steps_as_one_that_never_attached(
    runs: Path, kind: str, name: str, rank: int
) -> None:
    control = _digests(runs, "control", kind, rank)[name]
    assert len(set(control)) == STEPS
    assert _digests(runs, "first", kind, rank)[name] == control[: STEPS // 2]


@pytest.mark.parametrize(("kind", "name", "rank"), CASES)
def test_a_run_restored_in_fresh_processes_goes_on_bit_for_bit(runs: Path, kind: str, name: str, rank: int) -> None:
    assert _digests(runs, "second", kind, rank)[name] == _digests(runs, "control", kind, rank)[name][STEPS // 2 :]
