"""Copying a whole shard from durable storage into this node's staging, each chunk verified in the buffer it is written from."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from crc32c import crc32c

from backstay import faults
from backstay.errors import IntegrityError, SnapshotNotFoundError
from backstay.ids import SnapshotKey
from backstay.manifest import CHUNK_BYTES
from backstayd.coder.context import CorruptSourceError, JobContext, corrupt_of
from backstayd.coder.jobs import shard_event
from backstayd.coder.storage_jobs import FetchPersisted
from backstayd.storage.place import MIN_RANGE_BYTES
from backstayd.storage.reader import PARALLEL_REQUESTS, PersistedShard, open_shard
from backstayd.store.staging import StagedShard, prepare_staging
from backstayd.transport.bulk import ShardRef

LOCAL_BYTES = 4 * 1024 * 1024  # read at once from a file system of this machine
LOCAL_THREADS = 2  # reading and checking beside writing
REMOTE_BYTES = PARALLEL_REQUESTS * MIN_RANGE_BYTES


def run_fetch_persisted(context: JobContext, job: FetchPersisted) -> None:
    """Do ``job``; on return the shard is whole and verified in staging.

    Raises:
        CorruptSourceError: what lies there is missing or not the shard that is wanted. UnavailableError: the store.
    """
    ref = ShardRef(
        run=job.run,
        key=SnapshotKey(job.attempt, job.step),
        rank=job.rank,
        world_size=job.world_size,
        digest=job.digest,
    )
    try:
        shard = open_shard(job.url, rank=job.rank, world_size=job.world_size, digest=job.digest)
    except (IntegrityError, SnapshotNotFoundError) as error:
        raise _blame(context, ref, job.url, str(error)) from error
    try:
        _copy(context, job, ref, shard)
    finally:
        shard.close()


def _copy(context: JobContext, job: FetchPersisted, ref: ShardRef, shard: PersistedShard) -> None:
    """Block after block by a few threads, each with one buffer that is read into, checked and written from."""
    paths = context.paths(job.run)
    prepare_staging(paths, shard.manifest_bytes, digest=job.digest, incarnation=context.incarnation)
    staged = StagedShard(paths, rank=job.rank, world_size=job.world_size, digest=job.digest)
    length, threads = (REMOTE_BYTES, 1) if shard.is_remote else (LOCAL_BYTES, LOCAL_THREADS)
    buffers, lock = threading.local(), threading.Lock()

    def copy(offset: int) -> None:
        context.check()
        if not hasattr(buffers, "whole"):
            buffers.whole = memoryview(bytearray(length))
        view = buffers.whole[: min(length, staged.chunks.size_bytes - offset)]
        _read(context, ref, job.url, shard, offset, view)
        if offset <= job.size_bytes // 2 < offset + len(view):
            faults.reach("mid_fetch_persisted", step=job.step, rank=job.rank)
        staged.write_verified_range(offset, view)
        with lock:
            context.done_bytes += len(view)

    try:
        with context.timed("copy"), ThreadPoolExecutor(threads, thread_name_prefix="fetch") as pool:
            try:
                list(pool.map(copy, range(0, staged.chunks.size_bytes, length)))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        context.emit(shard_event("shard_staged", staged.chunks))
    finally:
        staged.close()


def _read(context: JobContext, ref: ShardRef, url: str, shard: PersistedShard, offset: int, view: memoryview) -> None:
    """Fill ``view`` and check its chunks; a wrong one is read once more, for it may have been flipped on its way."""
    try:
        shard.read_into(offset, view)
    except IntegrityError as error:
        raise _blame(context, ref, url, str(error)) from error
    first = offset // CHUNK_BYTES
    for place in range(0, len(view), CHUNK_BYTES):
        chunk, piece = first + place // CHUNK_BYTES, view[place : place + CHUNK_BYTES]
        expected = shard.chunks.chunk_crc(chunk)
        if crc32c(piece) != expected:
            shard.read_into(chunk * CHUNK_BYTES, piece)
            found = crc32c(piece)
            if found != expected:
                detail = f"chunk {chunk} has crc {found:08x}, expected {expected:08x}"
                raise _blame(context, ref, url, detail)
            context.flipped_in_flight += 1


def _blame(context: JobContext, ref: ShardRef, url: str, detail: str) -> CorruptSourceError:
    """Name the shard in storage; there is no holder to be told."""
    corrupt = corrupt_of(ref, node=url, detail=detail)
    context.corrupt.append(corrupt)
    return CorruptSourceError(corrupt)
