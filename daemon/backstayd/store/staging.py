"""Shards that are being fetched or rebuilt on this node: created whole, filled by verified chunks, marked range by range.

The ``.part`` file is allocated and the manifest beside it published before any chunk is accepted. Must not decide what is
staged, nor publish it: the supervisor renames.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from crc32c import crc32c

from backstay.errors import IntegrityError, SnapshotNotFoundError, UnavailableError
from backstay.format import json_records
from backstay.format.manifest import Manifest
from backstayd.core.inventory import geometry
from backstayd.core.messages.plans import Plan
from backstayd.store.paths import RunPaths
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

    def __init__(self, paths: RunPaths, *, rank: int, world_size: int, digest: str) -> None:
        """Raises UnavailableError (``not_ready``) until the staging file and its manifest are there."""
        self._paths = paths
        self._path = paths.staged(rank, world_size, digest)
        try:
            self.chunks = parse_manifest(read_small(paths.staged_manifest(rank, world_size, digest)), digest=digest)
            self.fd = os.open(self._path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except (SnapshotNotFoundError, FileNotFoundError) as error:
            raise UnavailableError(f"staging of rank {rank} is not prepared here yet", reason="not_ready") from error
        if os.fstat(self.fd).st_size != self.chunks.size_bytes:
            self.close()
            raise UnavailableError(f"staging of rank {rank} is not allocated yet", reason="not_ready")

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

    def write_verified(self, chunk: int, pieces: Sequence[memoryview]) -> None:
        """Write one chunk that the caller verified in these very buffers."""
        expected = self.chunks.chunk_length(chunk)
        try:
            written = os.pwritev(self.fd, pieces, chunk * self.chunks.chunk_bytes)
        except OSError as error:
            raise storage_error(self._path, error) from error
        if written != expected:
            raise IntegrityError(f"chunk {chunk} of {self._path.name}: {written} of {expected} bytes written")

    def write_verified_range(self, offset: int, view: memoryview) -> None:
        """Write bytes from ``offset`` on whose chunks the caller verified in this very buffer."""
        try:
            written = os.pwrite(self.fd, view, offset)
        except OSError as error:
            raise storage_error(self._path, error) from error
        if written != len(view):
            raise IntegrityError(f"{self._path.name}: {written} of {len(view)} bytes written at {offset}")

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
