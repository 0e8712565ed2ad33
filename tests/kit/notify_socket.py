"""The service manager's end of sd_notify: a real Unix datagram socket that keeps what it was told, by whom and when."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from backstay.testing.wait import wait_until
from tests.kit.wording import says


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    pid: int
    fields: dict[str, str]


class NotifySocket:
    """Listens from ``with`` on; ``path`` None is an abstract socket. ``name`` is what ``NOTIFY_SOCKET`` says."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self.name = str(path) if path else f"@backstay-test-{os.getpid()}-{time.monotonic_ns()}"
        self.messages: list[Message] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._thread = threading.Thread(target=self._receive, name="notify-socket")

    def __enter__(self) -> Self:
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(self.name if self._path else "\0" + self.name[1:])
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
            own.sendto(b"", self._socket.getsockname())
        self._thread.join()
        self._socket.close()

    def of(self, pid: int) -> list[Message]:
        """What one process said, in order."""
        return [message for message in self.messages if message.pid == pid]

    def wait_for(self, pid: int, name: str, value: str = "", *, key: str = "", after: int = 0) -> Message:
        """The first message of ``pid``, from its ``after``-th on, whose field ``name`` has ``value``, or says ``key``."""

        def found() -> Message | None:
            sent = [m for m in self.of(pid)[after:] if name in m.fields]
            return next((m for m in sent if value in m.fields[name] and (not key or says(key, m.fields[name]))), None)

        message = wait_until(found, deadline_s=60, why=f"{name}={value or key}", evidence=lambda: str(self.of(pid)))
        assert message is not None
        return message

    def _receive(self) -> None:
        while True:
            raw, control, _, _ = self._socket.recvmsg(65536, socket.CMSG_SPACE(12))
            if not raw:
                return
            pid = next(struct.unpack("iII", data)[0] for _, kind, data in control if kind == socket.SCM_CREDENTIALS)
            lines = raw.decode().splitlines()
            fields = {name: value for name, _, value in (line.partition("=") for line in lines)}
            self.messages.append(Message(pid=pid, fields=fields))
