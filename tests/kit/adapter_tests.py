"""What the tests of the adapters share: running a training script beside a real daemon."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from backstay.testing import LocalCluster
from tests.kit.adapter_runs import lines_of, steps_of

ROOT = Path(__file__).parents[2]
QUIET = {
    "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}  # fmt: skip


def run_script(script: str, cluster: LocalCluster, out: Path, *arguments: str) -> None:
    """Run a training script of the kit to its end; its logs lie in ``out``."""
    command = [sys.executable, script, "--socket", str(cluster.nodes[0].socket), "--out", str(out), *arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        command, env={**os.environ, **QUIET, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=out,
        start_new_session=True, text=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=450)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    assert process.returncode == 0, output[-8000:]


def check_unchanged(out: Path, case: str, rank: int) -> None:
    """The attached run took the control's steps, until it was killed."""
    control, first = steps_of(out, case, "control", rank), steps_of(out, case, "first", rank)
    assert 1 < len(first) < len(control)
    assert list(first.items()) == list(control.items())[: len(first)]


def check_goes_on(out: Path, case: str, rank: int, step: int) -> None:
    """The restarted run restored ``step`` and took the rest of the control's steps, and its evaluations."""
    lines = lines_of(out, case, "second", rank)
    assert {"restored": step, "outcome": "EXACT"} in lines
    control, second = steps_of(out, case, "control", rank), steps_of(out, case, "second", rank)
    assert second
    assert list(second.items()) == list(control.items())[-len(second) :]
    first = steps_of(out, case, "first", rank)
    assert len(first) + len(second) >= len(control)
    wanted = [line for line in lines_of(out, case, "control", rank) if "evaluated" in line]
    evaluated = [line for line in lines if "evaluated" in line]
    assert evaluated == wanted[len(wanted) - len(evaluated) :]
