"""Snapshots on durable storage: what lies there, what is copied there, and what is deleted."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from backstay.ids import SnapshotKey
from backstayd.core.messages.decisions import Distrusted, Lineage
from backstayd.core.messages.plans import VolumeShard


@dataclass(frozen=True, slots=True, kw_only=True)
class PersistedSnapshot:
    """The completion record of a snapshot on durable storage: written last, atomically, as ``snapshot.json`` beside the
    shards. Its directory holds a snapshot only if this is there.

    ``lineage`` is that of the decision it was trained under, and ``generation`` the number of the newest decision then;
    ``serial`` counts the persisted snapshots of the run.
    """

    run: str
    attempt: int
    step: int
    world_size: int
    snapshot_id: str
    shards: tuple[VolumeShard, ...]
    lineage: tuple[Lineage, ...] = ()
    serial: int = 0
    unix_s: float = 0.0
    writer: str = ""
    generation: int = 0
    owner: str = ""  # the user whose run it is, a number; "" = anybody's, as an import is

    @property
    def key(self) -> SnapshotKey:
        return SnapshotKey(self.attempt, self.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """A directory on durable storage whose completion record is there and cannot be used; ``reason`` says why."""

    attempt: int
    step: int
    reason: str

    @property
    def key(self) -> SnapshotKey:
        return SnapshotKey(self.attempt, self.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What one node found of a run under ``url``. ``is_known``: something lies there, whole or not; ``partial``: directories
    of snapshots without a completion record; ``unreadable``: with one that cannot be used."""

    url: str
    is_done: bool = False
    error: str = ""
    is_known: bool = False
    snapshots: tuple[PersistedSnapshot, ...] = ()
    survey_id: str = ""
    partial: tuple[SnapshotKey, ...] = ()
    unreadable: tuple[Unreadable, ...] = ()
    distrusted: tuple[Distrusted, ...] = ()  # marks that lie there


class UploadState(enum.StrEnum):
    UPLOADING = "uploading"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """How far one shard is on its way from a node to durable storage; ``rank`` -1 is the completion record."""

    snapshot_id: str
    rank: int
    state: UploadState
    done_bytes: int = 0
    total_bytes: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadTask:
    """Copy the shards of ``ranks`` of ``snapshot`` to storage; ``is_last``: all shards are there, write the record now."""

    snapshot: PersistedSnapshot
    ranks: tuple[int, ...] = ()
    is_last: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A snapshot on durable storage by name; ``snapshot_id`` "": a directory without a completion record."""

    attempt: int
    step: int
    snapshot_id: str = ""

    @property
    def key(self) -> SnapshotKey:
        return SnapshotKey(self.attempt, self.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageDesired:
    """What a node does with durable storage for one run. ``url`` is the run's directory; ``survey_id``: list what lies there
    and answer under this name ("": no need).

    Records, prunes and marks are acts on storage that others share. They hold only while this is confirmed by the
    coordinator (``node/reconcile/durable.py``), and only if storage is as it was when they were ordered: ``prunes`` are
    deleted, record first, because ``grounds`` lie there and may be restored; nothing is done where attempts above
    ``newest_attempt`` lie. ``distrust``: marks to write beside the records; ``trust``: marks to strike out.
    """

    url: str
    uploads: tuple[UploadTask, ...] = ()
    prunes: tuple[Stored, ...] = ()
    grounds: tuple[Stored, ...] = ()
    newest_attempt: int = 0
    distrust: tuple[Distrusted, ...] = ()
    trust: tuple[Distrusted, ...] = ()
    bandwidth_bytes_per_s: int = 0  # 0: no cap
    survey_id: str = ""
    persisted_step: int = 0  # of the newest persisted snapshot; 0: none
