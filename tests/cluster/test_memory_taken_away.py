"""The memory directory is unmounted under a running daemon: it ends with one line, and the trainer is told."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from backstay.errors import UnavailableError
from tests.kit.daemon_process import RunningDaemon, running_daemon
from tests.kit.files import mounted_tmpfs
from tests.kit.trainer import PlainTrainer
from tests.kit.wording import says

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

ENDED_S = 30.0


@pytest.fixture
def memory(tmpfs_dir: Path) -> Iterator[Path]:
    """A tmpfs of its own."""
    with mounted_tmpfs(tmpfs_dir / "memory", "size=64m,mode=0700") as place:
        yield place


@pytest.fixture
def daemons(tmpfs_dir: Path, memory: Path) -> Iterator[tuple[RunningDaemon, RunningDaemon]]:
    with running_daemon("coordinator", "--parity", "0", directory=tmpfs_dir) as coordinator:
        address = coordinator.wait_for_line("coordinator_listens")["address"]
        place = ("--memory-dir", str(memory), "--socket", str(tmpfs_dir / "socket"), "--coordinator", address)
        with running_daemon("node", "--name", "n0", *place, directory=tmpfs_dir) as node:
            node.wait_for_line("node_serves")
            yield coordinator, node


def test_a_daemon_whose_memory_is_unmounted_ends_in_one_line_and_its_trainer_is_told(
    tmpfs_dir: Path, memory: Path, daemons: tuple[RunningDaemon, RunningDaemon]
) -> None:
    _, node = daemons
    trainer = PlainTrainer(tmpfs_dir / "socket")
    trainer.attach()
    trainer.restore()
    trainer.snapshot(1)
    written = len(node.log.read_text().splitlines())
    subprocess.run(["umount", "-l", memory], check=True)
    assert node.process.wait(ENDED_S) == UnavailableError.exit_code
    assert trainer.socket.recv(1 << 16) == b"", "the line is cut, which a trainer takes for what it is"
    trainer.close()
    lines = node.log.read_text().splitlines()[written:]
    assert [line for line in lines if says("memory_unmounted", line, directory=memory)] == [lines[-1]]
    assert "Traceback" not in "\n".join(lines)
    assert len([line for line in lines if " ERROR " in line or " WARNING " in line]) <= 2, lines
    assert list(memory.iterdir()) == [], "nothing is written into what lies below"
