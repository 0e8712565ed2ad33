"""What the coordinator wants of a node: the desired state, whole in each message. Deletion is named, never implied."""

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
    """What one node should do and hold for one run."""

    run: str
    world_id: str = ""  # the only world whose sessions may write; "" = none is decided yet
    decision: Decision | None = None
    decision_phase: DecisionPhase = DecisionPhase.PREPARE
    plans: tuple[Plan, ...] = ()  # encode this node's stripe of each, hold its fragments
    drop_plans: tuple[str, ...] = ()  # ids of plans: delete their parity and plan files
    release: tuple[SnapshotKey, ...] = ()  # delete shards and parity of these snapshots
    rebuilds: tuple[Rebuild, ...] = ()
    schedule: Schedule = field(default_factory=Schedule)
    redundancy: str = ""  # "PROTECTED(2)", "DEGRADED(1)", "AT_RISK(0)", "REBUILDING 40 %", "STARTING", "UNPROTECTED"
    protected_step: int = 0
    is_release_possible: bool = True  # False: no slot comes free soon, so trainers do not wait for one
    forget: bool = False  # for releases that take no tombstones
    keep: int = 1  # protected snapshots that are kept; a rank has one slot more
    suspects: tuple[Quarantined, ...] = ()  # sources on this node that a reader found corrupt: verify them now
    parity_fraction: float = 0.0  # m / k of the run's smallest group, for admission; 0 = not known
    storage: StorageDesired | None = None
    gate: GateVerdict | None = None
    distrusted: tuple[Distrusted, ...] = ()  # every host remembers them
    probation_steps: int = 0  # steps after a restore in which NaN has the restored snapshot distrusted
    sealed_step: int = 0  # the files of this step are whole: every rank commits its part
    complete_step: int = 0  # the newest step of which every shard is held
    trusted: tuple[str, ...] = ()  # snapshot ids that an operator trusts again
    #: Slots above ``keep + 1`` that a rank may have if there is room, while what is on probation or uploaded is kept.
    extra_slots: int = 0
    copies: tuple[ShardCopy, ...] = ()
    owner: str = ""  # the user whose run it is, a number; trainers of others are refused. "" = not known
    missing: MissingRanks | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    name: str
    bulk_address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeDesired:
    """Everything that a node should do now; a lost message costs one heartbeat, never correctness."""

    generation: Generation
    runs: tuple[RunDesired, ...] = ()
    peers: tuple[Peer, ...] = ()  # present nodes of the same runs: where the holders that orders name are reached
    has_storage: bool = False  # durable storage is configured: a node gets ready to use it
    drain: bool | None = None  # an operator's order, until the node reports that it obeys
    tombstones: tuple[Tombstone, ...] = ()  # keep them, and delete what they cover
    lifted: tuple[Tombstone, ...] = ()  # drop these: they name what lives
