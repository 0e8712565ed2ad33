"""Scripts whose ranks are forked children of one process, which imports torch once; and how a test runs such a script."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUIET = {
    "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}  # fmt: skip


def run_script(script: str | None, socket: str, out: Path, *arguments: str) -> None:
    """Run a script of the kit to its end; what it writes lies in ``out``."""
    command = [sys.executable, str(script), "--socket", socket, "--out", str(out), *arguments]
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


def fork_ranks(count: int, run: Callable[[int], None]) -> list[int]:
    """Call ``run(rank)`` in a child for each rank; their exit codes. When one fails, the others are killed."""
    sys.stdout.flush()
    sys.stderr.flush()
    children = [_fork(run, rank) for rank in range(count)]
    codes: dict[int, int] = {}
    while len(codes) < count:
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child] > 0:
            for other in set(children) - set(codes):
                os.kill(other, signal.SIGKILL)
    return [codes[child] for child in children]


def _fork(run: Callable[[int], None], rank: int) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        run(rank)
        status = 0
    except BaseException:  # noqa: BLE001 - a forked child must end here, whatever happened
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
