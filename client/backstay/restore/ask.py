"""Asking the daemon for the world's decision, until there is one or the deadline has passed. Loads nothing."""

from __future__ import annotations

import logging
import sys
import time

from backstay import local
from backstay.control import DaemonConnection
from backstay.errors import IntegrityError, UnavailableError

_log = logging.getLogger("backstay")


def ask(
    socket_path: str, attach: local.Attach, *, allow_fresh: bool, deadline_s: float
) -> tuple[DaemonConnection, local.Attached, local.Restored, list[int]]:
    """Attach and wait for the decision, again and again until the deadline while the daemon is unavailable.

    Returns:
        The open connection, its Attached, the decision, and the shards' descriptors, which the caller closes.
    """
    deadline = time.monotonic() + deadline_s
    progress = Progress(attach.rank)
    while True:
        left = deadline - time.monotonic()
        connection = None
        try:
            connection = DaemonConnection(socket_path, timeout_s=min(5.0, max(0.1, left)))
            attached = connection.attach(attach, deadline_s=min(10.0, max(0.1, left)))
            request = local.Restore(allow_fresh=allow_fresh, deadline_s=max(0.1, left), world_size=attach.world_size)
            restored, fds = connection.restore(request, progress)
            if not isinstance(restored, local.Restored):
                raise IntegrityError("the snapshot was written in another layout", reason="layout_mismatch")
            return connection, attached, restored, list(fds)
        except BaseException as error:
            if connection is not None:
                connection.close()
            is_final = not isinstance(error, (UnavailableError, OSError)) or time.monotonic() + 0.2 >= deadline
            if is_final and isinstance(error, OSError):
                raise UnavailableError(f"{socket_path}: {error}; restore() gives up after {deadline_s:g} s") from error
            if is_final:
                raise
            progress.say(f"daemon at {socket_path} is not available ({error}); trying again for {left:.0f} s")
            _pause(0.2)


class Progress:
    """Says once a second what is being waited for: to the log if someone listens, else rank 0 to stderr."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._begin_s = time.monotonic()
        self._said_s = self._begin_s
        self._last = ""

    def __call__(self, progress: local.Progress) -> None:
        amount = f" {progress.done_bytes >> 20} of {progress.total_bytes >> 20} MiB" if progress.total_bytes else ""
        self.say(f"{progress.phase}{amount}{': ' if progress.detail else ''}{progress.detail}")

    def say(self, text: str) -> None:
        now = time.monotonic()
        if now - self._said_s < 1.0 or (text == self._last and now - self._said_s < 10.0):
            return
        self._said_s, self._last = now, text
        line = f"backstay restore, rank {self._rank}, {now - self._begin_s:.0f} s: {text}"
        if _log.isEnabledFor(logging.INFO):
            _log.info("%s", line)
        elif self._rank == 0:
            print(line, file=sys.stderr, flush=True)


def _pause(seconds: float) -> None:
    time.sleep(seconds)
