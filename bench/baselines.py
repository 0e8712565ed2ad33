"""The machine's own limits: one thread copying memory, and one plain TCP stream over loopback.

Every ratio of the benchmark has one of these as its denominator, measured in the same rounds. No backstay code is on the path.
"""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from bench.measure import MeasurementError, Stopwatch, stopwatch

_RECEIVE_BYTES = 1024 * 1024


class Memcpy:
    """One thread copying between ordinary memory and a mapped tmpfs file, with all pages touched in advance.

    Args:
        path: A file to create on tmpfs; removed by :meth:`close`.
        size_bytes: Bytes per copy.
    """

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._path = path
        self._source = torch.ones(size_bytes, dtype=torch.uint8)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.posix_fallocate(fd, 0, size_bytes)
            self._mapping = mmap.mmap(fd, size_bytes)
        finally:
            os.close(fd)
        self._target = torch.frombuffer(self._mapping, dtype=torch.uint8)
        self.to_tmpfs()

    def to_tmpfs(self) -> Stopwatch:
        """RAM into tmpfs, as a capture does."""
        return self._copy(self._target, self._source)

    def from_tmpfs(self) -> Stopwatch:
        """tmpfs into RAM, as a restore does."""
        return self._copy(self._source, self._target)

    def close(self) -> None:
        del self._target, self._source
        self._mapping.close()
        self._path.unlink(missing_ok=True)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> Stopwatch:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with stopwatch() as watch:
                target.copy_(source)
        finally:
            torch.set_num_threads(threads)
        return watch


class RawTcp:
    """One stream over loopback between two processes: sendfile from tmpfs there (:func:`_send_file`), ``recv_into`` here."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._path = path
        self._buffer = bytearray(_RECEIVE_BYTES)
        with path.open("wb") as file:
            block = os.urandom(_RECEIVE_BYTES)
            for begin in range(0, size_bytes, _RECEIVE_BYTES):
                file.write(block[: size_bytes - begin])
        command = [sys.executable, "-m", "bench.baselines", str(path)]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._server.stdout is not None
        self._port = int(self._server.stdout.readline() or "0")

    def receive(self) -> Stopwatch:
        """Time one transfer of ``size_bytes``."""
        view = memoryview(self._buffer)
        with socket.create_connection(("127.0.0.1", self._port), timeout=60) as connection, stopwatch() as watch:
            received = 0
            while received < self.size_bytes:
                count = connection.recv_into(view)
                if count == 0:
                    raise MeasurementError(
                        f"raw TCP ended after {received} of {self.size_bytes} bytes", reason="raw_tcp"
                    )
                received += count
        return watch

    def close(self) -> None:
        for pipe in (self._server.stdin, self._server.stdout):
            if pipe is not None:
                pipe.close()
        self._server.wait(timeout=30)
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _send_file(path: str) -> None:
    """Print a port and send ``path`` to each client in turn until standard input closes."""
    with socket.create_server(("127.0.0.1", 0)) as listener, open(path, "rb") as file:
        print(listener.getsockname()[1], flush=True)
        threading.Thread(target=_exit_with_parent, daemon=True).start()
        size = os.fstat(file.fileno()).st_size
        while True:
            connection, _address = listener.accept()
            with connection:
                sent = 0
                while sent < size:
                    sent += os.sendfile(connection.fileno(), file.fileno(), sent, size - sent)


def _exit_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    _send_file(sys.argv[1])
