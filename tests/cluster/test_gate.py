"""What the layout gate and probation promise, with real daemons, a real coordinator and a real DDP training of two ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from backstay.testing import LocalCluster
from backstay.testing.ports import free_port
from tests.kit.doubtful_trainer import FAULTS
from tests.kit.wording import says

SCRIPT = Path(__file__).parents[1] / "kit" / "doubtful_trainer.py"
RANKS = 2
LIMIT = 3

Lines = dict[tuple[str, str], list[list[dict[str, Any]]]]  # (scenario, event) -> by rank


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Lines:
    """Everything the trainers logged, all scenarios in one pair of processes."""
    directory = tmp_path_factory.mktemp("doubt")
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    limit = {"BACKSTAYD_COORDINATOR_RESTORE_LOOP_LIMIT": str(LIMIT)}
    with LocalCluster(RANKS, 1, lease_s=1.0, keep=2, coordinator_env=limit) as cluster:
        port = free_port()
        trainers = []
        for rank in range(RANKS):
            options = {
                "rank": rank, "world_size": RANKS, "port": port, "log": str(directory / f"{rank}.log"), "scenarios": FAULTS,
            }  # fmt: skip
            trainers.append(cluster.run_on_node(rank, [sys.executable, str(SCRIPT), json.dumps(options)], environment))
        cluster.wait_until(lambda: all(t.poll() is not None for t in trainers), 300, "the trainers to end")
        assert [t.returncode for t in trainers] == [0] * RANKS, cluster.evidence()
    found: Lines = {}
    for rank in range(RANKS):
        for line in map(json.loads, (directory / f"{rank}.log").read_text().splitlines()):
            found.setdefault((line["scenario"], line["event"]), [[] for _ in range(RANKS)])[rank].append(line)
    return found


def _both(lines: Lines, scenario: str, event: str) -> tuple[dict[str, Any], dict[str, Any]]:
    first, second = (of_rank[0] for of_rank in lines[scenario, event])
    return first, second


def _refusal(lines: Lines, scenario: str) -> str:
    """What both ranks were told."""
    answers = _both(lines, scenario, "restored")
    assert [answer["refused"] for answer in answers] == ["IntegrityError"] * 2, answers
    assert [answer["reason"] for answer in answers] == ["gate_failed"] * 2, answers
    assert answers[0]["message"] == answers[1]["message"]
    return str(answers[0]["message"])


def test_a_replica_that_differs_by_one_bit_is_refused_by_name_and_the_next_restore_takes_an_older_step(
    lines: Lines,
) -> None:
    message = _refusal(lines, "bit")
    assert says("gate_differs", message, tensor="model.0.weight", rank="rank 1", other="rank 0")
    trained = _both(lines, "bit", "trained")[0]["step"]
    for answer in _both(lines, "bit", "again"):
        assert answer["outcome"] == "EXACT_OLDER"
        assert 0 < answer["step"] < trained
        assert "distrusted" in answer["message"]


def test_a_step_counter_that_differs_on_one_rank_is_refused_with_both_values(lines: Lines) -> None:
    message = _refusal(lines, "steps")
    trained = _both(lines, "steps", "trained")[0]["step"]
    tensor, expected = "optimizer.state.0.weight.step", repr(float(trained))
    assert says("gate_differs", message, tensor=tensor, rank="rank 1", expected=expected, other="rank 0")


def test_moments_that_went_missing_on_one_rank_are_refused_on_all_and_the_snapshot_is_still_trusted(
    lines: Lines,
) -> None:
    first, second = _both(lines, "moments", "restored")
    assert (second["refused"], second["reason"]) == ("IntegrityError", "optimizer_state")
    assert "optimizer.state.0.weight.exp_avg" in second["message"]
    assert first["reason"] == "gate_failed"
    assert "optimizer.state.0.weight.exp_avg" in first["message"], "the other rank hears why"
    assert [a["outcome"] for a in _both(lines, "moments", "again")] == ["EXACT"] * 2


def test_a_rank_that_cannot_load_makes_every_rank_raise_its_reason_at_once(lines: Lines) -> None:
    first, second = _both(lines, "load", "restored")
    assert second["refused"] == "RuntimeError"
    assert says("gate_not_loaded", first["message"], rank=1)
    assert "no-file-of-the-loader" in first["message"]
    assert max(first["seconds"], second["seconds"]) < 30, "well below the deadline of 60 s: nobody waited for it"
    assert [a["outcome"] for a in _both(lines, "load", "again")] == ["EXACT"] * 2


@pytest.mark.parametrize("scenario", ["nan", "loss"])
def test_nan_in_the_first_steps_after_a_restore_goes_on_training_and_has_an_older_step_restored_next(
    lines: Lines, scenario: str
) -> None:
    base = _both(lines, scenario, "restored")[0]["step"]
    assert _both(lines, scenario, "went_on")[1]["step"] == base + 3, "training is not stopped"
    for answer in _both(lines, scenario, "again"):
        assert answer["outcome"] == "EXACT_OLDER"
        assert 0 < answer["step"] < base, "neither it nor what was trained from it"
    warned = [
        line["message"] for line in lines["", "warned"][0] if says("distrusted_by_trainer", line["message"], base=base)
    ]
    what = "gradients of 0.weight are not finite" if scenario == "nan" else "the loss is inf"
    assert any(what in message for message in warned), lines["", "warned"][0]


def test_an_overflow_that_a_grad_scaler_handles_is_no_reason_for_distrust(lines: Lines) -> None:
    base = _both(lines, "overflow", "restored")[0]["step"]
    for answer in _both(lines, "overflow", "again"):
        assert answer["outcome"] == "EXACT"
        assert answer["step"] >= base


def test_a_loop_of_identical_restores_ends_with_what_to_do(lines: Lines) -> None:
    for of_rank in lines["loop", "restored"]:
        assert [line.get("outcome") for line in of_rank[:LIMIT]] == ["EXACT"] * LIMIT
        last = of_rank[LIMIT]
        assert last["refused"] == "UnrecoverableError"
        assert says("restore_loop", last["message"], tries=3, run="default/doubt-loop")
        assert "restore_loop_limit" in last["message"]
