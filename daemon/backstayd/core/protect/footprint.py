"""How much memory a job's protection takes on a node, per byte of its state: the numbers admission goes by. Pure."""

from __future__ import annotations

from typing import Final

from backstayd.core.inventory.placement import group_count

PARITY_PLANS: Final = 2  # the parity of one snapshot stays until that of the next one protects as well


def slots_of(keep: int) -> int:
    """Slots of a rank: one for each snapshot that is kept, and one to write into."""
    return keep + 1


def parity_fraction(node_count: int, *, group_size: int, m: int) -> float:
    """m / k of the smallest group, which pays most per byte of state."""
    if node_count <= m or m == 0:
        return 0.0 if m == 0 else float(m)
    members = node_count // group_count(node_count, group_size=group_size, m=m)
    return m / (members - m)


def parity_room(size_bytes: int, fraction: float) -> int:
    """Bytes to have free for parity of a shard of ``size_bytes`` before its slots are given."""
    return int(PARITY_PLANS * fraction * size_bytes)


def admission_bytes(size_bytes: int, *, keep: int, fraction: float) -> int:
    """All that a node must have free before training starts, per ``size_bytes`` of state on it."""
    return slots_of(keep) * size_bytes + parity_room(size_bytes, fraction)
