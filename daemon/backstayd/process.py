"""A daemon as a process of its machine: signals, the service manager, the watchdog, reloading settings.

Knows nothing of what the daemon does. SIGTERM and SIGINT end it, SIGHUP reloads it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import logging
import os
import resource
import signal
from collections.abc import AsyncIterator, Callable
from typing import Final

from backstay.errors import BackstayError
from backstayd.telemetry.health import PULSE_S, Health, pulse
from backstayd.telemetry.systemd import EXTENSION_S, ServiceManager

logger = logging.getLogger(__name__)

WATCHDOG_SHARE: Final = 3  # beats per watchdog period
MCL_CURRENT: Final = 1
MCL_FUTURE: Final = 2
MCL_ONFAULT: Final = 4


class DaemonProcess:
    """Create it first in the daemon's loop: from then on signals are handled, however long the start takes."""

    def __init__(self) -> None:
        self._manager = ServiceManager(os.environ)
        self._stop, self._reload = asyncio.Event(), asyncio.Event()
        self._failure: BackstayError | None = None
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload.set)
        faulthandler.enable()  # the watchdog's SIGABRT leaves a stack of every thread in the journal
        _stay_in_memory()

    @contextlib.asynccontextmanager
    async def starting(self, status: str) -> AsyncIterator[None]:
        """While this is open, the service manager keeps extending the start timeout."""
        extending = asyncio.create_task(self._extend(status))
        try:
            yield
        finally:
            extending.cancel()
            await asyncio.gather(extending, return_exceptions=True)

    def give_up(self, error: BackstayError) -> None:
        """Stop as at SIGTERM, with ``error`` as the reason: this daemon can no longer do its work."""
        self._failure = self._failure or error
        self._stop.set()

    async def serve(self, health: Health, *, status: Callable[[], str], reload: Callable[[], str]) -> None:
        """Report readiness and feed the watchdog until SIGTERM or SIGINT.

        Args:
            health: While it is alive, the watchdog is fed.
            status: The daemon's state in one sentence.
            reload: Called at SIGHUP; returns the outcome in one sentence, raises BackstayError if nothing changed.

        Raises:
            BackstayError: the one that :meth:`give_up` was called with.
        """
        self._manager.ready(status())
        period_s = min(PULSE_S, self._manager.watchdog_s / WATCHDOG_SHARE or PULSE_S)
        tasks = [
            asyncio.create_task(pulse(health, period_s=period_s, on_beat=lambda: self._feed(health, status))),
            asyncio.create_task(self._reload_when_asked(status, reload)),
        ]
        try:
            await self._stop.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            why = f"stopping: {self._failure}" if self._failure is not None else "stopping; snapshots stay in memory"
            health.set_unready(why)
            self._manager.stopping(why)
        if self._failure is not None:
            raise self._failure

    def _feed(self, health: Health, status: Callable[[], str]) -> None:
        why = health.not_alive()
        if why:
            logger.error("not alive: %s", why)
        else:
            self._manager.alive(status())

    async def _reload_when_asked(self, status: Callable[[], str], reload: Callable[[], str]) -> None:
        while True:
            await self._reload.wait()
            self._reload.clear()
            self._manager.reloading()
            try:
                logger.info("SIGHUP: %s", reload())
            except BackstayError as error:
                logger.error("SIGHUP: settings not reloaded: %s", error)
            except Exception:  # the boundary of a reload: the daemon keeps running with the settings it has
                logger.exception("SIGHUP: settings not reloaded")
            self._manager.ready(status())

    async def _extend(self, status: str) -> None:
        while True:
            self._manager.extend(status)
            await asyncio.sleep(EXTENSION_S / 3)


def _stay_in_memory() -> None:
    """Lock this process in memory as it grows, where the limit allows all of it: a trainer that takes all memory must not make
    heartbeats wait for a disk. With a limit in between, later mappings would fail: then nothing is locked."""
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) != 0:
        logger.warning(
            "cannot lock the daemon's memory: %s; under memory pressure heartbeats may be late",
            os.strerror(ctypes.get_errno()),
        )
