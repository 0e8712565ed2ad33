"""Chunks of a shard that lies elsewhere, in a file of its size with holes: staging for ranks of another layout.

Nothing here is ever published or reported; a trainer gets a read-only descriptor of it. A chunk counts once its mark is
written, after its bytes. Must not decide what is fetched.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from backstay.errors import IntegrityError, UnavailableError
from backstayd.store.paths import RunPaths
from backstayd.store.record_files import (
    ShardChunks,
    make_directory,
    parse_manifest,
    read_small,
    storage_error,
    write_atomically,
)


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


def remove_sparse(paths: RunPaths, *, rank: int, world_size: int, digest: str) -> None:
    """Remove file, marks and manifest; idempotent. Descriptors that trainers have keep the bytes until they close them."""
    for path in (
        paths.sparse_manifest(rank, world_size, digest),
        paths.sparse_marks(rank, world_size, digest),
        paths.sparse(rank, world_size, digest),
    ):
        path.unlink(missing_ok=True)


class SparseShard:
    """The open file. For one writer at a time; readers may look at marks meanwhile. Close it."""

    def __init__(self, paths: RunPaths, *, rank: int, world_size: int, digest: str) -> None:
        """Raises SnapshotNotFoundError when it was not prepared, or is removed already."""
        place = (rank, world_size, digest)
        self._path = paths.sparse(*place)
        self.chunks = parse_manifest(read_small(paths.sparse_manifest(*place)), digest=digest)
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

    def write_verified(self, chunk: int, view: memoryview) -> None:
        """Write one chunk that the caller verified in this very buffer, then its mark."""
        try:
            written = os.pwrite(self._fd, view, chunk * self.chunks.chunk_bytes)
            if written == self.chunks.chunk_length(chunk):
                os.pwrite(self._marks, b"\x01", chunk)
                return
        except OSError as error:
            raise storage_error(self._path, error) from error
        raise IntegrityError(f"chunk {chunk} of {self._path.name}: only {written} bytes were written")

    def close(self) -> None:
        for fd in (self._fd, self._marks):
            if fd >= 0:
                os.close(fd)
        self._fd = self._marks = -1


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
