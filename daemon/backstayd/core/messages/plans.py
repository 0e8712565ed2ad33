"""Shards, parity fragments, protection plans and rebuilds."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from backstay.format import json_records
from backstay.ids import SnapshotKey


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """A committed shard on a node."""

    attempt: int
    step: int
    rank: int
    world_size: int
    size_bytes: int
    digest: str  # SHA-256 of its manifest: the identity of its bytes
    world_id: str = ""  # who wrote it, by the manifest: shards of two worlds are never one snapshot
    layout: str = ""  # which boxes of which tensors the rank held, by the manifest; "" = not known

    @property
    def key(self) -> SnapshotKey:
        return SnapshotKey(self.attempt, self.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeShard:
    """One shard of a member's volume."""

    rank: int
    size_bytes: int
    digest: str
    layout: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One node of a group, at its place in it."""

    node: str
    incarnation: str
    bulk_address: str
    shards: tuple[VolumeShard, ...] = ()  # its volume: these one after another, in rank order; may be empty


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """An immutable geometry for one snapshot and one group: parity of one plan is never taken for that of another."""

    plan_id: str = ""  # SHA-256 over everything else (:meth:`sealed`); part of every name of a parity file
    run: str
    snapshot_id: str
    attempt: int
    step: int
    world_size: int
    m: int  # parity fragments of each stripe
    chunk_bytes: int
    members: tuple[Member, ...]
    serial: int = 0  # tells apart plans over the same members: a repair, a second try

    @property
    def k(self) -> int:
        """Data fragments of each stripe."""
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
    """Who shall hold one lost shard."""

    member_index: int
    rank: int
    digest: str
    node: str
    bulk_address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FragmentSource:
    """Where one fragment of a stripe is read."""

    stripe: int
    index: int  # data 0..k-1 in geometry order, read as shards; parity k..k+m-1
    node: str
    bulk_address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RebuildTask:
    """One node decodes one stripe: all lost data blocks of it from a single read, sent to their targets."""

    stripe: int
    decoder: str
    sources: tuple[FragmentSource, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuild:
    """Recompute lost shards of ``plan``."""

    rebuild_id: str  # SHA-256 over the rest (:func:`seal_rebuild`)
    plan: Plan
    targets: tuple[RebuildTarget, ...]
    tasks: tuple[RebuildTask, ...]


def seal_rebuild(rebuild: Rebuild) -> Rebuild:
    """The same rebuild under the identity of its content (first 32 hex digits of the SHA-256)."""
    bare = replace(rebuild, rebuild_id="")
    return replace(bare, rebuild_id=hashlib.sha256(json_records.dumps(bare)).hexdigest()[:32])


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantined:
    """A source that failed verification: its bytes are quarantined and never used."""

    what: str  # for people: "shard rank 3 of step 12", "parity stripe 2 index 0 of plan ab12"
    attempt: int
    step: int
    reason: str
    node: str = ""  # who holds it, if the reporting node read it from another; "" = the reporting node
    rank: int = -1  # of a shard; -1: it is a parity fragment
    plan_id: str = ""  # of a parity fragment, as are the next two
    stripe: int = -1
    index: int = -1
    is_misfit: bool = False  # its digests are right and it does not fit its stripe, as its reader proved


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardCopy:
    """Copy a shard that only draining nodes hold; it is read from one of ``holders``."""

    attempt: int
    step: int
    rank: int
    world_size: int
    size_bytes: int
    digest: str
    holders: tuple[str, ...]
