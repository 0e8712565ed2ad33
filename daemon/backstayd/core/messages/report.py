"""What a node reports: everything it holds and who is attached to it.

The wire form has the same field names (``transport/convert.py``). ``run`` is always ``job/run_id``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from backstay.format import versions
from backstay.ids import Generation, SnapshotKey
from backstayd.core.messages.decisions import Decision, Distrusted, Staging
from backstayd.core.messages.durable import Survey, Upload
from backstayd.core.messages.gate import GateReport
from backstayd.core.messages.plans import FragmentRecord, Plan, Quarantined, ShardRecord
from backstayd.core.messages.tombstone import Tombstone


class SessionPhase(enum.StrEnum):
    ATTACHED = "attached"  # connected, has not asked to restore
    RESTORING = "restoring"  # blocked in restore()
    TRAINING = "training"  # restore() returned, or the trainer attached again under a released decision
    ENDED = "ended"  # finish() was called


class SkipCause(enum.StrEnum):
    NONE = "none"  # no step was skipped, or a daemon of an older release does not say
    NO_SLOT = "no_slot"  # no slot was to be had, for whatever reason
    CAPTURE = "capture"  # there was a slot, and the capture was given up


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeIdentity:
    """One start of one daemon."""

    name: str
    incarnation: str  # new at each start
    bulk_address: str  # ``host:port`` of its bulk transport
    domain: str = ""  # what fails together with this node, such as a rack; "" = nothing else
    version: str = ""  # of the software
    protocol: int = versions.NODE_PROTOCOL


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRecord:
    """A trainer connected to a node. One that died is absent from the report."""

    world_id: str
    rank: int
    world_size: int
    phase: SessionPhase
    allow_fresh: bool = False  # restore() may start from scratch
    needs: tuple[int, ...] = ()  # ranks whose shards this rank may read at restore, its own among them
    last_step: int = 0  # the newest step that it committed or was asked for
    skipped_step: int = 0  # the newest step that it skipped or abandoned; 0: none
    skip_reason: str = ""  # of that step, for people
    is_short_of_slots: bool = False  # no slot came free in time although none is held back: snapshots come too fast
    gate: GateReport | None = None  # what it loaded; None before
    wants_persist: bool = False  # the trainer asked for the newest protected snapshot on durable storage, now
    sealed_step: int = 0  # the newest step whose files this rank declared whole (file store); 0: none
    blocked_s: float = 0.0  # what snapshots have cost this rank since it attached here, as it says
    waited_s: float = 0.0  # of that, what it waited for slots and for copying at the fence
    skip_cause: SkipCause = SkipCause.NONE  # of ``skipped_step``


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """All that one node knows of one run."""

    run: str
    sessions: tuple[SessionRecord, ...] = ()
    shards: tuple[ShardRecord, ...] = ()
    plans: tuple[Plan, ...] = ()  # stored here, each with all manifests of its group
    fragments: tuple[FragmentRecord, ...] = ()
    decision: Decision | None = None  # the newest one recorded on this node's tmpfs
    staging: Staging | None = None
    quarantined: tuple[Quarantined, ...] = ()
    failed_plans: tuple[str, ...] = ()  # ids of plans that this node could not encode; its log says why
    rebuilt_bytes: int = 0
    rebuild_total_bytes: int = 0
    survey: Survey | None = None
    uploads: tuple[Upload, ...] = ()
    pruned: tuple[SnapshotKey, ...] = ()  # of those to be pruned: gone now
    marked: tuple[str, ...] = ()  # snapshot ids, of those to be distrusted: their marks lie on durable storage
    struck: tuple[str, ...] = ()  # snapshot ids, of those to be trusted again: their marks are gone
    distrusted: tuple[Distrusted, ...] = ()
    owner: str = ""  # the user whose run it is, a number; "" = not known here
    failed_copies: tuple[str, ...] = ()  # digests of shards that cannot be copied here; its log says why
    recorded_unix_s: float = 0.0  # when ``decision`` was written to tmpfs; 0: not known


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """The whole state of a node, sent on change and at least every sixth of a lease: a lost report costs a heartbeat."""

    node: NodeIdentity
    sequence: int  # ascends within one incarnation
    generation: Generation = field(default_factory=Generation)  # the highest one it has seen
    runs: tuple[RunReport, ...] = ()
    capacity_bytes: int = 0  # 0 = not known
    used_bytes: int = 0
    corrupt_count: int = 0
    is_draining: bool = False  # it will be stopped; the node itself remembers that
    is_cordoned: bool = False  # and drains because its Kubernetes node is cordoned
    takes_copies: bool = False  # it obeys RunDesired.copies; older releases do not
    takes_tombstones: bool = False  # older releases know only RunDesired.forget
    tombstones: tuple[Tombstone, ...] = ()  # of runs that are over, one each
