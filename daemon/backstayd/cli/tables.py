"""Aligned columns of text, times and durations for people, and JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from backstayd.printable import printable


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows under headers, columns two blanks apart, numbers right-aligned. No rows: ``(none)``."""
    if not rows:
        return "(none)"
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[column]) for line in [list(headers), *cells]) for column in range(len(headers))]
    is_number = [
        any(isinstance(row[column], (int, float)) for row in rows)
        and all(isinstance(row[column], (int, float)) or row[column] in (None, "") for row in rows)
        for column in range(len(headers))
    ]
    lines = []
    for line in [list(headers), *cells]:
        padded = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, is_number, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def as_json(value: Any) -> str:
    """Indented JSON in the order given; in ASCII, so that a terminal interprets nothing in it as a control sequence."""
    return json.dumps(value, indent=2)


def clock_time(time_unix_s: float) -> str:
    """Local time of day, ``14:03:07.512``."""
    moment = datetime.fromtimestamp(time_unix_s, tz=UTC).astimezone()
    return moment.strftime("%H:%M:%S.") + f"{moment.microsecond // 1000:03d}"


def date_time(time_unix_s: float) -> str:
    """Local date and time, ``2026-03-01 14:03``."""
    return datetime.fromtimestamp(time_unix_s, tz=UTC).astimezone().strftime("%Y-%m-%d %H:%M")


def duration(seconds: float) -> str:
    """``8.2 s``, ``3 min 20 s``, ``5 h 12 min`` or ``3 d 4 h``."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 72:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def _cell(value: object) -> str:
    if value is None or value == "":
        return "-"
    return printable(" ".join(str(value).split()))
