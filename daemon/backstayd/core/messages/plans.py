"""Shards, parity fragments, protection plans and rebuilds. ``run`` is always ``job/run_id``."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from backstay.format import json_records
from backstay.ids import SnapshotKey


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
        return replace(bare, plan_id=hashlib.sha256(json_records.dumps(bare)).hexdigest()[:32])

    def is_sealed(self) -> bool:
        return self.plan_id != "" and self.sealed().plan_id == self.plan_id


@dataclass(frozen=True, slots=True, kw_only=True)
class FragmentRecord:
    """A parity fragment held on a node, with the plan and all manifests of the group beside it."""

    plan_id: str
    stripe: int
    index: int


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
    return replace(bare, rebuild_id=hashlib.sha256(json_records.dumps(bare)).hexdigest()[:32])


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
class ShardCopy:
    """Hold a copy of a shard that only nodes hold which will be stopped; ``holders`` are where it is read."""

    attempt: int
    step: int
    rank: int
    world_size: int
    size_bytes: int
    digest: str
    holders: tuple[str, ...]
