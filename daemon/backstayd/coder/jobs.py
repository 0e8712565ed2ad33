"""What the supervisor asks of a coder process, and what it hears back: frozen records, one JSON line each.

A job is stateless and idempotent: its inputs and outputs are files and peers named in it. A coder that dies is restarted
and the supervisor, being level-triggered, asks again.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from typing import Any

from backstay.errors import IntegrityError
from backstay.format import json_records
from backstayd.core.messages.decisions import Distrusted
from backstayd.core.messages.durable import PersistedSnapshot, Stored, Survey
from backstayd.core.messages.plans import Plan, Rebuild
from backstayd.store.record_files import ShardChunks, StoredFragment


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeStripe:
    """Encode stripe ``stripe`` of ``plan`` (this node is its member ``stripe``): store the plan with all manifests of the
    group, read the k data blocks, keep parity 0 here, put parity 1..m-1 to their members. With m = 0: store the plan only."""

    plan: Plan
    stripe: int
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchPlan:
    """Get a stored plan (with manifests) from any of ``addresses`` and store it here."""

    plan: Plan
    addresses: tuple[str, ...]
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeStripe:
    """Do this node's task for ``stripe`` of ``rebuild``: read k fragments, decode all lost data blocks of it,
    put them to their owners."""

    rebuild: Rebuild
    stripe: int
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchShard:
    """Copy a whole shard from the first of ``addresses`` that serves it verified, into staging, and leave it complete there."""

    run: str
    attempt: int
    step: int
    rank: int
    world_size: int
    size_bytes: int
    digest: str
    addresses: tuple[str, ...]
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchManifests:
    """Put the manifests of shards of one snapshot into staging here: ``digests[i]`` of ``ranks[i]``, from the first of
    ``addresses`` that has it, or from ``url``, the snapshot's directory on durable storage."""

    run: str
    attempt: int
    step: int
    world_size: int
    ranks: tuple[int, ...]
    digests: tuple[str, ...]
    addresses: tuple[str, ...] = ()
    url: str = ""
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchChunks:
    """Bring chunks of a shard into its sparse staging here, from the first of ``addresses`` that serves them verified.

    ``firsts[i]`` and the ``counts[i] - 1`` chunks after it. ``is_here``: the shard is published on this node, they are only
    verified. ``url``: they are read from the snapshot's directory on durable storage.
    """

    run: str
    attempt: int
    step: int
    rank: int
    world_size: int
    digest: str
    firsts: tuple[int, ...]
    counts: tuple[int, ...]
    addresses: tuple[str, ...] = ()
    is_here: bool = False
    url: str = ""
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyShard:
    """Check every chunk of a shard on this node against its manifest (``is_staged``: the one in staging)."""

    run: str
    attempt: int
    step: int
    rank: int
    world_size: int
    digest: str
    is_staged: bool = False
    deadline_s: float = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyFragment:
    """Check every chunk of a parity fragment on this node against its record."""

    plan: Plan
    stripe: int
    index: int
    deadline_s: float = 600.0


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
Job = (
    EncodeStripe | FetchPlan | DecodeStripe | FetchShard | FetchManifests | FetchChunks | VerifyShard | VerifyFragment
    | StorageJob
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrupt:
    """A source that failed verification and must be quarantined where it lies."""

    node: str  # bulk address of the holder, "" = this node
    run: str
    attempt: int
    step: int
    rank: int = -1  # a shard, or
    world_size: int = 0
    digest: str = ""
    plan_id: str = ""  # a parity fragment
    stripe: int = -1
    index: int = -1
    detail: str = ""  # which chunk, expected and found crc
    is_misfit: bool = False  # its digests are right, and it does not fit the other fragments of its stripe


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """``error_class`` is "" on success, else a key of ``backstay.errors.ERROR_CLASSES``."""

    job_id: int
    error_class: str = ""
    reason: str = ""
    message: str = ""
    corrupt: tuple[Corrupt, ...] = ()
    done_bytes: int = 0
    flipped_in_flight: int = 0  # chunks that failed their crc once and were right when read again
    seconds: dict[str, float] = field(
        default_factory=dict
    )  # where the time went: "read", "crc", "encode", "put", "write"
    moved: dict[str, int] = field(
        default_factory=dict
    )  # bytes of an encoding: "read" from members, "encoded" (data put into the codec), "kept" (parity from an older plan)
    survey: Survey | None = None  # of SurveyStorage
    persisted: PersistedSnapshot | None = None  # of WriteRecord: as it was written
    file_id: str = ""  # of VerifyPersisted: which file was read


@dataclass(frozen=True, slots=True, kw_only=True)
class CoderEvent:
    """Something a coder put on this node's tmpfs, so that the supervisor need not poll; only a hint: the files are the truth.

    ``kind`` is ``"plan_stored"``, ``"fragment_stored"`` (own or from a peer), ``"stripe_staged"`` (the range of ``stripe``
    of one staged shard is complete), ``"shard_staged"`` (a fetched shard is complete and verified in staging),
    ``"shard_uploading"`` (``size_bytes`` of a shard are on durable storage), ``"traffic"`` (``sent_bytes`` and
    ``received_bytes`` of peers since it said so last), ``"suspect_shard"`` or
    ``"suspect_fragment"`` (a peer read bytes of this node that failed verification: verify them and quarantine).
    """

    kind: str
    run: str
    attempt: int = 0
    step: int = 0
    plan_id: str = ""
    stripe: int = -1
    index: int = -1
    rank: int = -1
    world_size: int = 0
    digest: str = ""
    size_bytes: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0


def shard_event(kind: str, chunks: ShardChunks, *, stripe: int = -1) -> CoderEvent:
    """An event about a shard."""
    return CoderEvent(
        kind=kind,
        run=chunks.run,
        attempt=chunks.attempt,
        step=chunks.step,
        rank=chunks.rank,
        world_size=chunks.world_size,
        digest=chunks.digest,
        stripe=stripe,
        size_bytes=chunks.size_bytes,
    )


def fragment_event(kind: str, stored: StoredFragment) -> CoderEvent:
    """An event about a parity fragment."""
    return CoderEvent(
        kind=kind,
        run=stored.run,
        attempt=stored.attempt,
        step=stored.step,
        plan_id=stored.plan_id,
        stripe=stored.stripe,
        index=stored.index,
        size_bytes=stored.size_bytes,
    )


JOB_KINDS: dict[str, type[Job]] = {kind.__name__: kind for kind in typing.get_args(Job)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A line to a coder: start ``job`` of ``kind``, or, with ``kind`` = ``"cancel"``, stop the job of that id."""

    job_id: int
    kind: str
    job: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A line from a coder: one of the two."""

    result: JobResult | None = None
    event: CoderEvent | None = None


def job_request(job_id: int, job: Job) -> bytes:
    """The line that starts ``job``."""
    return json_records.dumps(Request(job_id=job_id, kind=type(job).__name__, job=json_records.to_json(job))) + b"\n"


def parse_job(request: Request) -> Job:
    """The job of a request line; raises IntegrityError for an unknown kind or a malformed body."""
    if request.kind not in JOB_KINDS:
        raise IntegrityError(f"unknown coder job {request.kind!r}", reason="bad_record")
    return json_records.from_json(JOB_KINDS[request.kind], request.job)
