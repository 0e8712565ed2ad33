"""The words daemons and the coordinator exchange: what a node holds (reports) and what should be (desired state).

Frozen values only; the wire form is generated from the same field names (``transport/convert.py``). Pure: no I/O, clock or
randomness. ``run`` is always ``job/run_id``.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass, field, replace

from backstay import record, versions
from backstay.ids import Generation, SnapshotKey
from backstayd.core.gate_records import GateReport, GateVerdict
from backstayd.core.interruptions import Ledger
from backstayd.core.missing_ranks import MissingRanks
from backstayd.core.tombstone import Tombstone


class SessionPhase(enum.StrEnum):
    ATTACHED = "attached"  # connected, has not asked to restore
    RESTORING = "restoring"  # blocked in restore()
    TRAINING = "training"  # restore() returned, or re-attached with a released decision
    ENDED = "ended"  # finish() was called


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
class NodeIdentity:
    """One start of one daemon. ``bulk_address`` is ``host:port`` of its bulk transport."""

    name: str
    incarnation: str
    bulk_address: str
    domain: str = ""
    version: str = ""
    protocol: int = versions.NODE_PROTOCOL


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """A committed shard on a node. ``digest`` is the SHA-256 of its manifest: the identity of its bytes."""

    attempt: int
    step: int
    rank: int
    world_size: int
    size_bytes: int
    digest: str
    world_id: str = ""  # who wrote it (from the manifest): shards of two worlds are never one snapshot
    layout: str = ""  # of its manifest: which boxes of which tensors that rank held; "" = not known

    @property
    def key(self) -> SnapshotKey:
        return SnapshotKey(self.attempt, self.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeShard:
    """One row of a plan's volume table, in rank order within its member."""

    rank: int
    size_bytes: int
    digest: str
    layout: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One node of a group, at its place. Its volume is its shards one after another (may be empty)."""

    node: str
    incarnation: str
    bulk_address: str
    shards: tuple[VolumeShard, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """An immutable geometry for one snapshot and one group; ``k = len(members) - m``.

    ``plan_id`` is the SHA-256 over everything else (:meth:`sealed`), in every parity name and message.
    """

    plan_id: str = ""
    run: str
    snapshot_id: str
    attempt: int
    step: int
    world_size: int
    m: int
    chunk_bytes: int
    members: tuple[Member, ...]
    serial: int = 0  # tells apart plans over the same members: a repair, a second try

    @property
    def k(self) -> int:
        return len(self.members) - self.m

    @property
    def key(self) -> SnapshotKey:
        return SnapshotKey(self.attempt, self.step)

    def sealed(self) -> Plan:
        """The same plan with its ``plan_id`` computed (first 32 hex digits of the SHA-256)."""
        bare = replace(self, plan_id="")
        return replace(bare, plan_id=hashlib.sha256(record.dumps(bare)).hexdigest()[:32])

    def is_sealed(self) -> bool:
        return self.plan_id != "" and self.sealed().plan_id == self.plan_id


@dataclass(frozen=True, slots=True, kw_only=True)
class FragmentRecord:
    """A parity fragment held on a node, with the plan and all manifests of the group beside it."""

    plan_id: str
    stripe: int
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Distrusted:
    """A snapshot that verified and yet led to NaN, or did not pass the gate: it, and what was trained from it, is not
    restored again."""

    snapshot_id: str
    attempt: int
    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRecord:
    """A live trainer connected to a node. A dead trainer's session is absent from the report."""

    world_id: str
    rank: int
    world_size: int
    phase: SessionPhase
    allow_fresh: bool = False
    needs: tuple[int, ...] = ()  # ranks whose shards this rank may read at restore (own rank always included)
    last_step: int = 0  # newest step this session committed or was asked for
    skipped_step: int = 0  # newest step this rank skipped or abandoned (0: none)
    skip_reason: str = ""
    is_short_of_slots: bool = False  # that step was skipped because no slot came free in time: snapshots come too fast
    gate: GateReport | None = None
    wants_persist: bool = False  # the trainer asked for the newest protected snapshot on durable storage, now
    sealed_step: int = 0  # the newest step whose files this rank declared whole (file store); 0: none
    blocked_s: float = 0.0  # what snapshots have cost this rank since it attached here, as it says
    waited_s: float = 0.0  # of that, what it waited for slots and for copying at the fence


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
class PersistedSnapshot:
    """The completion record of a snapshot on durable storage: written last, atomically, as ``snapshot.json`` beside the
    shards. Its directory holds a snapshot only if this is there.

    ``lineage`` is that of the decision it was trained under, and ``generation`` the number of the newest decision then;
    ``serial`` counts the persisted snapshots of the run.
    """

    run: str
    attempt: int
    step: int
    world_size: int
    snapshot_id: str
    shards: tuple[VolumeShard, ...]
    lineage: tuple[Lineage, ...] = ()
    serial: int = 0
    unix_s: float = 0.0
    writer: str = ""
    generation: int = 0
    owner: str = ""  # the user whose run it is, a number; "" = anybody's, as an import is

    @property
    def key(self) -> SnapshotKey:
        return SnapshotKey(self.attempt, self.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """A directory on durable storage whose completion record is there and cannot be used; ``reason`` says why."""

    attempt: int
    step: int
    reason: str

    @property
    def key(self) -> SnapshotKey:
        return SnapshotKey(self.attempt, self.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What one node found of a run under ``url``. ``is_known``: something lies there, whole or not; ``partial``: directories
    of snapshots without a completion record; ``unreadable``: with one that cannot be used."""

    url: str
    is_done: bool = False
    error: str = ""
    is_known: bool = False
    snapshots: tuple[PersistedSnapshot, ...] = ()
    survey_id: str = ""
    partial: tuple[SnapshotKey, ...] = ()
    unreadable: tuple[Unreadable, ...] = ()
    distrusted: tuple[Distrusted, ...] = ()  # marks that lie there


class UploadState(enum.StrEnum):
    UPLOADING = "uploading"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """How far one shard is on its way from a node to durable storage; ``rank`` -1 is the completion record."""

    snapshot_id: str
    rank: int
    state: UploadState
    done_bytes: int = 0
    total_bytes: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadTask:
    """Copy the shards of ``ranks`` of ``snapshot`` to storage; ``is_last``: all shards are there, write the record now."""

    snapshot: PersistedSnapshot
    ranks: tuple[int, ...] = ()
    is_last: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A snapshot on durable storage by name; ``snapshot_id`` "": a directory without a completion record."""

    attempt: int
    step: int
    snapshot_id: str = ""

    @property
    def key(self) -> SnapshotKey:
        return SnapshotKey(self.attempt, self.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageDesired:
    """What a node does with durable storage for one run. ``url`` is the run's directory; ``survey_id``: list what lies there
    and answer under this name ("": no need).

    Records, prunes and marks are acts on storage that others share. They hold only while this is confirmed by the
    coordinator (``node/storing.py``), and only if storage is as it was when they were ordered: ``prunes`` are deleted, record
    first, because ``grounds`` lie there and may be restored; nothing is done where attempts above ``newest_attempt`` lie.
    ``distrust``: marks to write beside the records; ``trust``: marks to strike out.
    """

    url: str
    uploads: tuple[UploadTask, ...] = ()
    prunes: tuple[Stored, ...] = ()
    grounds: tuple[Stored, ...] = ()
    newest_attempt: int = 0
    distrust: tuple[Distrusted, ...] = ()
    trust: tuple[Distrusted, ...] = ()
    bandwidth_bytes_per_s: int = 0  # 0: no cap
    survey_id: str = ""
    persisted_step: int = 0  # of the newest persisted snapshot; 0: none


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
class RebuildTarget:
    """The owner-to-be of one lost shard."""

    member_index: int
    rank: int
    digest: str
    node: str
    bulk_address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FragmentSource:
    """Where fragment ``index`` of ``stripe`` is read: parity from ``node``; data as shards of ``node``.

    Data fragments are numbered 0..k-1 in geometry order, parity k..k+m-1.
    """

    stripe: int
    index: int
    node: str
    bulk_address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RebuildTask:
    """One stripe decoded by one node, all lost data blocks of it from a single read, put to their owners."""

    stripe: int
    decoder: str
    sources: tuple[FragmentSource, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuild:
    """Recompute lost shards of ``plan``. ``rebuild_id`` = SHA-256 over the rest (:func:`seal_rebuild`)."""

    rebuild_id: str
    plan: Plan
    targets: tuple[RebuildTarget, ...]
    tasks: tuple[RebuildTask, ...]


def seal_rebuild(rebuild: Rebuild) -> Rebuild:
    """The same rebuild under the identity of its content (first 32 hex digits of the SHA-256)."""
    bare = replace(rebuild, rebuild_id="")
    return replace(bare, rebuild_id=hashlib.sha256(record.dumps(bare)).hexdigest()[:32])


@dataclass(frozen=True, slots=True, kw_only=True)
class Staging:
    """A host's answer to a decision."""

    decision_id: str
    state: StagingState
    done_bytes: int = 0
    total_bytes: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantined:
    """A source that failed verification; its bytes stay aside and are never used."""

    what: str  # "shard rank 3 of step 12", "parity stripe 2 index 0 of plan ab12"
    attempt: int
    step: int
    reason: str
    node: str = ""  # the holder, when the reporting node read it from another; "" = the reporting node
    rank: int = -1  # a shard, or
    plan_id: str = ""  # a parity fragment
    stripe: int = -1
    index: int = -1
    is_misfit: bool = (
        False  # parity that does not fit its stripe, whatever its digests say: proven by the one who read it
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """All one node knows of one run."""

    run: str
    sessions: tuple[SessionRecord, ...] = ()
    shards: tuple[ShardRecord, ...] = ()
    plans: tuple[Plan, ...] = ()  # stored here with all manifests of the group
    fragments: tuple[FragmentRecord, ...] = ()
    decision: Decision | None = None  # newest recorded on this node's tmpfs
    staging: Staging | None = None
    quarantined: tuple[Quarantined, ...] = ()
    failed_plans: tuple[str, ...] = ()  # plan ids this node could not encode; the reason is in its log
    rebuilt_bytes: int = 0
    rebuild_total_bytes: int = 0
    survey: Survey | None = None
    uploads: tuple[Upload, ...] = ()
    pruned: tuple[SnapshotKey, ...] = ()  # of those to be pruned: gone now
    marked: tuple[str, ...] = ()  # snapshot ids of those to be distrusted: their marks lie on durable storage
    struck: tuple[str, ...] = ()  # of those to be trusted again: their marks are gone
    distrusted: tuple[Distrusted, ...] = ()
    owner: str = ""  # the user whose run it is, a number; "" = not known here
    failed_copies: tuple[
        str, ...
    ] = ()  # digests of shards that should be copied here and cannot; the reason is in its log
    recorded_unix_s: float = 0.0  # when ``decision`` was written to tmpfs; 0: not known


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """Level-triggered: the whole truth of a node, sent on change and at least every lease/6."""

    node: NodeIdentity
    sequence: int
    generation: Generation = field(default_factory=Generation)
    runs: tuple[RunReport, ...] = ()
    capacity_bytes: int = 0
    used_bytes: int = 0
    corrupt_count: int = 0
    is_draining: bool = False  # it will be stopped; remembered beside what it holds, so that a new coordinator knows
    is_cordoned: bool = False  # and that is because its Kubernetes node is cordoned
    takes_copies: bool = False  # it obeys RunDesired.copies; older releases do not
    takes_tombstones: bool = False  # older releases know only RunDesired.forget
    tombstones: tuple[Tombstone, ...] = ()  # of runs that are over, one each


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Snapshot at multiples of ``interval_steps`` from ``from_step`` on; before that ``previous_interval_steps`` holds."""

    interval_steps: int = 1
    from_step: int = 0
    previous_interval_steps: int = 1

    def includes(self, step: int) -> bool:
        interval = self.interval_steps if step >= self.from_step else self.previous_interval_steps
        return step % interval == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardCopy:
    """Hold a copy of a shard that only nodes hold which will be stopped; ``holders`` are where it is read."""

    attempt: int
    step: int
    rank: int
    world_size: int
    size_bytes: int
    digest: str
    holders: tuple[str, ...]


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
