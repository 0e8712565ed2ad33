"""What a world restores, from where, and how far each host is with it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from backstay.ids import Generation
from backstayd.core.messages.interruptions import Ledger


class Outcome(enum.StrEnum):
    EXACT = "EXACT"
    EXACT_OLDER = "EXACT_OLDER"
    NONE = "NONE"
    REFUSED = "REFUSED"  # nothing is loaded; ``message`` says what is missing and what could be had


class DecisionPhase(enum.StrEnum):
    PREPARE = "prepare"  # stage and verify what the decision needs
    RECORD = "record"  # every host staged: write the decision to tmpfs
    RELEASE = "release"  # every host recorded: let restore() return
    REFUSE = "refuse"  # restore() raises with ``message``


class StagingState(enum.StrEnum):
    STAGING = "staging"
    READY = "ready"  # all needed shards are here and were verified just now
    RECORDED = "recorded"  # the decision is on this node's tmpfs
    FAILED = "failed"  # a source was corrupt or gone; the coordinator decides anew


class SourceKind(enum.StrEnum):
    LOCAL = "local"
    PEER = "peer"
    REBUILD = "rebuild"
    PERSISTED = "persisted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Distrusted:
    """A snapshot that verified and yet led to NaN, or did not pass the gate: it, and what was trained from it, is not
    restored again."""

    snapshot_id: str
    attempt: int
    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The snapshot a decision restores."""

    attempt: int
    step: int
    snapshot_id: str
    world_size: int = 0  # ranks that wrote it; 0: as many as the world that restores
    url: str = ""  # its directory on durable storage, where sources of kind PERSISTED are read


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """``attempt`` began from (``base_attempt``, ``base_step``); base_attempt 0 means from scratch.

    ``world_id`` is the world that writes it: an attempt number can be given twice when its witnesses are all away.
    """

    attempt: int
    base_attempt: int
    base_step: int
    world_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    rank: int
    node: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSource:
    """Where a restoring world gets one shard of the base. ``holders`` are node names that hold it or will (rebuild)."""

    rank: int
    size_bytes: int
    digest: str
    kind: SourceKind
    holders: tuple[str, ...] = ()
    layout: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What one world restores; made once, recorded on every host before any rank returns.

    ``attempt`` is the history this world writes from now on. ``lineage`` lists every live ancestor attempt, newest first.
    """

    decision_id: str
    generation: Generation
    run: str
    world_id: str
    world_size: int
    attempt: int
    outcome: Outcome
    base: Base | None = None
    lineage: tuple[Lineage, ...] = ()
    placements: tuple[Placement, ...] = ()
    sources: tuple[ShardSource, ...] = ()
    message: str = ""
    tries: int = 0  # decisions before this one that restored the same snapshot, with nothing protected since
    ledger: Ledger | None = None  # the run's interruptions up to the one that this decision ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Staging:
    """A host's answer to a decision."""

    decision_id: str
    state: StagingState
    done_bytes: int = 0
    total_bytes: int = 0
    reason: str = ""
