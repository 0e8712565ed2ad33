"""Lists, counts and amounts in sentences for people. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MAX_COUNTED = 32  # beyond that a sentence gives the number and the first few


def listed(items: Iterable[object]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    words = [str(item) for item in items]
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def amount(count: int, singular: str) -> str:
    """``1 node`` or ``3 nodes``."""
    return f"{count} {singular}{'' if count == 1 else 's'}"


def any_nodes(count: int) -> str:
    """So many nodes of a group, whichever they are."""
    return f"any {'node' if count == 1 else amount(count, 'node')} of a group"


def counted(items: Sequence[object], singular: str) -> str:
    """``rank 3``, ``ranks 3, 4 and 5`` or ``4096 ranks (0, 1, 2, ...)``."""
    if len(items) > MAX_COUNTED:
        return f"{len(items)} {singular}s ({', '.join(str(item) for item in items[:3])}, ...)"
    return f"{singular}{'' if len(items) == 1 else 's'} {listed(items)}"
