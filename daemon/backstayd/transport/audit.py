"""Who asked the coordinator for what: a line in its log for every call of an operator, and for reads once a minute.

The logger is ``backstayd.audit``. Says what was asked and what came of it; must not decide whether it may.
"""

from __future__ import annotations

import logging
from typing import Any, Final

from backstay.errors import BackstayError, ConfigError
from backstayd.printable import printable
from backstayd.security.refusals import Damper
from backstayd.transport.access import certificate_of, host_of

logger = logging.getLogger("backstayd.audit")

READS: Final = frozenset({"GetStatus", "Locate"})
MAX_CHARACTERS: Final = 300


class Audit:
    """The lines of one coordinator. Bounded: of the same read by the same caller there is one line a minute."""

    def __init__(self, *, is_tls: bool) -> None:
        self._is_tls = is_tls
        self._reads = Damper()

    def note(self, context: Any, verb: str, about: str = "", *, error: BackstayError | None = None) -> None:
        """``about``: what the call named; ``error``: why it was refused."""
        outcome = "done" if error is None else f"refused ({error.reason or type(error).__name__})"
        subject = f"{verb} {about}".rstrip()[:MAX_CHARACTERS]
        line = printable(f"{subject} by {self._caller(context)} from {host_of(context)}: {outcome}")
        if verb not in READS or self._reads.due(line) is not None:
            logger.info("%s", line)

    def _caller(self, context: Any) -> str:
        if not self._is_tls:
            return "somebody (plaintext)"
        try:
            certificate = certificate_of(context)
        except ConfigError:  # refused before; there is nothing to name
            return "somebody unknown"
        return f"{', '.join(certificate.uris)} (serial {certificate.serial})"
