"""Simulated durable storage: directories of shards with a completion record, as honest as a file system; it can be down.

Knows nothing of who decides. Nothing there is replaced: a shard or record of another history stays. Acts look at what lies
there first, as ``coder/storage_acts.py`` does; a record goes first when its snapshot is pruned.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from backstay.ids import SnapshotKey
from backstayd.core.inventory.distrust import why_tainted
from backstayd.core.messages.decisions import Distrusted
from backstayd.core.messages.durable import PersistedSnapshot, Stored, Survey
from backstayd.core.messages.plans import ShardRecord

URL = "file:///storage"
DOWN = "it does not answer"


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
    marks: dict[str, dict[str, Distrusted]] = field(default_factory=dict)  # run, snapshot id

    def survey(self, run: str, survey_id: str) -> Survey:
        url = f"{URL}/{run}"
        if not self.is_up:
            return Survey(url=url, survey_id=survey_id, error=DOWN)
        found = self.runs.get(run, {})
        marks = self.marks.get(run, {})
        return Survey(
            url=url,
            survey_id=survey_id,
            is_done=True,
            is_known=bool(found),
            snapshots=tuple(found[key].record for key in sorted(found) if found[key].record),  # type: ignore[misc]
            partial=tuple(key for key in sorted(found) if found[key].record is None),
            distrusted=tuple(marks[name] for name in sorted(marks)),
        )

    def write_shard(self, snapshot: PersistedSnapshot, rank: int, held: ShardRecord) -> str:
        """Why it was not written; "" when it lies there."""
        if not self.is_up:
            return DOWN
        directory = self.runs.setdefault(snapshot.run, {}).setdefault(snapshot.key, Directory())
        there = directory.shards.setdefault((rank, snapshot.world_size), held.digest)
        return "" if there == held.digest else "occupied"

    def write_record(self, snapshot: PersistedSnapshot, *, newest_attempt: int) -> str:
        if not self.is_up:
            return DOWN
        directory = self.runs.get(snapshot.run, {}).get(snapshot.key, Directory())
        for shard in snapshot.shards:
            if directory.shards.get((shard.rank, snapshot.world_size)) != shard.digest:
                return f"the shard of rank {shard.rank} is not there"
        if self._newest(snapshot.run) > newest_attempt:
            return "superseded"
        if self._why_tainted(snapshot):
            return "distrusted"
        if directory.record is not None and directory.record.snapshot_id != snapshot.snapshot_id:
            return "occupied"
        directory.record = directory.record or snapshot
        return ""

    def prune(self, run: str, target: Stored, *, grounds: tuple[Stored, ...], newest_attempt: int) -> str:
        """Why it was not removed; "" when it is gone."""
        if not self.is_up:
            return DOWN
        if self._newest(run) > newest_attempt:
            return "superseded"
        found = self.runs.get(run, {})
        stays = [found.get(kept.key, Directory()).record for kept in grounds]
        for kept, record in zip(grounds, stays, strict=True):
            if record is None or record.snapshot_id != kept.snapshot_id or self._why_tainted(record):
                return "changed"
        there = found.get(target.key, Directory()).record
        if not grounds or (there is not None and there.snapshot_id != target.snapshot_id):
            return "changed"
        found.pop(target.key, None)
        return ""

    def mark(self, run: str, item: Distrusted) -> str:
        if self.is_up:
            self.marks.setdefault(run, {})[item.snapshot_id] = item
        return "" if self.is_up else DOWN

    def strike(self, run: str, item: Distrusted) -> str:
        if self.is_up:
            self.marks.get(run, {}).pop(item.snapshot_id, None)
        return "" if self.is_up else DOWN

    def _newest(self, run: str) -> int:
        return max((key.attempt for key in self.runs.get(run, {})), default=0)

    def _why_tainted(self, record: PersistedSnapshot) -> str:
        marks = self.marks.get(record.run, {}).values()
        return why_tainted(record.key, record.snapshot_id, record.lineage, marks)

    def read(self, run: str, key: SnapshotKey, rank: int, digest: str) -> bool:
        """Whether the shard with that digest can be read from a whole snapshot."""
        directory = self.runs.get(run, {}).get(key)
        record = directory.record if directory is not None else None
        if not self.is_up or directory is None or record is None:
            return False
        return directory.shards.get((rank, record.world_size)) == digest

    def records(self, run: str) -> list[PersistedSnapshot]:
        return [directory.record for directory in self.runs.get(run, {}).values() if directory.record is not None]
