"""Logging set-up of the daemons: text for people or one JSON object per line, on stderr; standard library only.

Messages are complete sentences; structured values come through ``extra``. A text record is one line, and lines of a traceback
are indented, so that text from outside cannot pass for a record. Must not know anything else of backstay.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, Final, TextIO

from backstayd.printable import printable

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class _Formatter(logging.Formatter):
    def __init__(self, component: str) -> None:
        super().__init__()
        self.component = component


class TextFormatter(_Formatter):
    """``2026-11-21T03:42:45.123Z WARNING node-03 backstayd.node.store: sentence key=value``."""

    def format(self, record: logging.LogRecord) -> str:
        extra = "".join(f" {key}={value}" for key, value in _extra(record).items())
        message = printable(record.getMessage() + extra)
        text = f"{_timestamp(record)} {record.levelname} {self.component} {record.name}: {message}"
        if record.exc_info:
            text += "".join(f"\n  {printable(line)}" for line in self.formatException(record.exc_info).split("\n"))
        return text


class JsonFormatter(_Formatter):
    """One JSON object per line: time, level, component, logger, message, and every ``extra`` value."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _timestamp(record),
            "level": record.levelname.lower(),
            "component": self.component,
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(*, level: str, form: str, component: str, stream: TextIO | None = None) -> None:
    """Send the root logger's records to ``stream`` (stderr); replaces the earlier configuration.

    Args:
        level: ``debug``, ``info``, ``warning`` or ``error``.
        form: ``text`` or ``json``.
        component: Who logs, such as ``node node-03``.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(component) if form == "json" else TextFormatter(component))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def in_force() -> tuple[str, str, str]:
    """Level, form and component of the last :func:`configure`, for a child process that should log likewise."""
    root = logging.getLogger()
    for handler in root.handlers:
        if isinstance(handler.formatter, _Formatter):
            form = "json" if isinstance(handler.formatter, JsonFormatter) else "text"
            return logging.getLevelName(root.level).lower(), form, handler.formatter.component
    return "info", "text", "backstayd"


def _timestamp(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}
