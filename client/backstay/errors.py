"""The error tree: the class names who must act, ``reason`` what happened.

One table maps class to exit code, retryability and (in ``backstayd.transport``) gRPC code.
Shared by the trainer, the daemon and the command line; must import nothing but the standard library.
"""

from __future__ import annotations

from typing import ClassVar


class BackstayError(Exception):
    """Base of every error backstay raises on purpose.

    Args:
        message: What failed, which one, the numbers, what happens next.
        reason: A stable snake_case code for programs, such as ``"no_daemon"``.
    """

    exit_code: ClassVar[int] = 1
    is_retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or _snake_case(type(self).__name__.removesuffix("Error"))


class ConfigError(BackstayError):
    """The operator must change configuration or the machine (EX_CONFIG)."""

    exit_code = 78


class UsageError(BackstayError):
    """The caller used the API or the command line wrongly (EX_USAGE)."""

    exit_code = 64


class UnavailableError(BackstayError):
    """A daemon, peer or coordinator did not answer in time; trying again may help (EX_UNAVAILABLE)."""

    exit_code = 69
    is_retryable = True


class CapacityError(BackstayError):
    """Memory, quota or tmpfs does not hold what was asked for (EX_CANTCREAT)."""

    exit_code = 73


class StaleGenerationError(BackstayError):
    """The sender belongs to an older world or coordinator and must stop acting (EX_NOPERM)."""

    exit_code = 77


class SnapshotNotFoundError(BackstayError):
    """No snapshot, run or shard of that name is known (EX_NOINPUT)."""

    exit_code = 66


class IntegrityError(BackstayError):
    """Bytes did not match their digest, identity or layout; they were not used (EX_DATAERR)."""

    exit_code = 65


class UnrecoverableError(BackstayError):
    """More was lost than the redundancy covers; the message names what is missing and what could still be restored."""

    exit_code = 74


class InvariantError(BackstayError):
    """A mistake of backstay's own (EX_SOFTWARE)."""

    exit_code = 70


ERROR_CLASSES: dict[str, type[BackstayError]] = {
    cls.__name__: cls
    for cls in (
        BackstayError,
        ConfigError,
        UsageError,
        UnavailableError,
        CapacityError,
        StaleGenerationError,
        SnapshotNotFoundError,
        IntegrityError,
        UnrecoverableError,
        InvariantError,
    )
}


def _snake_case(name: str) -> str:
    return "".join("_" + c.lower() if c.isupper() else c for c in name).lstrip("_")
