"""How the driver starts its processes: settings as records that travel as JSON in one argument. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSettings:
    """One trainer process: a rank of a gloo world on this machine."""

    rank: int
    world_size: int
    port: int
    socket: str
    run_id: str
    size_bytes: int
    scratch: str  # a directory on tmpfs, for baselines and peers
    max_wait_s: float = 60.0
    frozen: float = 0.0  # part of the parameters that is not trained


@dataclass(frozen=True, slots=True, kw_only=True)
class PublisherSettings:
    """One publisher process: a rank that commits bytes over the local protocol, with no torch behind it."""

    rank: int
    world_size: int
    world_id: str
    socket: str
    run: str
    size_bytes: int
    wait_s: float = 60.0
