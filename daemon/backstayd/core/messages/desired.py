"""What the coordinator wants of a node: desired state. Deletion is always named, never by omission."""

from __future__ import annotations

from dataclasses import dataclass, field

from backstay.ids import Generation, SnapshotKey
from backstay.protocol.messages import Schedule
from backstayd.core.messages.decisions import Decision, DecisionPhase, Distrusted
from backstayd.core.messages.durable import StorageDesired
from backstayd.core.messages.gate import GateVerdict
from backstayd.core.messages.plans import Plan, Quarantined, Rebuild, ShardCopy
from backstayd.core.messages.tombstone import Tombstone


@dataclass(frozen=True, slots=True, kw_only=True)
class MissingRanks:
    """Ranks of one world for which the others wait: in restore(), or ``is_training``, for their part of each snapshot."""

    world_id: str
    ranks: tuple[int, ...]  # the first few
    count: int
    sentence: str
    is_training: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDesired:
    """What should be on one node for one run. Deletion is always named, never by omission."""

    run: str
    world_id: str = ""  # the only world whose sessions may write; "" = none decided yet
    decision: Decision | None = None
    decision_phase: DecisionPhase = DecisionPhase.PREPARE
    plans: tuple[Plan, ...] = ()  # encode your stripe of these, hold your fragments of these
    drop_plans: tuple[str, ...] = ()  # delete parity and plan files
    release: tuple[SnapshotKey, ...] = ()  # delete shards and parity of these snapshots
    rebuilds: tuple[Rebuild, ...] = ()
    schedule: Schedule = field(default_factory=Schedule)
    redundancy: str = ""  # "PROTECTED(2)", "DEGRADED(1)", "AT_RISK(0)", "REBUILDING 40 %", "STARTING", "UNPROTECTED"
    protected_step: int = 0
    is_release_possible: bool = True  # false: no slot will come free soon; do not wait for one
    forget: bool = False  # for releases that take no tombstones
    keep: int = 1  # protected snapshots kept; a rank has one slot more
    suspects: tuple[Quarantined, ...] = ()  # sources of this node that a reader found corrupt: verify them now
    parity_fraction: float = 0.0  # m / k of the run's groups: parity per byte of state, for admission; 0 = not known
    storage: StorageDesired | None = None
    gate: GateVerdict | None = None
    distrusted: tuple[Distrusted, ...] = ()  # every host remembers them
    probation_steps: int = 0  # steps after a restore in which NaN distrusts what was restored
    sealed_step: int = 0  # files of this step are whole: every rank commits its part
    complete_step: int = 0  # newest step of which every shard is held
    trusted: tuple[str, ...] = ()  # snapshot ids that an operator trusts again: strike them out
    extra_slots: int = (
        0  # slots above keep + 1 that a rank may have if there is room: what is on probation, or uploaded, stays
    )
    copies: tuple[ShardCopy, ...] = ()
    owner: str = ""  # the user whose run it is, a number; trainers of others are refused. "" = not known
    missing: MissingRanks | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    name: str
    bulk_address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeDesired:
    """Everything a node should do now; a lost message costs one heartbeat, never correctness."""

    generation: Generation
    runs: tuple[RunDesired, ...] = ()
    peers: tuple[Peer, ...] = ()  # live nodes of the same jobs, so that holders named in a decision have addresses
    has_storage: bool = False  # there is durable storage: a node gets ready to use it
    drain: bool | None = None  # an operator's order to drain, or not to any more, that the node does not report yet
    tombstones: tuple[Tombstone, ...] = ()  # keep them, and delete what they cover
    lifted: tuple[Tombstone, ...] = ()  # keep these no longer: they name what lives
