"""The demo at its smallest: a real FSDP2 training run, real daemons, real losses, and the same bits at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kit.wording import says

SMALL = ["--nodes", "3", "--model", "small", "--lease-s", "2"]
LIMIT_S = 600


def _demo(tmp_path: Path, *flags: str) -> tuple[int, str, dict[str, Any]]:
    report = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "backstay.testing.demo", *SMALL, *flags, "--json", str(report)],
        env=dict(os.environ) | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    output = done.stdout + done.stderr
    assert report.exists(), output
    return done.returncode, output, json.loads(report.read_text())


@pytest.mark.timeout(LIMIT_S + 60)
def test_a_run_that_loses_a_trainer_a_daemon_a_node_and_the_coordinator_ends_with_the_same_bits(tmp_path: Path) -> None:
    faults = "trainer@4,daemon@10,node@16,coordinator@24"
    status, output, report = _demo(tmp_path, "--steps", "32", "--faults", faults)
    assert status == 0, output
    assert says("demo_equal", output)
    assert report["bitwise_equal"] is True
    kinds = {fault["kind"]: fault for fault in report["faults"]}
    assert [fault["kind"] for fault in report["faults"]] == ["trainer", "daemon", "node", "coordinator"]
    assert kinds["daemon"]["outcome"] == "UNINTERRUPTED"
    assert kinds["node"]["rebuilt_count"] == 1, "the destroyed node's shard came out of parity"
    for name in ("trainer", "node", "coordinator"):
        assert kinds[name]["outcome"] in ("EXACT", "EXACT_OLDER")
        assert kinds[name]["restored_step"] >= 1
        assert kinds[name]["steps_lost"] >= 0
        assert kinds[name]["recovered_s"] > 0
    assert report["compared"]["restored_states"] >= 9, "three recoveries of three ranks"


@pytest.mark.timeout(LIMIT_S + 60)
def test_losing_more_nodes_than_parity_ends_with_the_products_own_message(tmp_path: Path) -> None:
    status, output, report = _demo(tmp_path, "--steps", "15", "--lose", "2")
    assert status == 1, output
    (fault,) = report["faults"]
    assert fault["outcome"] == "REFUSED", output
    assert report["bitwise_equal"] is None
    assert fault["message"] in output
    assert "step" in fault["message"]
    assert "rank" in fault["message"]
    assert says("demo_refused", output)


@pytest.mark.timeout(LIMIT_S + 60)
def test_a_run_that_gets_no_replacement_goes_on_with_the_ranks_that_are_left(tmp_path: Path) -> None:
    """Four ranks of FSDP2 × TP, then three of FSDP2, then two: what each begins with is bit for bit what the last one had."""
    flags = ["--nodes", "4", "--m", "1", "--steps", "24", "--shrink"]
    status, output, report = _demo(tmp_path, *flags)
    assert status == 0, output
    shrunk = report["shrunk"]
    assert shrunk["first_difference"] == ""
    assert shrunk["worlds"] == [4, 3, 2]
    assert shrunk["restored_states"] == 3, "after a trainer's death, and after each lost node"
    assert shrunk["equal_steps"] >= 8, "as long as no node was lost, the bits are the control run's"
    assert shrunk["loss_difference"] < 1e-3
    lost = [fault for fault in report["faults"] if fault["kind"] == "node"]
    assert [fault["outcome"] for fault in lost] == ["EXACT", "EXACT"]


@pytest.mark.timeout(LIMIT_S + 60)
def test_a_rolling_restart_costs_no_step_and_no_redundancy(tmp_path: Path) -> None:
    status, output, report = _demo(tmp_path, "--steps", "36", "--rolling")
    assert status == 0, output
    assert report["bitwise_equal"] is True
    assert [fault["kind"] for fault in report["faults"]] == ["upgrade", "upgrade", "upgrade", "handover"]
    assert {fault["outcome"] for fault in report["faults"]} == {"UNINTERRUPTED"}
    assert says("demo_rolled", report["verdict"], count=4)
