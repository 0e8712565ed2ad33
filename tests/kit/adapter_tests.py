"""What the tests of the adapters share: running a training script beside a real daemon."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from backstay.testing import LocalCluster

ROOT = Path(__file__).parents[2]
QUIET = {
    "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}  # fmt: skip


def run_script(script: str, cluster: LocalCluster, out: Path, *arguments: str) -> None:
    """Run a training script of the kit to its end; its logs lie in ``out``."""
    command = [sys.executable, script, "--socket", str(cluster.nodes[0].socket), "--out", str(out), *arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, env={**os.environ, **QUIET, "PYTHONPATH": path}, capture_output=True, text=True, timeout=200, check=False,
        cwd=out,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
