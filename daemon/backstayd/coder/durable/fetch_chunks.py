"""Chunks and manifests from durable storage, for ranks of another layout: only the ranges asked for, each chunk verified.

Loaded by a coder that is asked for it, for it brings along what stores need. Must not decide which chunks are wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from backstay.errors import BackstayError, IntegrityError, SnapshotNotFoundError, UnavailableError
from backstay.format.manifest import CHUNK_BYTES
from backstayd.coder.context import JobContext, shard_ref_of
from backstayd.coder.durable.check_chunks import check_chunks
from backstayd.coder.jobs import FetchChunks, FetchManifests
from backstayd.core.inventory.durable_names import manifest_name
from backstayd.durable.open import open_place
from backstayd.durable.reader import PersistedShard, open_shard
from backstayd.store.record_files import make_directory, parse_manifest, write_atomically
from backstayd.store.staging import SparseShard

BATCH_CHUNKS: Final = 64  # 16 MiB in memory at a time


def fetch_stored_chunks(context: JobContext, job: FetchChunks, sparse: SparseShard, runs: Sequence[range]) -> None:
    """Bring ``runs`` from the snapshot's directory ``job.url``.

    Raises:
        CorruptSourceError: what lies there is missing or not the shard that is wanted. UnavailableError: the store.
    """
    try:
        shard = open_shard(job.url, rank=job.rank, world_size=job.world_size, digest=job.digest)
    except (IntegrityError, SnapshotNotFoundError) as error:
        raise context.blame_stored(shard_ref_of(job), url=job.url, detail=str(error)) from error
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
    ref = shard_ref_of(job)
    ranges, begin = [], 0
    for run in batch:
        length = sum(shard.chunks.chunk_length(chunk) for chunk in run)
        ranges.append((run.start * CHUNK_BYTES, buffer[begin : begin + length]))
        begin += length
    try:
        with context.timed("read"):
            shard.read_ranges(ranges)
    except IntegrityError as error:
        raise context.blame_stored(ref, url=job.url, detail=str(error)) from error
    for run, (_, view) in zip(batch, ranges, strict=True):
        for place, chunk in enumerate(run):
            piece = view[place * CHUNK_BYTES : (place + 1) * CHUNK_BYTES]
            check_chunks(
                context, ref, url=job.url, chunks=shard.chunks, first=chunk, view=piece, read_into=shard.read_into
            )
            with context.timed("write"):
                sparse.write_verified(chunk, piece)
            context.done_bytes += len(piece)


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
