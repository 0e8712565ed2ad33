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
from backstayd.store.paths import FragmentRef, ShardRef


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
class _ShardJob:
    """A job about one shard."""

    shard: ShardRef
    deadline_s: float

    @property
    def run(self) -> str:
        return self.shard.run


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchShard(_ShardJob):
    """Copy a whole shard into staging, verified, from the first of ``addresses`` that serves it or from ``url``, the
    snapshot's directory on durable storage."""

    size_bytes: int
    addresses: tuple[str, ...] = ()
    url: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchManifests:
    """Put the manifests of ``shards`` of one snapshot into staging here, from the first of ``addresses`` that has it, or
    from ``url``, the snapshot's directory on durable storage."""

    shards: tuple[ShardRef, ...]
    addresses: tuple[str, ...] = ()
    url: str = ""
    deadline_s: float

    @property
    def run(self) -> str:
        return self.shards[0].run


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchChunks(_ShardJob):
    """Bring chunks of a shard into its sparse staging here, from the first of ``addresses`` that serves them verified.

    ``firsts[i]`` and the ``counts[i] - 1`` chunks after it. ``is_here``: the shard is published on this node, they are only
    verified. ``url``: they are read from the snapshot's directory on durable storage.
    """

    firsts: tuple[int, ...]
    counts: tuple[int, ...]
    addresses: tuple[str, ...] = ()
    is_here: bool = False
    url: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyShard(_ShardJob):
    """Check every chunk of a shard on this node against its manifest (``is_staged``: the one in staging).

    ``url``: of the shard in that directory on a file system of this machine; the answer is ``JobResult.file_id``.
    """

    is_staged: bool = False
    url: str = ""


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
class UploadShard(_ShardJob):
    """Copy a committed shard of this node into the run's directory ``url``, its manifest after it.

    ``mark`` tells this node's unfinished files from those of others; ``bandwidth_bytes_per_s`` is of the whole node.
    """

    size_bytes: int
    url: str
    mark: str
    bandwidth_bytes_per_s: int


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


StorageJob = SurveyStorage | UploadShard | CheckUploaded | WriteRecord | PruneSnapshot | MarkSnapshot
Job = (
    EncodeStripe | FetchPlan | DecodeStripe | FetchShard | FetchManifests | FetchChunks | VerifyShard | VerifyFragment
    | StorageJob
)  # fmt: skip


def uses_storage(job: Job) -> bool:
    """Whether the job reads or writes durable storage."""
    if isinstance(job, FetchShard | FetchManifests | FetchChunks | VerifyShard):
        return job.url != ""
    return isinstance(job, StorageJob)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrupt:
    """A source that failed verification and must be quarantined where it lies: a shard or a parity fragment."""

    node: str  # bulk address of the holder, "" = this node
    shard: ShardRef | None = None
    fragment: FragmentRef | None = None
    detail: str = ""  # which chunk, expected and found crc
    is_misfit: bool = False  # its digests are right, and it does not fit the other fragments of its stripe

    @property
    def ref(self) -> ShardRef | FragmentRef:
        ref = self.shard or self.fragment
        assert ref is not None
        return ref

    def __str__(self) -> str:
        """What is corrupt."""
        ref = self.ref
        if isinstance(ref, ShardRef):
            return f"shard rank {ref.rank} of step {ref.key.step}"
        return f"parity stripe {ref.stripe} index {ref.index} of plan {ref.plan_id[:8]}, step {ref.key.step}"


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
    #: Where the time went: "read", "crc", "encode", "put", "write".
    seconds: dict[str, float] = field(default_factory=dict)
    #: Bytes of an encoding: "read" from members, "encoded" (data put into the codec), "kept" (parity from an older plan).
    moved: dict[str, int] = field(default_factory=dict)
    survey: Survey | None = None  # of SurveyStorage
    persisted: PersistedSnapshot | None = None  # of WriteRecord: as it was written
    file_id: str = ""  # of VerifyShard on durable storage: which file was read


@dataclass(frozen=True, slots=True, kw_only=True)
class CoderEvent:
    """Something a coder put on this node's tmpfs, so that the supervisor need not poll; only a hint: the files are the truth.

    ``kind`` is ``"plan_stored"``, ``"fragment_stored"`` (own or from a peer), ``"stripe_staged"`` (the range of a stripe of
    one staged shard is complete), ``"shard_staged"`` (a fetched shard is complete and verified in staging),
    ``"shard_uploading"`` (``size_bytes`` of a shard are on durable storage), or ``"traffic"`` (``sent_bytes`` and
    ``received_bytes`` of peers since the event before).
    """

    kind: str
    shard: ShardRef | None = None
    fragment: FragmentRef | None = None
    size_bytes: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0


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
