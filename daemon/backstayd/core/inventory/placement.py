"""Groups over the nodes of a job: equal sizes, failure domains spread. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence


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


def natural(name: str) -> tuple[object, ...]:
    """Sort key under which node-2 comes before node-10."""
    parts: list[object] = []
    digits = ""
    for character in name + "\0":
        if character.isdecimal():
            digits += character
            continue
        if digits:
            parts.append((1, int(digits), ""))
            digits = ""
        parts.append((0, 0, character))
    return tuple(parts)


def widest_domain(group: Sequence[str], domain_of: Mapping[str, str]) -> int:
    """Nodes of the group that fall together if one domain does."""
    counts = Counter(domain_of[name] or f"\0{name}" for name in group)
    return max(counts.values(), default=0)
