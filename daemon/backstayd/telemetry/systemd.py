"""Notifications to the service manager (the protocol of sd_notify(3)): ready, alive, reloading, stopping, and a status line.

Without ``NOTIFY_SOCKET`` nothing is sent. Must never block or end the daemon: a message that cannot be sent is sent with the
next one.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping
from typing import Final

logger = logging.getLogger(__name__)

EXTENSION_S: Final = 60.0
STATUS_LIMIT: Final = 400  # characters; systemctl shows one line


class ServiceManager:
    """Messages to the manager that started this process, one datagram each.

    Args:
        environ: ``NOTIFY_SOCKET`` (a path, or ``@`` and an abstract name), ``WATCHDOG_USEC``, ``WATCHDOG_PID``.

    Attributes:
        watchdog_s: The period within which this process must report that it is alive; 0: it need not.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        name = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + name[1:] if name.startswith("@") else name
        self._unsent: dict[str, str] = {}
        self._status = ""
        usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
        is_ours = self._address != "" and usec.isdecimal() and pid in ("", str(os.getpid()))
        self.watchdog_s = int(usec) / 1e6 if is_ours else 0.0

    def ready(self, status: str) -> None:
        """Everything is served; also ends a reload."""
        self._status = status[:STATUS_LIMIT]
        for name in ("RELOADING", "EXTEND_TIMEOUT_USEC"):
            self._unsent.pop(name, None)
        self._send(READY="1", STATUS=self._status)

    def alive(self, status: str) -> None:
        """Feed the watchdog; ``status`` is sent when it changed."""
        status = status[:STATUS_LIMIT]
        fields = {"STATUS": status} if status != self._status else {}
        self._status = status
        if self.watchdog_s:
            fields["WATCHDOG"] = "1"
        if fields or self._unsent:
            self._send(**fields)

    def extend(self, status: str) -> None:
        """Starting or stopping takes longer: have the manager wait ``EXTENSION_S`` from now."""
        self._send(EXTEND_TIMEOUT_USEC=str(int(EXTENSION_S * 1e6)), STATUS=status)

    def reloading(self) -> None:
        """The settings are being read again; :meth:`ready` ends it."""
        self._send(RELOADING="1", MONOTONIC_USEC=str(time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000))

    def stopping(self, status: str) -> None:
        """The daemon is stopping."""
        self._send(STOPPING="1", STATUS=status)

    def _send(self, **fields: str) -> None:
        if not self._address:
            return
        self._unsent |= {name: value.replace("\n", " ") for name, value in fields.items()}
        message = "".join(f"{name}={value}\n" for name, value in self._unsent.items()).encode()
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
                sock.sendto(message, self._address)
        except (OSError, ValueError) as error:
            logger.debug("cannot notify the service manager at %r: %s", self._address, error)
        else:
            self._unsent = {}
