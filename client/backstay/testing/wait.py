"""Waits for a condition with a deadline and a reason, instead of a bare sleep."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from backstay.errors import UnavailableError

T = TypeVar("T")


class DeadlineError(AssertionError):
    """A condition did not become true in time; the message says what was awaited and what was last seen."""


def wait_until(
    condition: Callable[[], T],
    *,
    deadline_s: float,
    why: str,
    evidence: Callable[[], str] | None = None,
    poll_s: float = 0.05,
) -> T:
    """Call ``condition`` until it returns something true, and return that.

    An UnavailableError out of ``condition`` counts as "not yet" (a daemon that is restarting refuses connections).

    Args:
        deadline_s: Seconds until giving up; ``condition`` is called at least once.
        why: What is awaited, completing the sentence "waited for ...".
        evidence: Called on failure only; its text (status, tails of logs) ends the message.

    Raises:
        DeadlineError: the condition stayed false.
    """
    deadline = time.monotonic() + deadline_s
    last = ""
    while True:
        try:
            value = condition()
            last = f"the condition was {value!r}"
        except UnavailableError as error:
            last = f"the last try failed: {error}"
        else:
            if value:
                return value
        if time.monotonic() >= deadline:
            break
        time.sleep(poll_s)
    text = f"waited {deadline_s:g} s for {why}, in vain: {last[:400]}"
    raise DeadlineError(text + (f"\n{evidence()}" if evidence is not None else ""))
