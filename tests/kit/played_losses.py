"""Losses of nodes played by chance, to compare the closed forms of ``backstayd.sizing.survival`` with. Seeded."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence


def simulate_losses(sizes: Sequence[int], m: int, losses: int, *, rounds: int, seed: int) -> float:
    """The share of ``rounds`` draws of ``losses`` nodes in which every group keeps what it needs. Monte Carlo, seeded."""
    draw = random.Random(seed)
    group_of = [group for group, size in enumerate(sizes) for _ in range(size)]
    survived = 0
    for _ in range(rounds):
        lost = [0] * len(sizes)
        for node in draw.sample(range(len(group_of)), losses):
            lost[group_of[node]] += 1
        survived += max(lost) <= m
    return survived / rounds


def simulate_window(
    sizes: Sequence[int], m: int, *, rate_per_s: float, repair_s: float, window_s: float, rounds: int, seed: int
) -> float:
    """The same question as ``survive_window``, played event by event. Monte Carlo, seeded."""
    draw = random.Random(seed)
    node_count, survived = sum(sizes), 0
    for _ in range(rounds):
        away, now_s = [0] * len(sizes), 0.0
        while True:
            gone = sum(away)
            going, coming = (node_count - gone) * rate_per_s, gone / repair_s
            now_s += draw.expovariate(going + coming)
            if now_s >= window_s:
                survived += 1
                break
            if draw.random() * (going + coming) < going:
                group = _pick(draw, [size - lost for size, lost in zip(sizes, away, strict=True)])
                away[group] += 1
                if away[group] > m:
                    break
            else:
                away[_pick(draw, away)] -= 1
    return survived / rounds


def _pick(draw: random.Random, weights: Sequence[int]) -> int:
    return draw.choices(range(len(weights)), weights)[0]


def confidence(share: float, rounds: int, *, sigmas: float = 4.0) -> float:
    """Half the width of the interval in which a simulated ``share`` lies: normal, with the Agresti-Coull correction."""
    middle = (share * rounds + 2.0) / (rounds + 4.0)
    return sigmas * math.sqrt(middle * (1.0 - middle) / (rounds + 4.0))
