"""Counts TLS handshakes that never became calls, because gRPC servers are not notified of failed handshakes.

A handshake that is followed by no call within PATIENCE_S has failed: one side rejected the other's certificate, or the peer
does not speak TLS. The peer's log says which.
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
        self._logged_s = float("-inf")
        self._lock = threading.Lock()

    def note_begun(self) -> None:
        """A client connected."""
        now = time.monotonic()
        with self._lock:
            self._open.append(now)
            while now - self._open[0] > PATIENCE_S:
                self._open.popleft()
                self._lost += 1
            if not self._lost or now - self._logged_s < AGAIN_S:
                return
            lost, self._lost, self._logged_s = self._lost, 0, now
        logger.warning(
            "%d connections ended before a call: a certificate was rejected (expired, or of another authority), or the peer "
            "does not speak TLS; the peer's log says which",
            lost,
        )

    def note_call(self, peer: str) -> None:
        """``peer``, with its port, made a call: its certificate was accepted."""
        with self._lock:
            if peer in self._peers:
                return
            if len(self._peers) >= MAX_KNOWN:
                self._peers.clear()
            self._peers.add(peer)
            if self._open:
                self._open.popleft()
