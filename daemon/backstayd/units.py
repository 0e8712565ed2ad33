"""Sizes in bytes as people write and read them: ``8GiB``, ``1.5 GiB``."""

from __future__ import annotations

import re
from typing import Any, Final

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTP]i?B|B)?\Z")
_UNITS: Final = {"B": 1} | {
    f"{letter}{infix}B": base**power
    for infix, base in (("i", 1024), ("", 1000))
    for power, letter in enumerate("KMGTP", start=1)
}


def parse_size(value: Any) -> int:
    """Bytes from ``8GiB``, ``500 MB`` or a plain number; raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.match(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("is not a size such as 8GiB, 500MB or a number of bytes")
    size = float(match[1]) * _UNITS[match[2] or "B"]
    if size == float("inf"):
        raise ValueError("is more than any machine has")
    return int(size)


def format_size(size_bytes: float) -> str:
    """A size for people, in binary units with one decimal: ``1.5 GiB``."""
    amount = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(amount) < 1024 or unit == "TiB":
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    raise AssertionError("unreachable")
