"""Connections that never became calls: gRPC's servers hear nothing of handshakes that fail, so they are counted.

A handshake that is begun and followed by no call within PATIENCE_S came to nothing: the certificate was refused on one
side, or the other side speaks no TLS. Which, the other side's log says.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Final

logger = logging.getLogger(__name__)

PATIENCE_S: Final = 10.0
AGAIN_S: Final = 60.0
MAX_KNOWN: Final = 4096


class Handshakes:
    """Safe for threads; bounded."""

    def __init__(self) -> None:
        self._open: deque[float] = deque(maxlen=MAX_KNOWN)
        self._peers: set[str] = set()
        self._lost = 0
        self._said_s = float("-inf")
        self._lock = threading.Lock()

    def note_begun(self) -> None:
        """A client has connected."""
        now = time.monotonic()
        with self._lock:
            self._open.append(now)
            while now - self._open[0] > PATIENCE_S:
                self._open.popleft()
                self._lost += 1
            if not self._lost or now - self._said_s < AGAIN_S:
                return
            lost, self._lost, self._said_s = self._lost, 0, now
        logger.warning(
            "%d connections ended before a call: a certificate was refused (expired, or of another authority), or TLS is not "
            "spoken there; the log of the other side says which",
            lost,
        )

    def note_call(self, peer: str) -> None:
        """``peer``, with its port, makes a call: its certificate was accepted."""
        with self._lock:
            if peer in self._peers:
                return
            if len(self._peers) >= MAX_KNOWN:
                self._peers.clear()
            self._peers.add(peer)
            if self._open:
                self._open.popleft()
