"""What a node can do next (actions), and all that decides it (the view of one run): values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from backstay.ids import SnapshotKey
from backstayd.coder.jobs import Job
from backstayd.core.messages.decisions import Decision
from backstayd.core.messages.desired import RunDesired
from backstayd.core.messages.durable import Stored, Survey
from backstayd.core.messages.plans import FragmentRecord, Plan, Rebuild, RebuildTarget, ShardRecord
from backstayd.core.messages.report import SessionRecord
from backstayd.node.reconcile.tasks import TaskKey


@dataclass(frozen=True, slots=True, kw_only=True)
class StartJob:
    """Run ``job`` on a coder under ``key``; at most one of a key at a time."""

    key: TaskKey
    job: Job


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareTarget:
    """Allocate staging for a shard that others will decode for this node."""

    key: TaskKey
    rebuild: Rebuild
    target: RebuildTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelTask:
    key: TaskKey


@dataclass(frozen=True, slots=True, kw_only=True)
class FenceWorld:
    world_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseSnapshot:
    key: SnapshotKey


@dataclass(frozen=True, slots=True, kw_only=True)
class DropPlan:
    plan_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscardStaged:
    rank: int
    world_size: int
    digest16: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantineParity:
    """Quarantine a parity fragment of this node."""

    fragment: FragmentRecord
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordDecision:
    decision: Decision


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseWorld:
    """Answer the waiting restore() calls of the decision's world."""

    decision: Decision


@dataclass(frozen=True, slots=True, kw_only=True)
class RefuseWorld:
    decision: Decision


Action = (
    StartJob | PrepareTarget | CancelTask | FenceWorld | ReleaseSnapshot | DropPlan | DiscardStaged
    | QuarantineParity
    | RecordDecision | ReleaseWorld | RefuseWorld
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedState:
    """A shard in staging here and the stripes of each rebuild that it still waits for."""

    rank: int
    world_size: int
    digest16: str
    size_bytes: int
    missing: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # rebuild id -> stripes


@dataclass(frozen=True, slots=True, kw_only=True)
class Restoring:
    """A trainer here that restores: which boxes it holds, and the decision of which it has fetched what it needs."""

    world_id: str
    rank: int
    layout: str = ""
    staged: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DurableView:
    """What this daemon did and found on durable storage for one run.

    ``confirmed_until_s`` (since boot): until then the coordinator cannot have counted this node lost since it ordered what
    it orders of the run; ``is_confirmed``: that time has not come.
    """

    survey: Survey | None = None
    uploaded: frozenset[tuple[str, int]] = frozenset()  # (snapshot id, rank); RECORD_RANK: its completion record
    pruned: frozenset[Stored] = frozenset()
    marked: frozenset[str] = frozenset()  # snapshot ids
    struck: frozenset[str] = frozenset()
    confirmed_until_s: float = float("-inf")
    is_confirmed: bool = False
    free_uploads: int = 0  # that may start now


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One run as this node sees it.

    ``settled`` are tasks that are done, have failed for good or wait for another try. ``verified`` holds (decision id,
    digest) of shards whose every chunk was checked for that decision.
    """

    node: str
    incarnation: str
    desired: RunDesired
    peers: Mapping[str, str] = field(default_factory=dict)  # name -> bulk address
    shards: tuple[ShardRecord, ...] = ()
    fragments: frozenset[FragmentRecord] = frozenset()
    plans: Mapping[str, Plan] = field(default_factory=dict)
    decision: Decision | None = None
    sessions: tuple[SessionRecord, ...] = ()
    restoring: tuple[Restoring, ...] = ()
    waiting_worlds: frozenset[str] = frozenset()  # worlds with a restore() that has no answer yet
    granted_worlds: frozenset[str] = frozenset()  # worlds with a slot in hand
    staged: tuple[StagedState, ...] = ()
    running: frozenset[TaskKey] = frozenset()
    settled: frozenset[TaskKey] = frozenset()
    verified: frozenset[tuple[str, str]] = frozenset()
    failed: Mapping[str, str] = field(default_factory=dict)  # decision id -> why it cannot be staged here
    durable: DurableView = field(default_factory=DurableView)

    @property
    def digests(self) -> frozenset[str]:
        return frozenset(shard.digest for shard in self.shards)
