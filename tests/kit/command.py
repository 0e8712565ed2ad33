"""The operator's command as a process of its own."""

from __future__ import annotations

import subprocess
import sys

from backstay.testing import LocalCluster


def backstay(cluster: LocalCluster, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``backstay ARGV``, told of the cluster and with what it asks of operators; ``environment`` is added."""
    command = [sys.executable, "-m", "backstayd.cli", *argv]
    env = cluster.operator_environment | environment
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def printed(cluster: LocalCluster, *argv: str) -> str:
    """What a command that succeeds prints."""
    done = backstay(cluster, *argv)
    assert done.returncode == 0, done.stderr
    return done.stdout
