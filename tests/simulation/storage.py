"""Simulated durable storage: directories of shards with a completion record, as honest as a file system; it can be down.

Knows nothing of who decides. A record is created by one writer and never over another one; it goes first when pruned.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from backstay.ids import SnapshotKey
from backstayd.core.records import PersistedSnapshot, ShardRecord, Survey

URL = "file:///storage"


@dataclass(slots=True)
class Directory:
    """What lies in the directory of one snapshot. ``shards``: rank and world size to the digest of the bytes."""

    shards: dict[tuple[int, int], str] = field(default_factory=dict)
    record: PersistedSnapshot | None = None


@dataclass(slots=True)
class Storage:
    is_up: bool = True
    down_until_s: float = 0.0
    runs: dict[str, dict[SnapshotKey, Directory]] = field(default_factory=dict)

    def survey(self, run: str, survey_id: str) -> Survey:
        url = f"{URL}/{run}"
        if not self.is_up:
            return Survey(url=url, survey_id=survey_id, error="it does not answer")
        found = self.runs.get(run, {})
        return Survey(
            url=url,
            survey_id=survey_id,
            is_done=True,
            is_known=bool(found),
            snapshots=tuple(found[key].record for key in sorted(found) if found[key].record),  # type: ignore[misc]
            partial=tuple(key for key in sorted(found) if found[key].record is None),
        )

    def write_shard(self, snapshot: PersistedSnapshot, rank: int, held: ShardRecord) -> str:
        """Why it was not written; "" when it lies there."""
        if not self.is_up:
            return "it does not answer"
        directory = self.runs.setdefault(snapshot.run, {}).setdefault(snapshot.key, Directory())
        there = directory.shards.setdefault((rank, snapshot.world_size), held.digest)
        return "" if there == held.digest else "occupied"

    def write_record(self, snapshot: PersistedSnapshot) -> str:
        if not self.is_up:
            return "it does not answer"
        directory = self.runs.get(snapshot.run, {}).get(snapshot.key, Directory())
        for shard in snapshot.shards:
            if directory.shards.get((shard.rank, snapshot.world_size)) != shard.digest:
                return f"the shard of rank {shard.rank} is not there"
        if directory.record is not None and directory.record.snapshot_id != snapshot.snapshot_id:
            return "occupied"
        directory.record = directory.record or snapshot
        return ""

    def prune(self, run: str, key: SnapshotKey) -> bool:
        if self.is_up:
            self.runs.get(run, {}).pop(key, None)
        return self.is_up

    def read(self, run: str, key: SnapshotKey, rank: int, digest: str) -> bool:
        """Whether the shard with that digest can be read from a whole snapshot."""
        directory = self.runs.get(run, {}).get(key)
        record = directory.record if directory is not None else None
        if not self.is_up or directory is None or record is None:
            return False
        return directory.shards.get((rank, record.world_size)) == digest

    def records(self, run: str) -> list[PersistedSnapshot]:
        return [directory.record for directory in self.runs.get(run, {}).values() if directory.record is not None]
