"""Cleans up after a test process that died before it could: ``python guardian.py CLUSTER_ID ROOT``.

Waits for the end of its standard input, which its parent keeps open; then kills every process that carries the cluster's
mark and deletes the root directory. Must outlive signals sent to the terminal's process group.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backstay.testing.processes import CLUSTER_MARK, kill_marked


@contextmanager
def guarded(cluster_id: str, root: Path) -> Iterator[None]:
    """A guardian process runs while this is open; any orderly exit dismisses it without deleting anything."""
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    guardian = subprocess.Popen(
        [sys.executable, "-P", __file__, cluster_id, str(root)],
        env=dict(os.environ) | {"PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield
    finally:
        guardian.communicate(b"done", timeout=30)


def main(cluster_id: str, root: str) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    received = sys.stdin.buffer.read()
    if received != b"done":
        kill_marked({CLUSTER_MARK: cluster_id})
        shutil.rmtree(root, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
