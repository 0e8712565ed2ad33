"""What was loaded, for the gate and for the caller of restore(). Must not load anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from backstay.protocol import messages


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreResult:
    """What restore() did.

    ``outcome``: ``EXACT``, ``EXACT_OLDER`` (not the newest step that was begun) or ``NONE`` (a new run: nothing was
    touched). ``attempt`` is the history this world writes, ``base_attempt`` the one that ``step`` is of,
    ``base_world_size`` the number of ranks that wrote it. ``sources``: rank of a shard that was read → ``local``, ``peer``,
    ``rebuild`` or ``persisted``, with the nodes. ``is_resharded``: it was written in another layout, and parts of it were
    put together. ``rng`` and ``extras`` (by name) say in words where each stream and each extra came from. ``needed_bytes``
    were taken by this rank, ``fetched_bytes`` had to be here for that (chunks are whole); both 0 where whole shards were
    taken.
    """

    step: int
    outcome: str
    attempt: int
    base_attempt: int = 0
    base_world_size: int = 0
    snapshot_id: str = ""
    sources: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0
    message: str = ""
    is_resharded: bool = False
    rng: str = ""
    extras: dict[str, str] = field(default_factory=dict)
    needed_bytes: int = 0
    fetched_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What was loaded, for the gate to hold against what is there afterwards, and in words for :class:`RestoreResult`.

    ``description``: of the optimizers' state, as in the header; "" if it was left alone. ``streams``: logical ranks whose
    random streams this rank goes on with; ``cursors``: extras that are a position of one rank alone, and of which;
    ``generators``: as they were set.
    """

    description: str
    streams: tuple[int, ...]
    cursors: Mapping[str, int] = field(default_factory=dict)
    generators: Mapping[str, torch.Tensor] = field(default_factory=dict)
    sources: dict[int, str] = field(default_factory=dict)
    base_world_size: int = 0
    is_resharded: bool = False
    rng: str = "untouched"
    extras: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    needed_bytes: int = 0
    fetched_bytes: int = 0


def make_result(restored: messages.Restored, loaded: Loaded | None, *, seconds: float) -> RestoreResult:
    """The caller's view of a decision and of what was loaded (None: nothing, the run is new)."""
    if loaded is None:
        return RestoreResult(
            step=0,
            outcome=restored.outcome,
            attempt=restored.attempt,
            base_attempt=restored.base_attempt,
            snapshot_id=restored.snapshot_id,
            seconds=seconds,
            message=restored.message,
        )
    return RestoreResult(
        step=restored.step,
        outcome=restored.outcome,
        attempt=restored.attempt,
        base_attempt=restored.base_attempt,
        base_world_size=loaded.base_world_size,
        snapshot_id=restored.snapshot_id,
        sources=loaded.sources,
        seconds=seconds,
        message="; ".join(text for text in (restored.message, *loaded.notes) if text),
        is_resharded=loaded.is_resharded,
        rng=loaded.rng,
        extras=loaded.extras,
        needed_bytes=loaded.needed_bytes,
        fetched_bytes=loaded.fetched_bytes,
    )
