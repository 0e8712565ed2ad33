"""The layout gate: no rank trains before all agree on what they loaded. Sends digests to the daemon; no collective.

Must end by its deadline, with the same reason on every rank.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Final

from backstay.errors import BackstayError, IntegrityError, UnavailableError
from backstay.protocol import messages
from backstay.protocol.connection import DaemonConnection, OnProgress
from backstay.restore.gate_statements import MAX_DETAIL_NAMES, Statement
from backstay.session.attach import attach, ignore, is_unavailable, retry

_log = logging.getLogger("backstay")

LEAST_DEADLINE_S: Final = 10.0  # for comparing, when loading took nearly all of restore()'s time
FAILURE_DEADLINE_S: Final = 10.0
ATTACH_S: Final = 5.0
MAX_ROUNDS: Final = 4


class LayoutGate:
    """One rank's part of one decision's gate.

    ``connection`` may be another one afterwards: a daemon that is restarted meanwhile is attached to again.
    """

    def __init__(
        self, connection: DaemonConnection, identity: messages.Attach, decision_id: str, *, deadline_s: float
    ) -> None:
        """``identity``: with the attempt that this world writes."""
        self.connection = connection
        self._identity, self._decision_id = identity, decision_id
        self._deadline = time.monotonic() + max(LEAST_DEADLINE_S, deadline_s)

    def pass_with(self, statements: Sequence[Statement], on_progress: OnProgress) -> None:
        """Return when every rank has stated the same.

        Raises:
            IntegrityError: they differ, or a rank could not load (``gate_failed``). UnavailableError: no verdict in time.
        """
        entries = tuple(statement.entry() for statement in statements)
        by_name = {statement.name: statement for statement in statements}
        details: dict[str, messages.GateDetail] = {}
        for _ in range(MAX_ROUNDS):
            message = messages.Gate(decision_id=self._decision_id, entries=entries, details=tuple(details.values()))
            answer = self._ask(message, on_progress)
            if answer.state == "passed":
                return
            if answer.state != "detail":
                break
            limit = MAX_DETAIL_NAMES // max(1, len(answer.entries) + len(details))
            details.update({name: by_name[name].detail(limit) for name in answer.entries if name in by_name})
        raise IntegrityError(
            f"{answer.message or 'the ranks could not be compared'}; no rank trains with what it loaded",
            reason="gate_failed",
        )

    def report_failure(self, error: BaseException) -> None:
        """Report to the other ranks that this one could not load, so that all raise now; never raises itself."""
        is_known = isinstance(error, BackstayError) and error.reason == "gate_failed"
        if is_known or not isinstance(error, Exception):
            return
        self._deadline = min(self._deadline, time.monotonic() + FAILURE_DEADLINE_S)
        failure = str(error) if isinstance(error, BackstayError) else f"{type(error).__name__}: {error}"
        try:
            self._ask(messages.Gate(decision_id=self._decision_id, failure=failure[:500] or "?"), ignore)
        except (BackstayError, OSError) as problem:
            _log.warning("backstay: the other ranks could not be informed that this one did not load: %s", problem)

    def _ask(self, message: messages.Gate, on_progress: OnProgress) -> messages.GateAnswer:
        """One answer, from the next daemon if this one goes."""
        failures: list[Exception] = []

        def attempt(left_s: float) -> messages.GateAnswer:
            if failures:
                self._attach_again(min(ATTACH_S, left_s))
            return self.connection.gate(dataclasses.replace(message, deadline_s=left_s), on_progress)

        return retry(attempt, deadline=self._deadline, is_passing=_is_passing, on_failure=failures.append)

    def _attach_again(self, timeout_s: float) -> None:
        self.connection.close()
        try:
            self.connection, _ = attach(
                self.connection.socket_path, self._identity, connect_s=timeout_s, attach_s=timeout_s
            )
        except (UnavailableError, OSError):
            return  # the connection is still closed, as the request will find


def _is_passing(error: Exception) -> bool:
    return is_unavailable(error) and getattr(error, "reason", "") != "deadline"
