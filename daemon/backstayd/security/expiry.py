"""Keeps an eye on a daemon's certificate: when it ends, for the metrics and, once it matters, in the log. Stops nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from backstayd.security.credentials import Credentials, utc

logger = logging.getLogger(__name__)

SOON_S: Final = 7 * 86400.0
AGAIN_S: Final = 3600.0


class ExpiryWatch:
    """Call :meth:`look` every now and then; without credentials it does nothing.

    Args:
        export: Given the name of a certificate and the Unix time at which it ends.
    """

    def __init__(self, credentials: Credentials | None, export: Callable[[str, float], None]) -> None:
        self._credentials = credentials
        self._export = export
        self._said_s = float("-inf")
        self._said = ""

    def look(self) -> None:
        """Read the files again if they changed, export the ends, complain at most hourly."""
        if self._credentials is None:
            return
        material = self._credentials.current()
        self._export("own", material.not_after_unix_s)
        self._export("authority", material.ca_not_after_unix_s)
        text, now = self._complaint(), time.monotonic()
        if text and (text != self._said or now - self._said_s >= AGAIN_S):
            logger.log(logging.ERROR if self._credentials.validity_problem() else logging.WARNING, "%s", text)
            self._said_s = now
        self._said = text

    def _complaint(self) -> str:
        assert self._credentials is not None
        problem = self._credentials.validity_problem()
        if problem:
            return f"{problem}; peers refuse it. Renew it: the files are looked at every second, no restart is needed"
        material = self._credentials.current()
        ends = {"certificate": material.not_after_unix_s, "authority (tls_ca)": material.ca_not_after_unix_s}
        soon = [f"{what} ends at {utc(end)}" for what, end in ends.items() if end - time.time() < SOON_S]
        return f"of {material.identity} the {' and the '.join(soon)}" if soon else ""
