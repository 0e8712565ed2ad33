"""Copying a whole shard from durable storage into this node's staging, each chunk verified in the buffer it is written from."""

from __future__ import annotations

import threading

from backstay import faults
from backstay.errors import IntegrityError, SnapshotNotFoundError
from backstay.format.manifest import CHUNK_BYTES
from backstayd.coder.context import JobContext, shard_ref_of
from backstayd.coder.durable.block_threads import each_block
from backstayd.coder.durable.check_chunks import check_chunks
from backstayd.coder.jobs import FetchPersisted, shard_event
from backstayd.durable.place import MIN_RANGE_BYTES
from backstayd.durable.reader import PARALLEL_REQUESTS, PersistedShard, open_shard
from backstayd.store.staging import StagedShard, prepare_staging
from backstayd.transport.bulk.client import ShardRef

LOCAL_BYTES = 4 * 1024 * 1024  # read at once from a file system of this machine
LOCAL_THREADS = 2  # reading and checking beside writing
REMOTE_BYTES = PARALLEL_REQUESTS * MIN_RANGE_BYTES


def run_fetch_persisted(context: JobContext, job: FetchPersisted) -> None:
    """Do ``job``; on return the shard is whole and verified in staging.

    Raises:
        CorruptSourceError: what lies there is missing or not the shard that is wanted. UnavailableError: the store.
    """
    ref = shard_ref_of(job)
    try:
        shard = open_shard(job.url, rank=job.rank, world_size=job.world_size, digest=job.digest)
    except (IntegrityError, SnapshotNotFoundError) as error:
        raise context.blame_stored(ref, url=job.url, detail=str(error)) from error
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
    lock = threading.Lock()

    def copy(offset: int, view: memoryview) -> None:
        context.check()
        _read(context, ref, job.url, shard, offset, view)
        if offset <= job.size_bytes // 2 < offset + len(view):
            faults.reach("mid_fetch_persisted", step=job.step, rank=job.rank)
        staged.write_verified_range(offset, view)
        with lock:
            context.done_bytes += len(view)

    try:
        with context.timed("copy"):
            each_block(staged.chunks.size_bytes, length, copy, threads=threads)
        context.emit(shard_event("shard_staged", staged.chunks))
    finally:
        staged.close()


def _read(context: JobContext, ref: ShardRef, url: str, shard: PersistedShard, offset: int, view: memoryview) -> None:
    """Fill ``view`` and check its chunks."""
    try:
        shard.read_into(offset, view)
    except IntegrityError as error:
        raise context.blame_stored(ref, url=url, detail=str(error)) from error
    first = offset // CHUNK_BYTES
    check_chunks(context, ref, url=url, chunks=shard.chunks, first=first, view=view, read_into=shard.read_into)
