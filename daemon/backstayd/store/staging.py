"""Shards on their way to this node, filled by verified chunks.

A staged shard is created whole (``.part``) and marked range by range; the supervisor publishes it by renaming. A sparse one
holds only the chunks that ranks of another layout need, in a file with holes, and is never published or reported: a trainer
gets a read-only descriptor of it. A manifest lies beside either before any chunk is accepted; in a sparse one a chunk counts
once its mark is written, after its bytes. Must not decide what is staged or fetched.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from crc32c import crc32c

from backstay.errors import IntegrityError, SnapshotNotFoundError, UnavailableError
from backstay.format import json_records
from backstay.format.manifest import Manifest
from backstayd.core.inventory import geometry
from backstayd.core.messages.plans import Plan
from backstayd.store.paths import RunPaths, ShardRef
from backstayd.store.record_files import (
    ShardChunks,
    make_directory,
    parse_manifest,
    read_small,
    storage_error,
    write_atomically,
)


def prepare_staging(paths: RunPaths, manifest: Manifest | bytes, *, digest: str, incarnation: str) -> ShardChunks:
    """Allocate the staging file of a shard and publish its manifest there; idempotent, keeps what was already filled.

    Raises:
        CapacityError: tmpfs has no room (``no_space``). IntegrityError: ``manifest`` does not have that digest.
    """
    raw = manifest if isinstance(manifest, bytes) else json_records.dumps(manifest)
    chunks = parse_manifest(raw, digest=digest)
    make_directory(paths.staging)
    part = paths.staged(chunks.rank, chunks.world_size, digest)
    fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(fd).st_size != chunks.size_bytes:
            os.ftruncate(fd, 0)
        if chunks.size_bytes:
            os.posix_fallocate(fd, 0, chunks.size_bytes)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise storage_error(part, error) from error
    finally:
        os.close(fd)
    write_atomically(paths.staged_manifest(chunks.rank, chunks.world_size, digest), raw, incarnation=incarnation)
    return chunks


def stripes_of_shard(plan: Plan, *, member: int, rank: int) -> tuple[int, ...]:
    """The stripes whose data blocks hold chunks of ``rank``'s shard in the volume of ``member``, ascending."""
    n = len(plan.members)
    return tuple(
        stripe
        for stripe in geometry.member_stripes(member, n=n, m=plan.m)
        if any(
            segment.rank == rank
            for segment in geometry.segments(plan, member, geometry.block_range(plan, stripe, member))
        )
    )


def missing_stripes(paths: RunPaths, plan: Plan, *, member: int, rank: int) -> tuple[int, ...]:
    """The stripes whose range of that shard is not complete in staging yet."""
    (shard,) = (shard for shard in plan.members[member].shards if shard.rank == rank)
    return tuple(
        stripe
        for stripe in stripes_of_shard(plan, member=member, rank=rank)
        if not paths.staged_stripe(rank, plan.world_size, digest=shard.digest, stripe=stripe).exists()
    )


def remove_staging(paths: RunPaths, *, rank: int, world_size: int, digest: str) -> None:
    """Remove the staging file, manifest and markers of one shard; idempotent. The manifest goes first: puts stop."""
    paths.staged_manifest(rank, world_size, digest).unlink(missing_ok=True)
    paths.staged(rank, world_size, digest).unlink(missing_ok=True)
    stem = paths.staged(rank, world_size, digest).name.removesuffix(".part")
    with contextlib.suppress(FileNotFoundError):
        for marker in paths.staging.glob(f"{stem}.stripe-*"):
            marker.unlink(missing_ok=True)


class StagedShard:
    """An open staging file; accepts only chunks that match the staged manifest. Close it."""

    def __init__(self, paths: RunPaths, ref: ShardRef) -> None:
        """Raises UnavailableError (``not_ready``) until the staging file and its manifest are there."""
        self._paths = paths
        place = (ref.rank, ref.world_size, ref.digest)
        self._path = paths.staged(*place)
        try:
            self.chunks = parse_manifest(read_small(paths.staged_manifest(*place)), digest=ref.digest)
            self.fd = os.open(self._path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except (SnapshotNotFoundError, FileNotFoundError) as error:
            raise UnavailableError(
                f"staging of rank {ref.rank} is not prepared here yet", reason="not_ready"
            ) from error
        if os.fstat(self.fd).st_size != self.chunks.size_bytes:
            self.close()
            raise UnavailableError(f"staging of rank {ref.rank} is not allocated yet", reason="not_ready")

    def write(self, chunk: int, pieces: Sequence[memoryview]) -> None:
        """Verify one chunk in the caller's buffers and write it; raises IntegrityError (``bad_chunk``) for wrong bytes."""
        crc = 0
        for piece in pieces:
            crc = crc32c(piece, crc)
        if crc != self.chunks.chunk_crc(chunk):
            raise IntegrityError(
                f"chunk {chunk} of rank {self.chunks.rank} has crc {crc:08x}, its manifest says "
                f"{self.chunks.chunk_crc(chunk):08x}; it was not written",
                reason="bad_chunk",
            )
        self.write_verified(chunk, pieces)

    def write_verified(self, first: int, pieces: Sequence[memoryview]) -> None:
        """Write whole chunks from ``first`` on that the caller verified in these very buffers."""
        _write_chunks(self.fd, self._path, self.chunks, first, pieces)

    def mark(self, stripe: int) -> None:
        """Say that the range of ``stripe`` is complete; idempotent."""
        marker = self._paths.staged_stripe(
            self.chunks.rank, self.chunks.world_size, digest=self.chunks.digest, stripe=stripe
        )
        with contextlib.suppress(FileExistsError):
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def prepare_sparse(paths: RunPaths, manifest: bytes, *, digest: str, incarnation: str) -> ShardChunks:
    """Make the empty file, its marks and its manifest; idempotent, keeps chunks that are there.

    Raises:
        IntegrityError: ``manifest`` does not have that digest. CapacityError: tmpfs has no room at all.
    """
    chunks = parse_manifest(manifest, digest=digest)
    make_directory(paths.staging)
    place = (chunks.rank, chunks.world_size, digest)
    for path, size in ((paths.sparse_marks(*place), chunks.chunk_count), (paths.sparse(*place), chunks.size_bytes)):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(fd, size)
            finally:
                os.close(fd)
        except OSError as error:
            raise storage_error(path, error) from error
    write_atomically(paths.sparse_manifest(*place), manifest, incarnation=incarnation)
    return chunks


def remove_sparse(paths: RunPaths, ref: ShardRef) -> None:
    """Remove file, marks and manifest; idempotent. Descriptors that trainers have keep the bytes until they close them."""
    place = (ref.rank, ref.world_size, ref.digest)
    for path in (paths.sparse_manifest(*place), paths.sparse_marks(*place), paths.sparse(*place)):
        path.unlink(missing_ok=True)


class SparseShard:
    """An open sparse file. Each chunk has one writer at a time; readers may look at marks meanwhile. Close it."""

    def __init__(self, paths: RunPaths, ref: ShardRef) -> None:
        """Raises SnapshotNotFoundError when it was not prepared, or is removed already."""
        place = (ref.rank, ref.world_size, ref.digest)
        self._path = paths.sparse(*place)
        self.chunks = parse_manifest(read_small(paths.sparse_manifest(*place)), digest=ref.digest)
        self._fd = self._marks = -1
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            self._marks = os.open(paths.sparse_marks(*place), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            self.close()
            raise storage_error(self._path, error) from error

    def missing(self, wanted: Iterable[range]) -> list[range]:
        """Of ``wanted`` (ascending) the runs of chunks that are not here."""
        marks = os.pread(self._marks, self.chunks.chunk_count, 0)
        return missing_runs(marks, wanted)

    def write_verified(self, first: int, view: memoryview) -> None:
        """Write whole chunks from ``first`` on that the caller verified in this very buffer, then their marks."""
        _write_chunks(self._fd, self._path, self.chunks, first, [view])
        try:
            os.pwrite(self._marks, b"\x01" * -(-len(view) // self.chunks.chunk_bytes), first)
        except OSError as error:
            raise storage_error(self._path, error) from error

    def close(self) -> None:
        for fd in (self._fd, self._marks):
            if fd >= 0:
                os.close(fd)
        self._fd = self._marks = -1


def _write_chunks(fd: int, path: Path, chunks: ShardChunks, first: int, pieces: Sequence[memoryview]) -> None:
    """Raises IntegrityError unless ``pieces`` are whole chunks, and written."""
    begin = first * chunks.chunk_bytes
    count = -(-sum(map(len, pieces)) // chunks.chunk_bytes)
    try:
        written = os.pwritev(fd, pieces, begin)
    except OSError as error:
        raise storage_error(path, error) from error
    if written != min(begin + count * chunks.chunk_bytes, chunks.size_bytes) - begin:
        raise IntegrityError(f"chunk {first} of {path.name}: only {written} bytes were written")


def read_marks(paths: RunPaths, chunks: ShardChunks) -> bytes:
    """A byte per chunk: 1 where it is here."""
    try:
        marks = read_small(paths.sparse_marks(chunks.rank, chunks.world_size, chunks.digest))
    except IntegrityError as error:
        raise UnavailableError(str(error), reason="gone") from error
    return marks.ljust(chunks.chunk_count, b"\x00")


def missing_runs(marks: bytes | bytearray, wanted: Iterable[range]) -> list[range]:
    """Of ``wanted`` the runs of chunks without a mark, as long as they can be; ``wanted`` is ascending."""
    runs: list[range] = []
    for chunks in wanted:
        begin = chunks.start
        while begin < chunks.stop:
            first = marks.find(b"\x00", begin, chunks.stop)
            if first < 0:
                break
            end = marks.find(b"\x01", first, chunks.stop)
            end = chunks.stop if end < 0 else end
            if runs and runs[-1].stop == first:
                runs[-1] = range(runs[-1].start, end)
            else:
                runs.append(range(first, end))
            begin = end
    return runs


def run_bytes(chunks: ShardChunks, runs: Sequence[range]) -> int:
    """Bytes of these chunks."""
    total = sum(len(run) for run in runs) * chunks.chunk_bytes
    last = chunks.chunk_count - 1
    if any(last in run for run in runs):
        total -= chunks.chunk_bytes - chunks.chunk_length(last)
    return total
