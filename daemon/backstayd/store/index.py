"""What the store knows of one run, as values: always equal to what a fresh scan of the directory would find.

Holds no descriptors and touches no files; grants (who fills which slot) are the store's, for they are not on tmpfs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from backstay.errors import InvariantError
from backstay.ids import SnapshotKey
from backstayd.core.messages.decisions import Decision, Distrusted
from backstayd.core.messages.plans import FragmentRecord, Plan, Quarantined, ShardRecord
from backstayd.store.slot_holder import HolderRecord

UNKNOWN_UID = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldShard:
    """A published shard and the inode it lies in (``slot_id``)."""

    record: ShardRecord
    slot_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A file in ``slots/``: free, or being filled by whom the store granted it to."""

    rank: int
    number: int
    size_bytes: int
    slot_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedFile:
    rank: int
    world_size: int
    digest16: str
    size_bytes: int


@dataclass(slots=True)
class RunIndex:
    """Everything of one run on this node. Invariant: each inode (slot id) is in exactly one place."""

    run: str
    owner_uid: int = UNKNOWN_UID
    decision: Decision | None = None
    recorded_unix_s: float = 0.0  # when that was written
    distrusted: tuple[Distrusted, ...] = ()
    shards: dict[tuple[SnapshotKey, int], HeldShard] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    fragments: dict[FragmentRecord, int] = field(default_factory=dict)  # -> bytes
    slots: dict[tuple[int, int], Slot] = field(default_factory=dict)
    holders: dict[str, HolderRecord] = field(default_factory=dict)  # slot id -> who was last granted it
    staged: dict[tuple[int, str], StagedFile] = field(default_factory=dict)  # (rank, digest16)
    quarantined: dict[str, Quarantined] = field(default_factory=dict)  # name of the record in quarantine/

    @property
    def used_bytes(self) -> int:
        return (
            sum(shard.record.size_bytes for shard in self.shards.values())
            + sum(self.fragments.values())
            + sum(slot.size_bytes for slot in self.slots.values())
            + sum(staged.size_bytes for staged in self.staged.values())
        )

    @property
    def is_bare(self) -> bool:
        """Whether nothing lies here but, at most, whose name it is."""
        return self == RunIndex(run=self.run, owner_uid=self.owner_uid)

    def last_step(self, attempt: int, rank: int) -> int:
        """Newest step of ``rank`` committed in ``attempt``; 0 for none."""
        return max((key.step for key, owner in self.shards if owner == rank and key.attempt == attempt), default=0)

    def check_invariants(self) -> None:
        """Raise InvariantError if the index contradicts itself."""
        inodes = [shard.slot_id for shard in self.shards.values()] + [slot.slot_id for slot in self.slots.values()]
        if len(set(inodes)) != len(inodes):
            raise InvariantError(f"run {self.run}: one inode lies in two places: {sorted(inodes)}")
        for (key, rank), shard in self.shards.items():
            if (shard.record.key, shard.record.rank) != (key, rank):
                raise InvariantError(f"run {self.run}: shard {shard.record} is filed under {key}, rank {rank}")
        for place, slot in self.slots.items():
            if (slot.rank, slot.number) != place:
                raise InvariantError(f"run {self.run}: slot {slot} is filed under {place}")
        for fragment in self.fragments:
            if fragment.plan_id not in self.plans:
                raise InvariantError(f"run {self.run}: fragment {fragment} without its plan")
        for slot_id in self.holders:
            if slot_id not in inodes:
                raise InvariantError(f"run {self.run}: holder of {slot_id}, which is nowhere")
