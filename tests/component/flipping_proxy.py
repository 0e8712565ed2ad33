"""A TCP proxy that flips one byte of each connection on its way, for the tests of verification."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Self


class FlippingProxy:
    """Forwards to ``target`` and flips byte number ``at`` of what the server (or client) sends, on ``times`` connections.

    Only connections that carry that many bytes count.
    """

    def __init__(self, target: str, *, at: int, times: int, is_from_server: bool = True) -> None:
        self._target = target
        self._at = at
        self._left = times
        self._is_from_server = is_from_server
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listen = socket.create_server(("127.0.0.1", 0))
        self.flipped_count = 0
        self._start(self._accept)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listen.getsockname()[1]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in [self._listen, *self._sockets]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for sock in [self._listen, *self._sockets]:
            sock.close()

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listen.accept()
                host, _, port = self._target.rpartition(":")
                server = socket.create_connection((host, int(port)))
                self._sockets += [client, server]
                self._start(self._pump, client, server, not self._is_from_server)
                self._start(self._pump, server, client, self._is_from_server)

    def _pump(self, source: socket.socket, sink: socket.socket, is_flipping: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if is_flipping and passed <= self._at < passed + len(data) and self._take():
                    place = self._at - passed
                    data = data[:place] + bytes([data[place] ^ 0x40]) + data[place + 1 :]
                passed += len(data)
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _take(self) -> bool:
        with self._lock:
            if self._left == 0:
                return False
            self._left -= 1
            self.flipped_count += 1
            return True
