"""One finding of `backstay doctor`: level, subject and details."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Level(enum.StrEnum):
    OK = "OK"
    WARN = "WARN"  # works, but not as well as it could
    FAIL = "FAIL"  # will not work as promised


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """``detail`` says what was found, with numbers, and for WARN and FAIL the consequence or what to do."""

    level: Level
    subject: str
    detail: str


def ok(subject: str, detail: str) -> Finding:
    return Finding(level=Level.OK, subject=subject, detail=detail)


def warn(subject: str, detail: str) -> Finding:
    return Finding(level=Level.WARN, subject=subject, detail=detail)


def fail(subject: str, detail: str) -> Finding:
    return Finding(level=Level.FAIL, subject=subject, detail=detail)
