"""What a world restores, from where, how far each host is with it, and the ledger of interruptions recorded with it.

Times in the ledger are Unix seconds of the coordinator's clock; 0 means not known.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from backstay.ids import Generation


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
    """A snapshot that is not restored again, nor what was trained from it: it verified, and led to NaN or failed the gate."""

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
    world_size: int = 0  # ranks that wrote it; 0: as many as restore it
    url: str = ""  # its directory on durable storage, where sources of kind PERSISTED are read


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """Where one attempt began."""

    attempt: int
    base_attempt: int  # 0: from scratch
    base_step: int
    world_id: str = ""  # who writes it: a number is given twice if every node that recorded it is away


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    rank: int
    node: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSource:
    """Where a restoring world gets one shard of the base."""

    rank: int
    size_bytes: int
    digest: str
    kind: SourceKind
    holders: tuple[str, ...] = ()  # nodes that hold it, or will once it is rebuilt
    layout: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interruption:
    """The end of a world that trained, and how the next one came to train. Known times ascend in the order below."""

    attempt: int  # the history that ended
    cause: str  # trainer_died, node_lost, all_nodes_lost, distrusted or world_restarted
    detail: str = ""  # a sentence for people
    heard_unix_s: float = 0.0  # the last report of what went missing: training stood still from about then
    noticed_unix_s: float = 0.0  # a rank was missing from the reports
    opened_unix_s: float = 0.0  # every rank of the next world waited in restore()
    decided_unix_s: float = 0.0
    released_unix_s: float = 0.0  # every host had recorded the decision: restore() returned
    new_attempt: int = 0  # 0: no world trains yet
    outcome: str = ""  # of the decision: EXACT, EXACT_OLDER, NONE
    source: str = ""  # the slowest source of a shard: memory, peer, rebuild, persisted; none: from scratch
    newest_step: int = 0  # the newest step that a rank is known to have completed in the history that ended
    base_step: int = 0  # the step that was restored
    step_s: float = 0.0  # measured seconds per step in the history that ended
    blocked_s: float = 0.0  # what snapshots cost its slowest rank, as trainers report it
    first_step: int = 0  # the first step seen of the new history
    first_step_unix_s: float = 0.0
    has_storage: bool = False  # durable storage was configured
    persisted_step: int = 0  # the newest step of the live history on it when the decision was made


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """The interruptions of a run; bounded: the oldest are summed up in ``earlier_...``."""

    began_unix_s: float = 0.0  # since when it is kept
    is_whole: bool = False  # it goes back to the run's first step
    entries: tuple[Interruption, ...] = ()  # oldest first
    earlier_count: int = 0
    earlier_steps_lost: int = 0
    earlier_down_s: float = 0.0
    earlier_recompute_s: float = 0.0
    earlier_blocked_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What one world restores; made once, recorded on every host before any rank returns."""

    decision_id: str
    generation: Generation
    run: str
    world_id: str
    world_size: int
    attempt: int  # the history that this world writes from now on
    outcome: Outcome
    base: Base | None = None
    lineage: tuple[Lineage, ...] = ()  # this attempt and every live ancestor, newest first
    placements: tuple[Placement, ...] = ()
    sources: tuple[ShardSource, ...] = ()
    message: str = ""
    tries: int = 0  # decisions in a row before this one that restored the same snapshot, with nothing newer made since
    ledger: Ledger | None = None  # the run's interruptions up to the one that this decision ends

    @property
    def hosts(self) -> frozenset[str]:
        """Nodes on which the world runs."""
        return frozenset(place.node for place in self.placements)

    @property
    def node_of_rank(self) -> dict[int, str]:
        return {place.rank: place.node for place in self.placements}

    @property
    def base_step(self) -> int:
        """The step that is restored; 0 from scratch."""
        return self.base.step if self.base is not None else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Staging:
    """A host's answer to a decision."""

    decision_id: str
    state: StagingState
    done_bytes: int = 0
    total_bytes: int = 0
    reason: str = ""


def base_size(decision: Decision) -> int:
    """How many ranks wrote what the decision restores."""
    return (decision.base.world_size if decision.base is not None else 0) or decision.world_size


def readers_of(decision: Decision) -> dict[int, str]:
    """The node that reads each shard of the base, if its own rank does; none: any host may read of any."""
    if base_size(decision) != decision.world_size:
        return {}
    return decision.node_of_rank


def takes_whole(decision: Decision, *, rank: int, layout: str) -> bool:
    """Whether a rank that holds its tensors as ``layout`` says reads whole shards, its own above all, and needs no offer.

    "" is a layout nobody knows: such a shard, and a trainer that says nothing, are taken for alike.
    """
    if decision.base is None:
        return True
    if base_size(decision) != decision.world_size:
        return False
    written = next((source.layout for source in decision.sources if source.rank == rank), "")
    return not layout or not written or layout == written
