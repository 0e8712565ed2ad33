"""Places for connections on a port that strangers reach: bounded, and whoever holds most of them gives way first.

Without it, connections that say nothing keep everybody else out for as long as they may be idle.
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
    line: socket.socket  # the same connection under a number of its own: TLS takes the first one's away
    idle_since_s: float
    is_busy: bool = False

    def cut(self) -> None:
        """End the TCP connection; the thread that serves it finds out."""
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
        """A place for ``sock``; when all are taken, the source that holds most loses its longest idle connection.

        False if it already has as many as one source may have, if all are busy, or if this process can open no more files: then
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
        """``sock`` is in the middle of an exchange, during which it keeps its place, or it waits for the next one."""
        with self._lock:
            place = self._places.get(sock)
            if place is not None:
                place.is_busy, place.idle_since_s = is_busy, time.monotonic()

    def leave(self, sock: socket.socket) -> None:
        """``sock`` needs its place no more."""
        with self._lock:
            place = self._places.pop(sock, None)
        if place is not None:
            place.line.close()

    def cut_idle(self, limit_s: float) -> None:
        """End connections that have been idle for ``limit_s``, however many places are left."""
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
