"""The bandwidth cap of a node: one bucket for all uploads of this process, which runs every upload of its node.

Knows time and bytes, not what is sent.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

BURST_S = 0.25  # so much of a second may be sent at once after a pause


class TokenBucket:
    """Bytes that may be sent; filled at the rate last set. Threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ready_s = 0.0  # when everything that was taken so far will have been paid for

    def take(self, size_bytes: int, rate: int, *, pause: Callable[[float], None]) -> None:
        """Wait until ``size_bytes`` may be sent at ``rate`` bytes a second; 0: at once.

        Args:
            pause: waits that many seconds, or raises to give up.
        """
        if rate <= 0:
            return
        with self._lock:
            now_s = time.monotonic()
            begin_s = max(self._ready_s, now_s - BURST_S)
            self._ready_s = begin_s + size_bytes / rate
        pause(max(0.0, self._ready_s - size_bytes / rate - now_s))


BUCKET = TokenBucket()
