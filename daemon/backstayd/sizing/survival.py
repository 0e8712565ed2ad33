"""Which losses a protection survives. Nodes form groups; a group that loses more than ``m`` nodes at once loses state.

Pair copies (GEMINI's group placement with two replicas, lm-resiliency) are groups of two with m = 1; XOR parity (RAIM5, SCR)
is m = 1 over more nodes. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from backstayd.core.protect.groups import form_groups, widest_domain

UNIFORM_TERMS = 200_000  # of the series of :func:`survive_window`; windows of years need fewer


def group_sizes(node_count: int, *, group_size: int, m: int) -> tuple[int, ...]:
    """Sizes of the groups that the coordinator forms of ``node_count`` nodes (its own rule, ``core/placement``)."""
    names = {f"n{index}": "" for index in range(node_count)}
    return tuple(len(group) for group in form_groups(names, group_size=group_size, m=m))


def survive_losses(sizes: Sequence[int], m: int, losses: int) -> float:
    """Probability that ``losses`` nodes, any set of them equally likely, fail at once and no state is lost.

    With n_g nodes in group g and N in all: the coefficient of x^f in prod_g sum_{j<=m} C(n_g, j) x^j, over C(N, f). For
    pairs it is GEMINI's formula (its check: N = 16, two replicas, two losses: 0.9333).
    """
    node_count = sum(sizes)
    if not 0 <= losses <= node_count:
        return 0.0
    ways = [1]
    for size in sizes:
        bearable = [math.comb(size, lost) for lost in range(min(m, size) + 1)]
        product = [0] * min(len(ways) + len(bearable) - 1, losses + 1)
        for first, one in enumerate(ways):
            for second, other in enumerate(bearable[: len(product) - first]):
                product[first + second] += one * other
        ways = product
    return ways[losses] / math.comb(node_count, losses) if losses < len(ways) else 0.0


def survive_window(sizes: Sequence[int], m: int, *, rate_per_s: float, repair_s: float, window_s: float) -> float:
    """Probability that no group of these sizes ever misses more than ``m`` nodes at once in ``window_s``.

    Each present node fails at ``rate_per_s``; each missing one is replaced after an exponential time of mean ``repair_s``,
    all in parallel.
    """
    log_survived = 0.0
    for size in set(sizes):
        loss = _lose_window(size, m, rate_per_s=rate_per_s, repair_s=repair_s, window_s=window_s)
        log_survived += sizes.count(size) * _log_survived(loss)
    return math.exp(log_survived)


def _lose_window(size: int, m: int, *, rate_per_s: float, repair_s: float, window_s: float) -> float:
    """Probability that one group misses more than ``m`` nodes at once, however small: only positive terms are summed.

    The birth-death chain over 0..m missing nodes, m + 1 absorbing, by uniformization: loss = sum_k Poisson(k; LT) * A_k,
    where A_k is the probability of absorption after k jumps of the chain at rate L.
    """
    if rate_per_s <= 0 or window_s <= 0 or m >= size:
        return 0.0
    repair = 1.0 / max(repair_s, 1e-9)
    up = [(size - away) * rate_per_s for away in range(m + 1)]
    down = [away * repair for away in range(m + 1)]
    fastest = max(first + second for first, second in zip(up, down, strict=True))
    jumps = fastest * window_s
    if jumps > UNIFORM_TERMS:  # the chain reaches its steady state much earlier: one absorption rate holds
        part_s = UNIFORM_TERMS / 2 / fastest
        part = _lose_window(size, m, rate_per_s=rate_per_s, repair_s=repair_s, window_s=part_s)
        return -math.expm1(window_s / part_s * _log_survived(part))
    state = [1.0] + [0.0] * m
    loss, absorbed = 0.0, 0.0
    log_weight = -jumps
    for term in range(int(jumps + 12 * math.sqrt(jumps) + 60)):
        loss += math.exp(log_weight) * absorbed
        absorbed += state[m] * up[m] / fastest
        state = _jump(state, up, down, fastest)
        log_weight += math.log(jumps) - math.log(term + 1)
    return min(1.0, loss)


def _log_survived(loss: float) -> float:
    return math.log1p(-loss) if loss < 1.0 else -math.inf


def _jump(state: list[float], up: list[float], down: list[float], fastest: float) -> list[float]:
    following = [share * (1.0 - (up[away] + down[away]) / fastest) for away, share in enumerate(state)]
    for away, share in enumerate(state):
        if away + 1 < len(state):
            following[away + 1] += share * up[away] / fastest
        if away:
            following[away - 1] += share * down[away] / fastest
    return following


def fatal_domains(node_count: int, *, nodes_per_domain: int, group_size: int, m: int) -> int:
    """How many failure domains (racks, power feeds) hold more than ``m`` nodes of some group.

    Nodes are assigned to groups by domain, as the coordinator does.
    """
    if nodes_per_domain <= 0:
        return 0
    domain_of = {f"n{index}": f"d{index // nodes_per_domain}" for index in range(node_count)}
    groups = form_groups(domain_of, group_size=group_size, m=m)
    if all(widest_domain(group, domain_of) <= m for group in groups):
        return 0
    fatal = set()
    for group in groups:
        names = [domain_of[name] for name in group]
        fatal |= {name for name in names if names.count(name) > m}
    return len(fatal)
