"""The results of a restore: for its caller, and for the layout gate. Must not load anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from backstay.protocol import messages


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreResult:
    """What restore() did.

    ``outcome``: ``EXACT``, ``EXACT_OLDER`` (not the newest step that was begun) or ``NONE`` (a new run: nothing was
    touched). ``attempt`` is the history this world writes, ``base_attempt`` the one that ``step`` is of,
    ``base_world_size`` the number of ranks that wrote it. ``sources``: rank of a shard that was read → ``local``, ``peer``,
    ``rebuild`` or ``persisted``, with the nodes. ``is_resharded``: it was written in another layout, and parts of it were
    put together. ``rng`` and ``extras`` (by name) describe where each stream and each extra came from. ``needed_bytes``
    were taken by this rank, ``fetched_bytes`` had to be here for that (chunks are whole); both 0 where whole shards were
    taken.
    """

    step: int = 0
    outcome: str = "NONE"
    attempt: int = 0
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
    """What was loaded: ``result`` for the caller, without the decision's fields, and what the gate holds against the facts.

    ``description``: of the optimizers' state, as in the header; "" if it was left alone. ``streams``: logical ranks whose
    random streams this rank continues; ``cursors``: extras that are a position of one rank alone, and of which;
    ``generators``: as they were set.
    """

    description: str
    streams: tuple[int, ...]
    result: RestoreResult = field(default_factory=RestoreResult)
    cursors: Mapping[str, int] = field(default_factory=dict)
    generators: Mapping[str, torch.Tensor] = field(default_factory=dict)


def make_result(restored: messages.Restored, loaded: Loaded | None, *, seconds: float) -> RestoreResult:
    """The caller's view of a decision and of what was loaded (None: nothing, the run is new)."""
    result = loaded.result if loaded is not None else RestoreResult()
    return replace(
        result,
        step=restored.step if loaded is not None else 0,
        outcome=restored.outcome,
        attempt=restored.attempt,
        base_attempt=restored.base_attempt,
        snapshot_id=restored.snapshot_id,
        seconds=seconds,
        message="; ".join(text for text in (restored.message, result.message) if text),
    )
