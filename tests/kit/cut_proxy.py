"""A TCP proxy whose line can be cut: existing connections go silent or are reset, and new ones are not forwarded.

Standard library only. Knows nothing of what it carries.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Self


class CutProxy:
    """Forwards to ``target`` while :attr:`is_cut` is false; while cut nothing passes, and nobody is told."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._open = threading.Event()
        self._open.set()
        self._is_closing = False
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listen = socket.create_server(("127.0.0.1", 0))
        self._start(self._accept)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listen.getsockname()[1]}"

    def cut(self) -> None:
        """From now on bytes stay where they are, as behind a switch that drops them."""
        self._open.clear()

    def mend(self) -> None:
        """Connections from before are reset, as their peers gave them up long ago; new ones pass."""
        self._shut(self._sockets)
        self._open.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closing = True
        self._open.set()
        self._shut([self._listen, *self._sockets])
        for thread in self._threads:
            thread.join(5)
        for sock in [self._listen, *self._sockets]:
            sock.close()

    def _shut(self, sockets: list[socket.socket]) -> None:
        for sock in list(sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while not self._is_closing:
                client, _ = self._listen.accept()
                self._sockets.append(client)
                self._start(self._connect, client)

    def _connect(self, client: socket.socket) -> None:
        self._open.wait()
        with contextlib.suppress(OSError):
            if self._is_closing:
                return
            server = socket.create_connection(self._target, timeout=5)
            server.settimeout(None)
            self._sockets.append(server)
            self._start(self._pump, client, server)
            self._pump(server, client)
            return
        self._shut([client])

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._open.wait()
                sink.sendall(data)
        self._shut([sink])
