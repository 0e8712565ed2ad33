"""Snapshots on durable storage: what lies there, what is copied there, and what is deleted."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from backstay.ids import SnapshotKey
from backstayd.core.messages.decisions import Distrusted, Lineage
from backstayd.core.messages.plans import VolumeShard


@dataclass(frozen=True, slots=True, kw_only=True)
class PersistedSnapshot:
    """The completion record of a snapshot on durable storage: ``snapshot.json`` beside its shards, written last and atomically.

    A directory without it holds no snapshot.
    """

    run: str
    attempt: int
    step: int
    world_size: int
    snapshot_id: str
    shards: tuple[VolumeShard, ...]
    lineage: tuple[Lineage, ...] = ()  # of the decision under which it was trained
    serial: int = 0  # counts the persisted snapshots of the run
    unix_s: float = 0.0
    writer: str = ""
    generation: int = 0  # number of the newest decision at that time
    owner: str = ""  # the user whose run it is, a number; "" = anybody's, as an import is

    @property
    def key(self) -> SnapshotKey:
        return SnapshotKey(self.attempt, self.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """A directory on durable storage whose completion record exists and cannot be used."""

    attempt: int
    step: int
    reason: str

    @property
    def key(self) -> SnapshotKey:
        return SnapshotKey(self.attempt, self.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What one node found of a run below ``url``."""

    url: str
    is_done: bool = False
    error: str = ""
    is_known: bool = False  # something of the run lies there, whole or not
    snapshots: tuple[PersistedSnapshot, ...] = ()
    survey_id: str = ""
    partial: tuple[SnapshotKey, ...] = ()  # directories without a completion record
    unreadable: tuple[Unreadable, ...] = ()
    distrusted: tuple[Distrusted, ...] = ()  # marks that lie there


class UploadState(enum.StrEnum):
    UPLOADING = "uploading"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """How far a node is with copying one shard to durable storage."""

    snapshot_id: str
    rank: int  # -1: the completion record
    state: UploadState
    done_bytes: int = 0
    total_bytes: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadTask:
    """Copy shards of a snapshot to durable storage."""

    snapshot: PersistedSnapshot
    ranks: tuple[int, ...] = ()  # whose shards
    is_last: bool = False  # all shards lie there: write the completion record


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A snapshot on durable storage, by name."""

    attempt: int
    step: int
    snapshot_id: str = ""  # "" = a directory without a completion record

    @property
    def key(self) -> SnapshotKey:
        return SnapshotKey(self.attempt, self.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageDesired:
    """What a node does with durable storage for one run.

    Records, prunes and marks are acts on storage that others share. They hold only while this is confirmed by the
    coordinator (``node/reconcile``), and only if storage is as it was when they were ordered: ``prunes`` are
    deleted, record first, because ``grounds`` lie there and may be restored; nothing is done where attempts above
    ``newest_attempt`` lie.
    """

    url: str  # the run's directory
    uploads: tuple[UploadTask, ...] = ()
    prunes: tuple[Stored, ...] = ()
    grounds: tuple[Stored, ...] = ()
    newest_attempt: int = 0
    distrust: tuple[Distrusted, ...] = ()  # marks to write beside the records
    trust: tuple[Distrusted, ...] = ()  # marks to remove
    bandwidth_bytes_per_s: int = 0  # 0: no cap
    survey_id: str = ""  # list what lies there and answer under this name; "" = no need
    persisted_step: int = 0  # of the newest persisted snapshot; 0: none
