"""The demo's own judgement: it must see every difference, and refuse scenarios that cannot be run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from backstay.errors import UsageError
from backstay.testing.demo.notes import RunNotes, compare
from backstay.testing.demo.report import Report
from backstay.testing.demo.scenario import Fault, parse

_STEPS = 4


def _step(step: int, **changes: Any) -> dict[str, Any]:
    line = {"kind": "step", "step": step, "loss": f"loss-{step}", "value": 1.0, "time_unix_s": float(step)}
    return line | {name: f"{name}-{step}" for name in ("parameters", "optimizer", "rng")} | changes


def _write(directory: Path, ranks: list[list[dict[str, Any]]]) -> RunNotes:
    directory.mkdir()
    for rank, lines in enumerate(ranks):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / f"rank-{rank:05d}.jsonl").write_text(text)
    notes = RunNotes(directory, len(ranks))
    notes.poll()
    return notes


def _whole_run() -> list[dict[str, Any]]:
    end = _step(_STEPS) | {"kind": "end"}
    return [*(_step(step) for step in range(1, _STEPS + 1)), end]


@pytest.fixture
def control(tmp_path: Path) -> RunNotes:
    return _write(tmp_path / "control", [_whole_run(), _whole_run()])


def _with(lines: list[dict[str, Any]], index: int, **changes: Any) -> list[dict[str, Any]]:
    return [line | changes if position == index else line for position, line in enumerate(lines)]


def test_equal_runs_are_equal_also_with_a_step_computed_twice(control: RunNotes, tmp_path: Path) -> None:
    restored = _step(2) | {"kind": "restored", "attempt": 2}
    redone = [_step(1), _step(2), _step(3), restored, *_whole_run()[2:]]
    result = compare(control, _write(tmp_path / "run", [_whole_run(), redone]), steps=_STEPS)
    assert result.is_equal
    assert (result.compared_steps, result.redone_steps, result.restored_states) == (9, 1, 1)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (_with(_whole_run(), 1, loss="other"), "rank 1, step 2: loss bits other"),
        (_with(_whole_run(), 2, parameters="other"), "rank 1 after step 3: parameters other"),
        (_with(_whole_run(), 2, rng="other"), "rank 1 after step 3: rng other"),
        (_with(_whole_run(), 4, optimizer="other"), "rank 1 at the end: optimizer other"),
        (_whole_run()[:-1], "rank 1 never finished"),
        (_whole_run()[:1] + _whole_run()[2:], "rank 1 never reported step 2"),
        ([*_whole_run(), _step(9)], "rank 1 reported step 9, which the control run does not have"),
        (
            [_step(2, kind="restored", attempt=2, parameters="other"), *_whole_run()],
            "rank 1 as restored to step 2: parameters other",
        ),
        ([_step(1, loss="other"), *_whole_run()], "rank 1, step 1: loss bits other"),
    ],
)
def test_any_single_difference_is_seen_and_named(
    control: RunNotes, tmp_path: Path, lines: list[dict[str, Any]], sentence: str
) -> None:
    result = compare(control, _write(tmp_path / "run", [_whole_run(), lines]), steps=_STEPS)
    assert result.difference_count == 1
    assert result.first_difference.startswith(sentence)


def test_a_line_torn_by_a_kill_is_read_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "rank-00000.jsonl"
    path.write_text('{"kind": "step", "st')
    notes = RunNotes(tmp_path, 1)
    assert notes.poll() == []
    with path.open("a") as file:
        file.write('ep": 3}\n')
    assert [line for _rank, line in notes.poll()] == [{"kind": "step", "step": 3}]
    assert notes.highest_step() == 3


def test_the_default_scenario_is_the_promise() -> None:
    scenario = parse([])
    assert (scenario.nodes, scenario.k, scenario.m, scenario.world_size) == (6, 4, 2, 6)
    assert [fault.kind for fault in scenario.faults] == ["trainer", "daemon", "node", "nodes", "coordinator"]
    assert len(scenario.faults[3].targets) == 2


def test_faults_are_read_with_counts_targets_and_in_the_order_of_steps() -> None:
    scenario = parse(["--faults", "nodes#0+4@9, trainer@5,node#1@7", "--steps", "20"])
    assert [fault.kind for fault in scenario.faults] == ["trainer", "node", "nodes"]
    assert scenario.faults[2] == Fault(kind="nodes", step=9, targets=(0, 4))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--faults", "meteor@3"], "fault 'meteor@3' is not KIND"),
        (["--faults", "trainer@55"], "a fault at step 55 needs --steps 58 or more"),
        (["--faults", "nodes:3@9"], "losing 3 nodes at once is more than m=2 covers; --lose 3 shows"),
        (["--faults", "node#7@9"], "names targets (7,); there are 6"),
        (["--nodes", "4", "--k", "4", "--m", "2"], "k=4 and m=2 need 6 nodes; there are 4"),
        (["--d-model", "100"], "not a multiple of 32"),
    ],
)
def test_a_scenario_that_cannot_be_run_is_refused_with_numbers(flags: list[str], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(flags)
    assert sentence in str(caught.value)


def test_losing_more_nodes_than_parity_is_known_to_be_the_end() -> None:
    assert parse(["--lose", "3"]).is_beyond_redundancy
    assert not parse(["--lose", "2"]).is_beyond_redundancy


def test_the_report_keeps_its_keys_and_is_json() -> None:
    document = json.loads(json.dumps(Report(scenario=parse([])).document()))
    assert document["bitwise_equal"] is None
    assert {"faults", "verdict", "first_difference", "scenario", "timeline"} <= set(document)
