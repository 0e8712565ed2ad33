"""What SIGTERM of a job means for its state: a durable copy is asked for, then whatever the signal did before happens.

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
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from backstay.capture.background import Session

_log = logging.getLogger("backstay")

GRACE_S: Final = 2.0  # for the daemon to be told, if the signal then ends the process


class SigtermHook:
    """The installed handler; :meth:`remove` puts the former one back, unless somebody else installed another since."""

    def __init__(self, session: Callable[[], Session | None]) -> None:
        """``session`` gives the session of the moment, whose ``persist`` asks for the copy.

        Signals belong to the main thread: called in another, this warns and does nothing.
        """
        self._session = session
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
            session = self._session()
            if session is not None and os.getpid() == self._pid:
                session.persist(GRACE_S if is_deadly else 0.0)
        finally:
            if callable(self._former):
                self._former(number, frame)
            elif is_deadly:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
