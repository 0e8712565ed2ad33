"""Another user of the machine, who may use the socket as every trainer may, and wants what is not theirs.

``python -m tests.kit.neighbour JSON`` with socket, run (of somebody else), memory_dir, keys, daemon_pid, trainer_pid, report.
Writes what came of each attempt as JSON into ``report``, then holds its connections and slots until it is killed.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from backstay.ids import new_incarnation
from backstay.protocol import framing, messages

SILENT = 200
SLOT_BYTES = 8 << 20
MANY = 64


class Line:
    """A connection that asks one thing at a time."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(30)
        self.sock.connect(path)
        self._count = 0

    def ask(self, message: Any) -> tuple[str, str]:
        """The name of the answer and what it says."""
        self._count += 1
        framing.send_frame(self.sock, message, message_id=self._count)
        while True:
            answer, _, _ = framing.receive_frame(self.sock)
            if not isinstance(answer, messages.Progress):
                said = f"{answer.reason}: {answer.message}" if isinstance(answer, messages.Error) else str(answer)
                return type(answer).__name__, said


def attach(line: Line, run: str, rank: int = 0) -> tuple[str, str]:
    return line.ask(messages.Attach(run=run, world_id=new_incarnation(), rank=rank, world_size=1))


def outcome(attempt: Callable[[], object]) -> str:
    try:
        return f"got {str(attempt())[:200]}"
    except OSError as error:
        return type(error).__name__


def steal(options: dict[str, Any]) -> dict[str, Any]:
    """What files and processes give away."""
    found = {f"read {path}": outcome(Path(path).read_bytes) for path in options["keys"]}
    found["list memory"] = outcome(lambda: os.listdir(options["memory_dir"]))
    for who in ("daemon", "trainer"):
        pid = options[f"{who}_pid"]
        found[f"descriptors of the {who}"] = outcome(
            lambda pid=pid: [os.readlink(f"/proc/{pid}/fd/{n}") for n in range(3, 40)]
        )
        found[f"memory of the {who}"] = outcome(lambda pid=pid: open(f"/proc/{pid}/mem", "rb").read(1))  # noqa: SIM115
        found[f"kill the {who}"] = outcome(lambda pid=pid: os.kill(pid, signal.SIGKILL))
    return found


def ask_for(options: dict[str, Any]) -> dict[str, Any]:
    """What the daemon gives away."""
    path, run = options["socket"], options["run"]
    found: dict[str, Any] = {"status": Line(path).ask(messages.Status())}
    found["open"] = Line(path).ask(messages.Open(run=run, step=0))
    found["open by run_id alone"] = Line(path).ask(messages.Open(run=run.partition("/")[2], step=0))
    found["attach"] = attach(Line(path), run)
    return found


def hoard(options: dict[str, Any]) -> tuple[dict[str, Any], list[Line]]:
    """Take as much as there is: connections, runs, memory."""
    path = options["socket"]
    lines = [Line(path) for _ in range(SILENT)]
    refusals: list[str] = []
    slots = 0
    for number in range(MANY):
        line = Line(path)
        lines.append(line)
        for message in (
            messages.Attach(run=f"neighbour/hoard-{number}", world_id=new_incarnation(), rank=0, world_size=1),
            messages.Restore(deadline_s=20.0, world_size=1),
            messages.Reserve(step=1, size_bytes=SLOT_BYTES, wait_s=0.0),
        ):
            name, said = line.ask(message)
            if name in ("Error", "Skipped"):
                refusals.append(said)
                break
        else:
            slots += 1
        if len(refusals) > 2:
            break
    return {"slots": slots, "refusals": refusals}, lines


def main(options: dict[str, Any]) -> None:
    found = {"stolen": steal(options), "asked": ask_for(options)}
    found["hoarded"], lines = hoard(options)
    report = Path(options["report"])
    report.write_text(json.dumps(found))
    signal.pause()
    del lines


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
