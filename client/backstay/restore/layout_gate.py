"""The layout gate: no rank goes on before all agree on what they loaded. Sends digests to the daemon; no collective.

Must end by its deadline, with the same reason on every rank.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from backstay.errors import BackstayError, IntegrityError, UnavailableError
from backstay.protocol import messages
from backstay.protocol.connection import DaemonConnection
from backstay.restore.gate_statements import MAX_DETAIL_NAMES, Statement

_log = logging.getLogger("backstay")

LEAST_DEADLINE_S: Final = 10.0  # for comparing, when loading took nearly all of restore()'s time
FAILURE_DEADLINE_S: Final = 10.0
MAX_ROUNDS: Final = 4
PAUSE_S: Final = 0.2

OnProgress = Callable[[messages.Progress], None]


class Gate:
    """One rank's part of one decision's gate.

    ``connection`` may be another one afterwards: a daemon that is restarted meanwhile is attached to again.
    """

    def __init__(
        self, connection: DaemonConnection, attach: messages.Attach, restored: messages.Restored, *, deadline_s: float
    ) -> None:
        self.connection = connection
        self._attach = dataclasses.replace(attach, attempt=restored.attempt)
        self._restored = restored
        self._deadline = time.monotonic() + max(LEAST_DEADLINE_S, deadline_s)

    def pass_with(self, statements: Sequence[Statement], on_progress: OnProgress) -> None:
        """Return when every rank has said the same; a daemon of a version without a gate lets everybody pass.

        Raises:
            IntegrityError: they differ, or a rank could not load (``gate_failed``). UnavailableError: no verdict in time.
        """
        if not self._restored.decision_id:
            return
        entries = tuple(statement.entry() for statement in statements)
        by_name = {statement.name: statement for statement in statements}
        details: dict[str, messages.GateDetail] = {}
        for _ in range(MAX_ROUNDS):
            message = messages.Gate(
                decision_id=self._restored.decision_id, entries=entries, details=tuple(details.values())
            )
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
        """Tell the other ranks that this one could not load, so that all raise now; never raises itself."""
        is_told = isinstance(error, BackstayError) and error.reason == "gate_failed"
        if is_told or not isinstance(error, Exception) or not self._restored.decision_id:
            return
        self._deadline = min(self._deadline, time.monotonic() + FAILURE_DEADLINE_S)
        failure = str(error) if isinstance(error, BackstayError) else f"{type(error).__name__}: {error}"
        try:
            self._ask(messages.Gate(decision_id=self._restored.decision_id, failure=failure[:500] or "?"), _ignore)
        except (BackstayError, OSError) as problem:
            _log.warning("backstay: the other ranks could not be told that this one did not load: %s", problem)

    def _ask(self, message: messages.Gate, on_progress: OnProgress) -> messages.GateAnswer:
        """One answer, from the next daemon if this one goes."""
        while True:
            left = max(0.1, self._deadline - time.monotonic())
            try:
                return self.connection.gate(dataclasses.replace(message, deadline_s=left), on_progress)
            except (UnavailableError, OSError) as error:
                is_final = isinstance(error, BackstayError) and error.reason == "deadline"
                if is_final or time.monotonic() + PAUSE_S >= self._deadline:
                    raise
            time.sleep(PAUSE_S)
            self._attach_again()

    def _attach_again(self) -> None:
        self.connection.close()
        left = max(0.1, min(5.0, self._deadline - time.monotonic()))
        connection = None
        try:
            connection = DaemonConnection(self.connection.socket_path, timeout_s=left)
            connection.attach(self._attach, deadline_s=left)
        except (UnavailableError, OSError):
            if connection is not None:
                connection.close()
            return
        except BaseException:
            if connection is not None:
                connection.close()
            raise
        self.connection = connection


def _ignore(_: messages.Progress) -> None:
    """Nobody waits for this."""
