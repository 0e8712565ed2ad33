"""Chunks and manifests from durable storage, for ranks of another layout: only the ranges asked for, each chunk verified.

Loaded by a coder that is asked for it, for it brings along what stores need. Must not decide which chunks are wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from crc32c import crc32c

from backstay.errors import BackstayError, IntegrityError, SnapshotNotFoundError, UnavailableError
from backstay.ids import SnapshotKey
from backstay.manifest import CHUNK_BYTES
from backstayd.coder.context import CorruptSourceError, JobContext, corrupt_of
from backstayd.coder.jobs import FetchChunks, FetchManifests
from backstayd.core.storage_names import manifest_name
from backstayd.storage.place import open_place
from backstayd.storage.reader import PersistedShard, open_shard
from backstayd.store.sparse import SparseShard
from backstayd.store.stored import make_directory, parse_manifest, write_atomically
from backstayd.transport.bulk import ShardRef

BATCH_CHUNKS: Final = 64  # 16 MiB in memory at a time


def fetch_stored_chunks(context: JobContext, job: FetchChunks, sparse: SparseShard, runs: Sequence[range]) -> None:
    """Bring ``runs`` from the snapshot's directory ``job.url``.

    Raises:
        CorruptSourceError: what lies there is missing or not the shard that is wanted. UnavailableError: the store.
    """
    try:
        shard = open_shard(job.url, rank=job.rank, world_size=job.world_size, digest=job.digest)
    except (IntegrityError, SnapshotNotFoundError) as error:
        raise _blame(context, job, str(error)) from error
    buffer = memoryview(bytearray(BATCH_CHUNKS * CHUNK_BYTES))
    try:
        for batch in _batches(runs):
            context.check()
            _copy(context, job, shard, sparse, batch, buffer)
    finally:
        shard.close()


def _copy(
    context: JobContext,
    job: FetchChunks,
    shard: PersistedShard,
    sparse: SparseShard,
    batch: Sequence[range],
    buffer: memoryview,
) -> None:
    ranges, begin = [], 0
    for run in batch:
        length = sum(shard.chunks.chunk_length(chunk) for chunk in run)
        ranges.append((run.start * CHUNK_BYTES, buffer[begin : begin + length]))
        begin += length
    try:
        with context.timed("read"):
            shard.read_ranges(ranges)
    except IntegrityError as error:
        raise _blame(context, job, str(error)) from error
    for run, (_, view) in zip(batch, ranges, strict=True):
        for place, chunk in enumerate(run):
            piece = view[place * CHUNK_BYTES : (place + 1) * CHUNK_BYTES]
            _verify(context, job, shard, chunk, piece)
            with context.timed("write"):
                sparse.write_verified(chunk, piece)
            context.done_bytes += len(piece)


def _verify(context: JobContext, job: FetchChunks, shard: PersistedShard, chunk: int, piece: memoryview) -> None:
    """Check one chunk; a wrong one is read once more, for it may have been flipped on its way."""
    expected = shard.chunks.chunk_crc(chunk)
    if crc32c(piece) == expected:
        return
    shard.read_into(chunk * CHUNK_BYTES, piece)
    found = crc32c(piece)
    if found != expected:
        raise _blame(context, job, f"chunk {chunk} has crc {found:08x}, expected {expected:08x}")
    context.flipped_in_flight += 1


def fetch_stored_manifests(context: JobContext, job: FetchManifests) -> None:
    """Put the manifests of ``job`` into staging from its ``url``; raises UnavailableError for one that is not there."""
    paths, place = context.paths(job.run), open_place(job.url)
    make_directory(paths.staging)
    for rank, digest in zip(job.ranks, job.digests, strict=True):
        context.check()
        try:
            raw = place.read_small(manifest_name(rank, job.world_size))
            parse_manifest(raw, digest=digest)
        except BackstayError as error:
            raise UnavailableError(
                f"the manifest of rank {rank} in {job.url}: {error}", reason="no_manifest"
            ) from error
        write_atomically(paths.sparse_manifest(rank, job.world_size, digest), raw, incarnation=context.incarnation)


def _batches(runs: Sequence[range]) -> Iterator[list[range]]:
    """The same chunks in lists of at most BATCH_CHUNKS."""
    batch: list[range] = []
    room = BATCH_CHUNKS
    for run in runs:
        begin = run.start
        while begin < run.stop:
            end = min(run.stop, begin + room)
            batch.append(range(begin, end))
            room -= end - begin
            begin = end
            if room == 0:
                yield batch
                batch, room = [], BATCH_CHUNKS
    if batch:
        yield batch


def _blame(context: JobContext, job: FetchChunks, detail: str) -> CorruptSourceError:
    """Name the shard in storage; there is no holder to be told."""
    ref = ShardRef(
        run=job.run,
        key=SnapshotKey(job.attempt, job.step),
        rank=job.rank,
        world_size=job.world_size,
        digest=job.digest,
    )
    corrupt = corrupt_of(ref, node=job.url, detail=detail)
    context.corrupt.append(corrupt)
    return CorruptSourceError(corrupt)
