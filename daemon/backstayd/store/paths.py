"""Where everything of a run lies on tmpfs; the only place that builds these names.

    <memory_dir>/<job>/<run_id>/
        owner.json                                        uid that owns the run; checked at attach
        decision.json                                     newest recorded decision, replaced by rename
        distrusted.json                                   snapshots that must not be restored, replaced by rename
        attempt-0003/step-00001200/
            rank-00003-of-00008.safetensors               a committed shard (data first, by rename)
            rank-00003-of-00008.manifest.json             its commit record (published last, by rename)
            parity/plan-<id>.json                         the plan and all manifests of its group (StoredPlan)
            parity/plan-<id>.stripe-02.index-0            parity bytes (by rename from <incarnation>.tmp)
            parity/plan-<id>.stripe-02.index-0.json       their commit record (published last, by rename)
        slots/rank-00003.1                                a slot being filled, or free
        slots/holder-<slot_id>.json                       the process that was last given that inode (wherever it lies now)
        staging/rank-00003-of-00008.<digest16>.part       a shard being fetched or rebuilt
        staging/rank-00003-of-00008.<digest16>.json       its manifest: puts are accepted only once it is here
        staging/rank-00003-of-00008.<digest16>.stripe-02  empty marker: that stripe's range is complete
        staging/rank-00003-of-00008.<digest16>.sparse     chunks of a shard for ranks of another layout; others are holes
        staging/rank-00003-of-00008.<digest16>.sparse.json   its manifest
        staging/rank-00003-of-00008.<digest16>.sparse.marks  a byte for each chunk: 1 once it is there
        quarantine/<name>.json                            what failed verification, why, and its manifest (its bytes are freed)

Temporary names end in ``.<incarnation>.tmp``; a starting daemon removes those of others. Pure path arithmetic.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from backstay.format.manifest import Manifest
from backstay.ids import RunKey, SnapshotKey
from backstayd.core.messages.plans import Plan, ShardCopy, ShardRecord

_SHARD = re.compile(r"rank-(\d{5,})-of-(\d{5,})\.safetensors\Z")
_STEP = re.compile(r"attempt-(\d{4,})/step-(\d{8,})\Z")
_SLOT = re.compile(r"rank-(\d{5,})\.(\d+)\Z")
_HOLDER = re.compile(r"holder-([0-9a-f]+-[0-9a-f]+)\.json\Z")
_STAGED = re.compile(
    r"rank-(\d{5,})-of-(\d{5,})\.([0-9a-f]{16})\.(?:part|json|stripe-\d{2,}|sparse(?:\.json|\.marks)?)\Z"
)
_FRAGMENT = re.compile(r"plan-([0-9a-f]{32})\.stripe-(\d{2,})\.index-(\d+)\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRef:
    """Names the bytes of one shard: ``digest`` is that of its manifest."""

    run: str
    key: SnapshotKey
    rank: int
    world_size: int
    digest: str

    @classmethod
    def of(cls, run: str, record: ShardRecord | ShardCopy | Manifest) -> Self:
        key = SnapshotKey(record.attempt, record.step)
        return cls(run=run, key=key, rank=record.rank, world_size=record.world_size, digest=record.digest)

    def __str__(self) -> str:
        return f"rank {self.rank} of step {self.key.step}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FragmentRef:
    """Names the bytes of one parity fragment; without ``stripe`` and ``index`` the plan it belongs to."""

    run: str
    key: SnapshotKey
    plan_id: str
    stripe: int = -1
    index: int = -1

    @classmethod
    def of(cls, plan: Plan, stripe: int = -1, index: int = -1) -> Self:
        return cls(run=plan.run, key=plan.key, plan_id=plan.plan_id, stripe=stripe, index=index)


@dataclass(frozen=True, slots=True)
class RunPaths:
    """All paths of one run below ``memory_dir``."""

    memory_dir: Path
    run: str

    @property
    def root(self) -> Path:
        key = RunKey.parse(self.run)
        return self.memory_dir / key.job / key.run_id

    @property
    def owner(self) -> Path:
        return self.root / "owner.json"

    @property
    def decision(self) -> Path:
        return self.root / "decision.json"

    @property
    def distrusted(self) -> Path:
        return self.root / "distrusted.json"

    @property
    def slots(self) -> Path:
        return self.root / "slots"

    @property
    def staging(self) -> Path:
        return self.root / "staging"

    @property
    def quarantine(self) -> Path:
        return self.root / "quarantine"

    def slot(self, rank: int, number: int) -> Path:
        return self.slots / f"rank-{rank:05d}.{number}"

    def holder(self, slot_id: str) -> Path:
        return self.slots / f"holder-{slot_id}.json"

    def snapshot(self, key: SnapshotKey) -> Path:
        return self.root / f"attempt-{key.attempt:04d}" / f"step-{key.step:08d}"

    def shard(self, key: SnapshotKey, rank: int, world_size: int) -> Path:
        return self.snapshot(key) / f"{_rank_name(rank, world_size)}.safetensors"

    def manifest(self, key: SnapshotKey, rank: int, world_size: int) -> Path:
        return self.snapshot(key) / f"{_rank_name(rank, world_size)}.manifest.json"

    def parity(self, key: SnapshotKey) -> Path:
        return self.snapshot(key) / "parity"

    def plan(self, key: SnapshotKey, plan_id: str) -> Path:
        return self.parity(key) / f"plan-{plan_id}.json"

    def fragment(self, key: SnapshotKey, plan_id: str, *, stripe: int, index: int) -> Path:
        return self.parity(key) / f"plan-{plan_id}.stripe-{stripe:02d}.index-{index}"

    def fragment_record(self, key: SnapshotKey, plan_id: str, *, stripe: int, index: int) -> Path:
        path = self.fragment(key, plan_id, stripe=stripe, index=index)
        return path.with_name(path.name + ".json")

    def staged(self, rank: int, world_size: int, digest: str) -> Path:
        return self.staging / f"{_rank_name(rank, world_size)}.{digest[:16]}.part"

    def staged_manifest(self, rank: int, world_size: int, digest: str) -> Path:
        return self.staging / f"{_rank_name(rank, world_size)}.{digest[:16]}.json"

    def staged_stripe(self, rank: int, world_size: int, *, digest: str, stripe: int) -> Path:
        return self.staging / f"{_rank_name(rank, world_size)}.{digest[:16]}.stripe-{stripe:02d}"

    def sparse(self, rank: int, world_size: int, digest: str) -> Path:
        return self.staging / f"{_rank_name(rank, world_size)}.{digest[:16]}.sparse"

    def sparse_manifest(self, rank: int, world_size: int, digest: str) -> Path:
        return self.staging / f"{_rank_name(rank, world_size)}.{digest[:16]}.sparse.json"

    def sparse_marks(self, rank: int, world_size: int, digest: str) -> Path:
        return self.staging / f"{_rank_name(rank, world_size)}.{digest[:16]}.sparse.marks"


def parse_snapshot(path: Path) -> SnapshotKey | None:
    """The key named by a directory ``attempt-NNNN/step-NNNNNNNN``, or None."""
    match = _STEP.search(path.as_posix())
    return SnapshotKey(int(match[1]), int(match[2])) if match else None


def parse_shard(path: Path) -> tuple[int, int] | None:
    """(rank, world size) named by a shard file, or None."""
    match = _SHARD.match(path.name)
    return (int(match[1]), int(match[2])) if match else None


def parse_fragment(path: Path) -> tuple[str, int, int] | None:
    """(plan id, stripe, index) named by a parity file, or None."""
    match = _FRAGMENT.match(path.name)
    return (match[1], int(match[2]), int(match[3])) if match else None


def parse_slot(path: Path) -> tuple[int, int] | None:
    """(rank, number) named by a slot file, or None."""
    match = _SLOT.match(path.name)
    return (int(match[1]), int(match[2])) if match else None


def parse_holder(path: Path) -> str | None:
    """The slot id named by a holder file, or None."""
    match = _HOLDER.match(path.name)
    return match[1] if match else None


def parse_staged(path: Path) -> tuple[int, int, str] | None:
    """(rank, world size, first 16 digits of the digest) named by a file in staging, or None."""
    match = _STAGED.match(path.name)
    return (int(match[1]), int(match[2]), match[3]) if match else None


def _rank_name(rank: int, world_size: int) -> str:
    return f"rank-{rank:05d}-of-{world_size:05d}"
