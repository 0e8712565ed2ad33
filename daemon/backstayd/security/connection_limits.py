"""Limits the connections on a port that strangers can reach: when it is full, the source with most connections loses one.

Without this limit, silent connections would lock out everybody else for as long as they may stay idle.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass


@dataclass(slots=True)
class _Place:
    source: str
    line: socket.socket  # a duplicate descriptor of the connection: TLS detaches the first one
    idle_since_s: float
    is_busy: bool = False

    def cut(self) -> None:
        """Shut the TCP connection down; the thread that serves it notices."""
        with contextlib.suppress(OSError):
            self.line.shutdown(socket.SHUT_RDWR)
        self.line.close()


class Places:
    """At most ``limit`` connections, ``per_source`` of one source (0: no such limit). Safe for threads.

    Invariant: a new source gets a place as long as one connection is idle, whoever holds it.
    """

    def __init__(self, limit: int, *, per_source: int = 0) -> None:
        self._limit, self._per_source = limit, per_source
        self._places: dict[socket.socket, _Place] = {}
        self._lock = threading.Lock()

    def take(self, sock: socket.socket, source: str) -> bool:
        """Admit ``sock``; when all places are taken, the source that holds most loses its longest idle connection.

        False if the source already has its maximum, if all connections are busy, or if this process is out of files: then
        the caller closes ``sock``.
        """
        try:
            line = sock.dup()
        except OSError:
            return False
        if self._enter(sock, _Place(source, line, time.monotonic())):
            return True
        line.close()
        return False

    def _enter(self, sock: socket.socket, place: _Place) -> bool:
        with self._lock:
            counts = Counter(one.source for one in self._places.values())
            if self._per_source and counts[place.source] >= self._per_source:
                return False
            if len(self._places) >= self._limit and not self._evict(counts):
                return False
            self._places[sock] = place
            return True

    def set_busy(self, sock: socket.socket, *, is_busy: bool) -> None:
        """Mark ``sock`` as in the middle of an exchange, during which it keeps its place, or as waiting for the next one."""
        with self._lock:
            place = self._places.get(sock)
            if place is not None:
                place.is_busy, place.idle_since_s = is_busy, time.monotonic()

    def leave(self, sock: socket.socket) -> None:
        """Release the place of ``sock``."""
        with self._lock:
            place = self._places.pop(sock, None)
        if place is not None:
            place.line.close()

    def cut_idle(self, limit_s: float) -> None:
        """Close connections that have been idle for ``limit_s``, even if places are free."""
        now = time.monotonic()
        with self._lock:
            due = [sock for sock, one in self._places.items() if not one.is_busy and now - one.idle_since_s >= limit_s]
            for sock in due:
                self._places.pop(sock).cut()

    def _evict(self, counts: Counter[str]) -> bool:
        idle = [sock for sock, place in self._places.items() if not place.is_busy]
        if not idle:
            return False
        greediest = max(idle, key=lambda sock: (counts[self._places[sock].source], -self._places[sock].idle_since_s))
        self._places.pop(greediest).cut()
        return True
