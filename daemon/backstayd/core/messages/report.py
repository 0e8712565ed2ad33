"""What a node reports: everything it holds and who is attached to it. The wire form is generated from the same field names
(``transport/convert.py``)."""

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
    TRAINING = "training"  # restore() returned, or re-attached with a released decision
    ENDED = "ended"  # finish() was called


class SkipCause(enum.StrEnum):
    NONE = "none"  # no step was skipped, or a daemon of an older release does not say
    NO_SLOT = "no_slot"  # no slot was to be had, for whatever reason
    CAPTURE = "capture"  # there was a slot, and the capture was given up


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
    skip_reason: str = ""  # for people
    is_short_of_slots: bool = False  # no slot came free in time although none is held back: snapshots come too fast
    gate: GateReport | None = None
    wants_persist: bool = False  # the trainer asked for the newest protected snapshot on durable storage, now
    sealed_step: int = 0  # the newest step whose files this rank declared whole (file store); 0: none
    blocked_s: float = 0.0  # what snapshots have cost this rank since it attached here, as it says
    waited_s: float = 0.0  # of that, what it waited for slots and for copying at the fence
    skip_cause: SkipCause = SkipCause.NONE  # of ``skipped_step``


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
