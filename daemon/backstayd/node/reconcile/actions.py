"""What a node can do next (actions), and all that decides it (the view of one run): values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from backstay.ids import SnapshotKey
from backstayd.coder.jobs import Job
from backstayd.core.messages.decisions import Decision
from backstayd.core.messages.desired import RunDesired
from backstayd.core.messages.durable import StorageDesired, Stored, Survey, Upload, UploadState
from backstayd.core.messages.plans import FragmentRecord, Plan, Rebuild, RebuildTarget, ShardRecord
from backstayd.core.messages.report import SessionRecord
from backstayd.node.reconcile.tasks import TaskKey
from backstayd.store.index import StagedFile


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
    | QuarantineParity | RecordDecision | ReleaseWorld | RefuseWorld
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Restoring:
    """A trainer here that restores: its layout, and the decision of which it has fetched everything it needs."""

    world_id: str
    rank: int
    layout: str = ""
    staged: str = ""


@dataclass(slots=True, kw_only=True)
class DurableRun:
    """What this daemon did and found on durable storage for one run."""

    survey: Survey | None = None
    uploads: dict[tuple[str, int], Upload] = field(default_factory=dict)  # by snapshot id and rank, or RECORD_RANK
    pruned: set[Stored] = field(default_factory=set)
    marked: set[str] = field(default_factory=set)  # snapshot ids
    struck: set[str] = field(default_factory=set)
    confirmed_s: float = float("-inf")  # when the newest report was sent whose answer names this run, since boot

    def trim(self, desired: StorageDesired) -> None:
        """Forget what is no longer wanted."""
        wanted = {task.snapshot.snapshot_id for task in desired.uploads}
        self.uploads = {place: upload for place, upload in self.uploads.items() if place[0] in wanted}
        self.pruned &= set(desired.prunes)
        self.marked &= {item.snapshot_id for item in desired.distrust}
        self.struck &= {item.snapshot_id for item in desired.trust}

    def is_uploaded(self, snapshot_id: str, rank: int) -> bool:
        upload = self.uploads.get((snapshot_id, rank))
        return upload is not None and upload.state is UploadState.DONE


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One run as this node sees it.

    ``settled`` are tasks that are done, have failed for good or wait for another try. ``verified`` holds (decision id,
    digest) of shards whose every chunk was checked for that decision. Until ``confirmed_until_s`` (since boot) the
    coordinator cannot have counted this node lost since it wanted what it wants; ``is_confirmed``: that time has not come.
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
    granted_worlds: frozenset[str] = frozenset()  # worlds that hold a slot
    staged: tuple[StagedFile, ...] = ()
    missing: Mapping[tuple[str, str], tuple[int, ...]] = field(
        default_factory=dict
    )  # (rebuild id, digest16) -> stripes
    running: frozenset[TaskKey] = frozenset()
    settled: frozenset[TaskKey] = frozenset()
    verified: frozenset[tuple[str, str]] = frozenset()
    failed: Mapping[str, str] = field(default_factory=dict)  # decision id -> why it cannot be staged here
    durable: DurableRun = field(default_factory=DurableRun)
    confirmed_until_s: float = float("-inf")
    is_confirmed: bool = False
    free_uploads: int = 0  # that may start now

    @property
    def digests(self) -> frozenset[str]:
        return frozenset(shard.digest for shard in self.shards)
