"""On SIGTERM, requests a durable copy of the state, then does what the signal did before.

Opt-in. Must not swallow the signal, nor hold the process longer than ``GRACE_S``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

_log = logging.getLogger("backstay")

GRACE_S: Final = 2.0  # for the request to reach the daemon, if the signal then ends the process


class SigtermHook:
    """The installed handler; :meth:`remove` puts the former one back, unless somebody else installed another since."""

    def __init__(self, persist: Callable[[float], object]) -> None:
        """``persist(timeout_s)`` asks for the copy and waits that long for the daemon to have the request.

        Signals belong to the main thread: called in another, this warns and does nothing.
        """
        self._persist = persist
        self._pid = os.getpid()
        self._former: Any = None
        self._is_installed = False
        if threading.current_thread() is not threading.main_thread():
            _log.warning(
                "backstay: persist_on_sigterm works only where restore() is called in the main thread; it is off"
            )
            return
        self._former = signal.signal(signal.SIGTERM, self._on_signal)
        self._is_installed = True

    def remove(self) -> None:
        if self._is_installed and threading.current_thread() is threading.main_thread():
            self._is_installed = False
            if signal.getsignal(signal.SIGTERM) == self._on_signal:
                with contextlib.suppress(TypeError, ValueError):
                    signal.signal(signal.SIGTERM, self._former)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        is_deadly = self._former in (signal.SIG_DFL, None)
        try:
            if os.getpid() == self._pid:
                self._persist(GRACE_S if is_deadly else 0.0)
        finally:
            if callable(self._former):
                self._former(number, frame)
            elif is_deadly:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
