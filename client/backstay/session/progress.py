"""What restore() reports while it waits: to the log if it takes INFO, else to stderr of rank 0."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Final

from backstay.protocol import messages

_log = logging.getLogger("backstay")

REPEAT_S: Final = 60.0  # between two lines of one cause
MOVING_S: Final = 10.0  # the same while its numbers move


class Progress:
    """Reports what is waited for: at most one line a second, and one a minute for the same cause."""

    def __init__(self, rank: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rank, self._clock = rank, clock
        self._begin_s = self._written_s = clock()
        self._last, self._last_cause = "", ""

    def __call__(self, progress: messages.Progress) -> None:
        amount = f" {progress.done_bytes >> 20} of {progress.total_bytes >> 20} MiB" if progress.total_bytes else ""
        detail = f"{': ' if progress.detail else ''}{progress.detail}"
        self.report(f"{progress.phase}{amount}{detail}", cause=f"{progress.phase}{detail}")

    def report(self, text: str, *, cause: str = "") -> None:
        """Write ``text``, unless a line of the same ``cause`` (by default the text itself) was written a moment ago."""
        now, cause = self._clock(), cause or text
        pause_s = 1.0 if cause != self._last_cause else REPEAT_S if text == self._last else MOVING_S
        if now - self._written_s < pause_s:
            return
        self._written_s, self._last, self._last_cause = now, text, cause
        _write(f"backstay restore, rank {self._rank}, {now - self._begin_s:.0f} s: {text}", rank=self._rank)


def announce(run: str, restored: messages.Restored, *, rank: int) -> None:
    """Report what the run begins from, so that a mistyped run_id is seen where training was started."""
    why = f": {restored.message}" if restored.message else ""
    if restored.outcome != "NONE":
        what = f"backstay: restored step {restored.step} of {run} ({restored.outcome}), attempt {restored.attempt}"
    elif restored.attempt <= 1:
        what = f"backstay: new run {run}"
    else:
        what = f"backstay: new start of {run}, attempt {restored.attempt}"
    _write(what + why, rank=rank)


def _write(line: str, *, rank: int) -> None:
    if _log.isEnabledFor(logging.INFO):
        _log.info("%s", line)
    elif rank == 0:
        print(line, file=sys.stderr, flush=True)
