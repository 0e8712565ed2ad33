"""Attaching to the daemon, and the one loop that tries again while something is unavailable."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

from backstay.errors import UnavailableError
from backstay.protocol import messages
from backstay.protocol.connection import DaemonConnection

T = TypeVar("T")

RETRY_S: Final = 0.2
MIN_LEFT_S: Final = 0.1  # what an attempt is given, however late it begins


def attach(
    socket_path: str, message: messages.Attach, *, connect_s: float, attach_s: float
) -> tuple[DaemonConnection, messages.Attached]:
    """An attached connection; one that cannot attach is closed.

    Raises:
        UnavailableError: no daemon listens, or it does not answer in time. StaleGenerationError: the world is over.
        ConfigError: the socket is not usable, or the daemon's protocol is another.
    """
    connection = DaemonConnection(socket_path, timeout_s=connect_s)
    try:
        return connection, connection.attach(message, deadline_s=attach_s)
    except BaseException:
        connection.close()
        raise


def is_unavailable(error: Exception) -> bool:
    return isinstance(error, (UnavailableError, OSError))


def ignore(_: object) -> None:
    """A callback that does nothing."""


def retry(
    attempt: Callable[[float], T],
    *,
    deadline: float,
    pause_s: float = RETRY_S,
    is_passing: Callable[[Exception], bool] = is_unavailable,
    on_failure: Callable[[Exception], None] = ignore,
) -> T:
    """The result of ``attempt(left_s)``, which is called until it succeeds.

    Args:
        deadline: A time of ``time.monotonic``; an error that leaves no time for another attempt is raised.
        is_passing: Whether waiting may cure an error; any other is raised at once.
        on_failure: Called with each error after which another attempt is made.
    """
    while True:
        try:
            return attempt(max(MIN_LEFT_S, deadline - time.monotonic()))
        except Exception as error:
            if not is_passing(error) or time.monotonic() + pause_s >= deadline:
                raise
            on_failure(error)
        time.sleep(pause_s)
