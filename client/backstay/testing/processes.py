"""Processes of a test cluster, identified by a mark in their environment rather than by their parent.

A mark survives fork, exec, setsid and the death of every ancestor, so everything that belongs to node 3 can be killed
together, as when a machine is lost. Linux only (reads /proc); must not know what the processes do.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from backstay.errors import UnavailableError

CLUSTER_MARK: Final = "BACKSTAY_TEST_CLUSTER"
NODE_MARK: Final = "BACKSTAY_TEST_NODE"
ROLE_MARK: Final = "BACKSTAY_TEST_ROLE"
KILL_DEADLINE_S: Final = 20.0


def marked_processes(marks: Mapping[str, str]) -> list[int]:
    """Pids of all living processes (zombies excluded) whose environment holds every one of ``marks``."""
    wanted = [f"{name}={value}".encode() for name, value in marks.items()]
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):
                environment = Path("/proc", entry, "environ").read_bytes().split(b"\0")
                if all(mark in environment for mark in wanted):
                    found.append(int(entry))
    return sorted(found)


def signal_processes(pids: Sequence[int], number: signal.Signals) -> None:
    """Send ``number`` to each of ``pids`` that still exists."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_marked(marks: Mapping[str, str], *, deadline_s: float = KILL_DEADLINE_S) -> list[int]:
    """SIGKILL every process with ``marks`` until none is left, including new ones; returns the killed pids.

    Raises:
        UnavailableError: some process outlived the deadline (uninterruptible in the kernel).
    """
    killed: set[int] = set()
    deadline = time.monotonic() + deadline_s
    while pids := marked_processes(marks):
        if time.monotonic() > deadline:
            raise UnavailableError(f"processes {pids} with marks {dict(marks)} outlived SIGKILL for {deadline_s:g} s")
        signal_processes(pids, signal.SIGKILL)
        killed.update(pids)
        time.sleep(0.005)
    return sorted(killed)


def command_line(pid: int) -> str:
    """The command line of ``pid`` for messages; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()[:200]
    except OSError:
        return ""


def tail(path: Path, *, line_count: int = 15) -> str:
    """The last lines of a log, or the error that prevents reading it."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 16384))
            lines = file.read().decode(errors="replace").splitlines()[-line_count:]
    except OSError as error:
        return f"({error})"
    return "\n".join(lines)


@dataclass(slots=True)
class ProcessKeeper:
    """Starts marked processes in their own sessions, with logs in files, and ends them all.

    Invariant: a process started here, and whatever it started, carries the cluster's mark and dies in :meth:`kill`.
    """

    cluster_id: str
    log_dir: Path
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def spawn(
        self,
        argv: Sequence[str],
        *,
        name: str,
        node: str = "",
        role: str = "",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start ``argv`` under ``env`` (default: this process's) plus the marks; output goes to ``<name>.log``."""
        environment = dict(os.environ if env is None else env)
        environment |= {CLUSTER_MARK: self.cluster_id, NODE_MARK: node, ROLE_MARK: role, "PYTHONUNBUFFERED": "1"}
        self.log_dir.mkdir(parents=True, exist_ok=True)
        with (self.log_dir / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                list(argv),
                env=environment,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.children.append(child)
        environ = Path(f"/proc/{child.pid}/environ")
        while child.poll() is None and not environ.read_bytes():  # the environment appears shortly after Popen returns
            time.sleep(0.001)
        return child

    def marks(self, *, node: str | None = None, role: str | None = None) -> dict[str, str]:
        """The marks of a part: everything, one node, or one role of it."""
        marks = {CLUSTER_MARK: self.cluster_id}
        if node is not None:
            marks[NODE_MARK] = node
        if role is not None:
            marks[ROLE_MARK] = role
        return marks

    def kill(self, *, node: str | None = None, role: str | None = None) -> list[int]:
        """SIGKILL a part (all of it by default) and reap; returns the pids."""
        killed = kill_marked(self.marks(node=node, role=role))
        self.reap()
        return killed

    def pids(self, *, node: str | None = None, role: str | None = None) -> list[int]:
        return marked_processes(self.marks(node=node, role=role))

    def reap(self) -> None:
        """Collect the exit status of children that ended."""
        self.children = [child for child in self.children if child.poll() is None]

    def logs(self, *, line_count: int = 15) -> str:
        """Tails of all logs, newest written last."""
        paths = sorted(self.log_dir.glob("*.log"), key=lambda path: path.stat().st_mtime)
        return "\n".join(f"--- {path.name}\n{tail(path, line_count=line_count)}" for path in paths)
