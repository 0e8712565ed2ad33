"""What the supervisor asks of a coder about durable storage: frozen records, part of the language in :mod:`jobs`."""

from __future__ import annotations

from dataclasses import dataclass

from backstay.ids import SnapshotKey
from backstayd.core.records import PersistedSnapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class SurveyStorage:
    """List what lies under ``url``, the directory of ``run``; the answer is ``JobResult.survey``."""

    run: str
    url: str
    survey_id: str
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadShard:
    """Copy a committed shard of this node into the run's directory ``url``, its manifest after it.

    ``mark`` tells this node's unfinished files from those of others; ``bandwidth_bytes_per_s`` is of the whole node.
    """

    run: str
    attempt: int
    step: int
    rank: int
    world_size: int
    size_bytes: int
    digest: str
    url: str
    mark: str
    bandwidth_bytes_per_s: int
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteRecord:
    """Check that every shard and manifest of ``snapshot`` lies in the run's directory ``url``, then write its record."""

    snapshot: PersistedSnapshot
    url: str
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneSnapshot:
    """Remove a snapshot, or what there is of one, from the run's directory ``url``: the record first."""

    run: str
    url: str
    key: SnapshotKey
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _PersistedShard:
    """A whole shard in ``url``, the directory of its snapshot."""

    run: str
    attempt: int
    step: int
    rank: int
    world_size: int
    size_bytes: int
    digest: str
    url: str
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchPersisted(_PersistedShard):
    """Copy a shard into staging, and leave it complete there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyPersisted(_PersistedShard):
    """Check every chunk of a shard where it lies, on a file system of this machine; the answer is ``JobResult.file_id``."""


StorageJob = SurveyStorage | UploadShard | WriteRecord | PruneSnapshot | FetchPersisted | VerifyPersisted
STORAGE_JOBS = (SurveyStorage, UploadShard, WriteRecord, PruneSnapshot, FetchPersisted, VerifyPersisted)
