"""The record that names ranks for which others wait. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MissingRanks:
    """Ranks of one world for which the others wait: in restore(), or ``is_training``, for their part of each snapshot."""

    world_id: str
    ranks: tuple[int, ...]  # the first few
    count: int
    sentence: str
    is_training: bool = False
