"""What the supervisor asks of a coder about durable storage: frozen records, part of the language in :mod:`jobs`."""

from __future__ import annotations

from dataclasses import dataclass

from backstayd.core.messages.decisions import Distrusted
from backstayd.core.messages.durable import PersistedSnapshot, Stored


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
class CheckUploaded:
    """Check that every shard and manifest of ``snapshot`` lies in the run's directory ``url``."""

    snapshot: PersistedSnapshot
    url: str
    deadline_s: float

    @property
    def run(self) -> str:
        return self.snapshot.run


@dataclass(frozen=True, slots=True, kw_only=True)
class _Act:
    """What changes storage that others share, in the run's directory ``url``.

    Not begun from ``act_before_s`` on (seconds since this machine's boot): the coordinator may have taken it back. Not done
    where attempts above ``newest_attempt`` lie: a history that the coordinator does not know of is newer than its own.
    """

    url: str
    newest_attempt: int
    act_before_s: float
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteRecord(_Act):
    """Write the completion record of ``snapshot``, whose parts were checked, unless it is distrusted there."""

    snapshot: PersistedSnapshot

    @property
    def run(self) -> str:
        return self.snapshot.run


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneSnapshot(_Act):
    """Remove ``target``, the record first, if it is what lies there and ``grounds`` lie there as well, not distrusted."""

    run: str
    target: Stored
    grounds: tuple[Stored, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkSnapshot(_Act):
    """Write the mark that ``item`` is not restored again; ``is_trusted``: strike it out."""

    run: str
    item: Distrusted
    is_trusted: bool = False


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


StorageJob = (
    SurveyStorage | UploadShard | CheckUploaded | WriteRecord | PruneSnapshot | MarkSnapshot | FetchPersisted
    | VerifyPersisted
)  # fmt: skip
STORAGE_JOBS = (
    SurveyStorage, UploadShard, CheckUploaded, WriteRecord, PruneSnapshot, MarkSnapshot, FetchPersisted, VerifyPersisted,
)  # fmt: skip
