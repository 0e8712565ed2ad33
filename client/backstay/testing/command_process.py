"""A process that takes commands: one JSON line in, one JSON line out. Both ends: the one that asks, the one that serves.

``{"do": "attach", "run": "x"}`` calls ``do_attach(run="x")``; what that raises comes back as ``error``, ``reason`` and
``message``. Must not know what the commands mean.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from backstay.errors import UnavailableError
from backstay.testing.processes import tail

ANSWER_DEADLINE_S = 90.0


def serve_commands(target: object, answers: TextIO) -> None:
    """Carry out commands from standard input on ``target`` until it ends; one line on ``answers`` for each."""
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(target, "do_" + command.pop("do"))(**command)
        except Exception as error:  # noqa: BLE001 - the boundary to who asked: it decides what a failure means
            answer = {
                "error": getattr(error, "error_class", type(error).__name__),
                "reason": getattr(error, "reason", "local"),
                "message": str(error),
            }
        print(json.dumps(answer), file=answers, flush=True)


class CommandProcess:
    """``argv`` as a process of its own session that serves commands; it ends when its standard input ends."""

    def __init__(self, argv: Sequence[str], *, name: str, environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self._log = log
        self._pending = b""
        with log.open("ab") as log_file:
            self.process = subprocess.Popen(
                list(argv),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log_file,
                env=dict(environment),
                start_new_session=True,
            )

    def send(self, do: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def receive(self, *, deadline_s: float = ANSWER_DEADLINE_S) -> dict[str, Any]:
        """The next answer, errors included; UnavailableError when the process ended or takes too long."""
        assert self.process.stdout is not None
        end = time.monotonic() + deadline_s
        while b"\n" not in self._pending:
            if not self._is_readable(max(0.0, end - time.monotonic())):
                raise UnavailableError(f"{self.name} did not answer within {deadline_s:g} s", reason="slow")
            received = os.read(self.process.stdout.fileno(), 65536)
            if not received:
                raise self._ended()
            self._pending += received
        line, _, self._pending = self._pending.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def has_answered(self, wait_s: float) -> bool:
        """Whether an answer is there within ``wait_s``."""
        return b"\n" in self._pending or self._is_readable(wait_s)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=20)

    def close(self) -> None:
        """Close the pipes, which ends the process; kill it if it does not end."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.kill()

    def _is_readable(self, wait_s: float) -> bool:
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], wait_s)[0])

    def _ended(self) -> UnavailableError:
        status = self.process.wait(timeout=20)
        return UnavailableError(f"{self.name} ended with status {status}: {tail(self._log)}", reason="process_died")
