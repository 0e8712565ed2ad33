"""The small files beside the bytes: stored plans, fragment records and the chunk digests of a manifest.

A manifest is kept and checked as the exact bytes its digest names, so that a field this version does not know survives.
Reads and writes local files only.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import itertools
import json
import os
import stat
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from backstay.errors import CapacityError, IntegrityError, SnapshotNotFoundError
from backstay.format import json_records, versions
from backstay.format.manifest import CHUNK_BYTES, FORMAT_VERSION, Manifest, UnchangedRange
from backstay.ids import SnapshotKey
from backstayd.core.messages.plans import Plan
from backstayd.store.paths import FragmentRef, ShardRef

MAX_RECORD_BYTES: Final = 256 * 1024 * 1024
_sequence = itertools.count(1)


class _Chunked:
    """What has a digest for each of its chunks: eight hex digits of crc32c in ``chunk_crcs``."""

    __slots__ = ()
    size_bytes: int
    chunk_bytes: int
    chunk_crcs: str

    @property
    def chunk_count(self) -> int:
        return -(-self.size_bytes // self.chunk_bytes)

    def chunk_crc(self, index: int) -> int:
        return int(self.chunk_crcs[8 * index : 8 * index + 8], 16)

    def chunk_length(self, index: int) -> int:
        return min(self.chunk_bytes, self.size_bytes - index * self.chunk_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardChunks(_Chunked):
    """The part of a manifest that verification of bytes needs; ``digest`` is the manifest's, checked when this was read."""

    run: str
    attempt: int
    step: int
    rank: int
    world_size: int
    size_bytes: int
    chunk_bytes: int
    chunk_crcs: str
    format: int = FORMAT_VERSION
    digest: str = ""
    world_id: str = ""
    unchanged: tuple[UnchangedRange, ...] = ()

    @property
    def ref(self) -> ShardRef:
        return ShardRef(
            run=self.run,
            key=SnapshotKey(self.attempt, self.step),
            rank=self.rank,
            world_size=self.world_size,
            digest=self.digest,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFragment(_Chunked):
    """Commit record of one parity fragment; chunk c of the file begins at byte ``c * chunk_bytes``."""

    format: int = FORMAT_VERSION
    run: str
    attempt: int
    step: int
    plan_id: str
    stripe: int
    index: int
    size_bytes: int
    chunk_bytes: int = CHUNK_BYTES
    chunk_crcs: str = ""

    @property
    def ref(self) -> FragmentRef:
        return FragmentRef(
            run=self.run,
            key=SnapshotKey(self.attempt, self.step),
            plan_id=self.plan_id,
            stripe=self.stripe,
            index=self.index,
        )

    def check(self, plan: Plan, stripe: int, index: int) -> None:
        """Raise IntegrityError unless this is a sound record of that fragment of ``plan``."""
        if (self.plan_id, self.stripe, self.index, self.run) != (plan.plan_id, stripe, index, plan.run):
            raise IntegrityError(f"fragment record is of stripe {self.stripe} index {self.index} of {self.plan_id[:8]}")
        if not (0 <= stripe < len(plan.members) and 0 <= index < plan.m):
            raise IntegrityError(f"plan {plan.plan_id[:8]} has no parity at stripe {stripe} index {index}")
        check_crcs("fragment record", self.size_bytes, chunk_bytes=self.chunk_bytes, chunk_crcs=self.chunk_crcs)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPlan:
    """A plan and the manifests of every shard of its group: what a rebuild needs to know, on each member."""

    format: int = FORMAT_VERSION
    plan: Plan
    manifests: tuple[dict[str, Any], ...] = field(default=())

    def chunks_by_digest(self) -> dict[str, ShardChunks]:
        """The verified chunk digests of every shard of the plan.

        Raises:
            IntegrityError: if a manifest is missing or damaged, or the plan's id is not that of its content.
        """
        if not self.plan.is_sealed():
            raise IntegrityError(f"stored plan {self.plan.plan_id[:8]} does not have the id of its content")
        found = {chunks.digest: chunks for chunks in map(_chunks_of, self.manifests)}
        for member in self.plan.members:
            for shard in member.shards:
                chunks = found.get(shard.digest)
                if chunks is None or (chunks.rank, chunks.size_bytes) != (shard.rank, shard.size_bytes):
                    raise IntegrityError(
                        f"stored plan {self.plan.plan_id[:8]} lacks the manifest of rank {shard.rank} ({shard.digest[:8]})",
                        reason="bad_plan",
                    )
        return found


def check_crcs(what: str, size_bytes: int, *, chunk_bytes: int, chunk_crcs: str) -> None:
    """Raise IntegrityError unless there is one digest for each chunk of the format's length."""
    if size_bytes < 0 or chunk_bytes != CHUNK_BYTES or len(chunk_crcs) != 8 * -(-size_bytes // CHUNK_BYTES):
        raise IntegrityError(
            f"{what} of {size_bytes} bytes in chunks of {chunk_bytes} has {len(chunk_crcs) // 8} chunk digests",
            reason="bad_manifest",
        )


def parse_manifest(raw: bytes, *, digest: str) -> ShardChunks:
    """The chunk digests of the manifest whose exact bytes are ``raw``.

    Raises:
        IntegrityError: if ``raw`` does not have that digest (reason ``wrong_identity``) or contradicts itself.
    """
    found = hashlib.sha256(raw).hexdigest()
    if found != digest:
        found = json_records.loads(Manifest, raw).digest  # the same manifest in another spelling
    if found != digest:
        raise IntegrityError(f"manifest has digest {found[:16]}, not {digest[:16]}", reason="wrong_identity")
    return _with_digest(json_records.loads(ShardChunks, raw), digest)


def _chunks_of(manifest: dict[str, Any]) -> ShardChunks:
    raw = canonical_bytes(manifest)
    return _with_digest(json_records.from_json(ShardChunks, manifest), hashlib.sha256(raw).hexdigest())


def _with_digest(chunks: ShardChunks, digest: str) -> ShardChunks:
    if not versions.is_readable(chunks.format):
        raise IntegrityError(versions.unreadable("a manifest", chunks.format), reason="bad_format")
    check_crcs("manifest", chunks.size_bytes, chunk_bytes=chunks.chunk_bytes, chunk_crcs=chunks.chunk_crcs)
    return replace(chunks, digest=digest)


def canonical_bytes(manifest: dict[str, Any]) -> bytes:
    """The canonical spelling of a manifest's JSON: what its digest is taken of."""
    return json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()


def read_small(path: Path) -> bytes:
    """The bytes of a record file; raises SnapshotNotFoundError (``gone``) without one, IntegrityError when oversized."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise SnapshotNotFoundError(f"cannot open {path.name}: {error.strerror}", reason="gone") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise IntegrityError(f"{path.name} is not a file", reason="bad_record")
        if status.st_size > MAX_RECORD_BYTES:
            raise IntegrityError(f"{path.name} of {status.st_size} bytes is over the limit of {MAX_RECORD_BYTES}")
        with open(fd, "rb", closefd=False) as file:
            return file.read(MAX_RECORD_BYTES)
    finally:
        os.close(fd)


def read_manifest(path: Path, *, digest: str) -> ShardChunks:
    """The published manifest at ``path``; parsed once per version of the file.

    Raises:
        SnapshotNotFoundError: nothing is published there (``gone``). IntegrityError: something else is.
    """
    try:
        status = os.lstat(path)
    except OSError as error:
        raise SnapshotNotFoundError(f"{path.name} is not published: {error.strerror}", reason="gone") from error
    return _read_manifest(path, digest, (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size))


@functools.lru_cache(maxsize=256)
def _read_manifest(path: Path, digest: str, _version: tuple[int, ...]) -> ShardChunks:
    return parse_manifest(read_small(path), digest=digest)


def temporary_path(path: Path, incarnation: str) -> Path:
    """A fresh temporary name beside ``path`` that carries the process and the daemon's incarnation."""
    return path.with_name(f"{path.name}.{os.getpid()}-{next(_sequence)}.{incarnation}.tmp")


def create_exclusively(path: Path) -> int:
    """A descriptor of a new file, mode 0600; raises SnapshotNotFoundError when its directory was withdrawn."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileNotFoundError as error:
        raise SnapshotNotFoundError(f"{path.parent} was withdrawn", reason="gone") from error


def write_atomically(path: Path, data: bytes, *, incarnation: str) -> None:
    """Publish ``data`` at ``path`` by rename: a reader sees all of it or what was there before."""
    temporary = temporary_path(path, incarnation)
    fd = create_exclusively(temporary)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
        temporary.rename(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise storage_error(path, error) from error


def storage_error(path: Path, error: OSError) -> Exception:
    """The error of ours for a failed write to ``path``."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM):
        return CapacityError(f"no room to write {path.name}: {error.strerror}", reason="no_space")
    if error.errno == errno.ENOENT:
        return SnapshotNotFoundError(f"{path.parent} was withdrawn", reason="gone")
    return error


def make_directory(path: Path) -> None:
    """Create ``path`` and its parents, private to the daemon's user."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
