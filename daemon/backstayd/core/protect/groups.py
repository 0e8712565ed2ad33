"""Groups over the nodes of a job, with failure domains spread, and the memory that protection takes on each node. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from backstayd.core.inventory.nodes import natural

PARITY_PLANS: Final = 2  # the parity of one snapshot stays until that of the next one protects as well


def group_count(node_count: int, *, group_size: int, m: int) -> int:
    """max(1, round(N / group_size)), but never so many that a group could not hold m parity fragments beside data."""
    return max(1, min(int(node_count / group_size + 0.5), node_count // (m + 1)))


def form_groups(domain_of: Mapping[str, str], *, group_size: int, m: int) -> tuple[tuple[str, ...], ...]:
    """Split nodes (name to domain) in groups whose sizes differ by at most one.

    Nodes of one domain are dealt out one group after another, so no group gets more of a domain than it must. An empty
    domain means that a node is a domain of its own.
    """
    groups = group_count(len(domain_of), group_size=group_size, m=m)
    sizes = Counter(domain for domain in domain_of.values() if domain)
    order = sorted(domain_of, key=lambda name: (-sizes.get(domain_of[name], 1), domain_of[name], natural(name)))
    return tuple(tuple(sorted(order[first::groups], key=natural)) for first in range(groups))


def widest_domain(group: Sequence[str], domain_of: Mapping[str, str]) -> int:
    """Nodes of the group that fall together if one domain does."""
    counts = Counter(domain_of[name] or f"\0{name}" for name in group)
    return max(counts.values(), default=0)


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
