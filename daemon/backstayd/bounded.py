"""Tables that must not grow without limit."""

from __future__ import annotations

from typing import Any


def drop_oldest(table: dict[Any, Any], limit: int) -> None:
    """Keep the newest ``limit`` entries of ``table``, by the order in which they were added."""
    while len(table) > limit:
        del table[next(iter(table))]
