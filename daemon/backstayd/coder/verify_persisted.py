"""Checking every chunk of a persisted shard where it lies, on a file system of this machine. Writes nothing."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from crc32c import crc32c

from backstay import faults
from backstay.errors import IntegrityError, SnapshotNotFoundError
from backstay.ids import SnapshotKey
from backstay.manifest import CHUNK_BYTES
from backstayd.coder.context import CorruptSourceError, JobContext, corrupt_of
from backstayd.coder.storage_jobs import VerifyPersisted
from backstayd.storage.errors import explained
from backstayd.storage.local_shard import LocalShard, open_local_shard
from backstayd.transport.bulk import ShardRef

READ_BYTES: Final = 4 * CHUNK_BYTES  # stays in the cache until it is checked
THREADS: Final = 2


def run_verify_persisted(context: JobContext, job: VerifyPersisted) -> str:
    """Do ``job``; returns the ``LocalShard.file_id`` of the file that is right.

    Raises:
        CorruptSourceError: what lies there is missing or not the shard that is wanted. UnavailableError: the file system.
    """
    try:
        shard = open_local_shard(job.url, rank=job.rank, world_size=job.world_size, digest=job.digest)
    except (IntegrityError, SnapshotNotFoundError) as error:
        raise _blame(context, job, str(error)) from error
    try:
        _read_through(context, job, shard)
    finally:
        shard.close()
    return shard.file_id


def _read_through(context: JobContext, job: VerifyPersisted, shard: LocalShard) -> None:
    buffers, lock, size = threading.local(), threading.Lock(), shard.chunks.size_bytes

    def check(offset: int) -> None:
        context.check()
        if not hasattr(buffers, "whole"):
            buffers.whole = memoryview(bytearray(READ_BYTES))
        view = buffers.whole[: min(READ_BYTES, size - offset)]
        if offset <= size // 2 < offset + len(view):
            faults.reach("mid_fetch_persisted", step=job.step, rank=job.rank)
        _check_range(context, job, shard, offset, view)
        with lock:
            context.done_bytes += len(view)

    with context.timed("read"), ThreadPoolExecutor(THREADS, thread_name_prefix="verify") as pool:
        try:
            list(pool.map(check, range(0, size, READ_BYTES)))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _check_range(context: JobContext, job: VerifyPersisted, shard: LocalShard, offset: int, view: memoryview) -> None:
    """Fill ``view`` and check its chunks; a wrong one is read once more, for it may have been flipped on its way."""
    first = offset // CHUNK_BYTES
    _read(context, job, shard, offset, view)
    for place in range(0, len(view), CHUNK_BYTES):
        chunk, piece = first + place // CHUNK_BYTES, view[place : place + CHUNK_BYTES]
        expected = shard.chunks.chunk_crc(chunk)
        if crc32c(piece) != expected:
            _read(context, job, shard, chunk * CHUNK_BYTES, piece)
            found = crc32c(piece)
            if found != expected:
                raise _blame(context, job, f"chunk {chunk} has crc {found:08x}, expected {expected:08x}")
            context.flipped_in_flight += 1


def _read(context: JobContext, job: VerifyPersisted, shard: LocalShard, offset: int, view: memoryview) -> None:
    with explained("read", job.url):
        done = 0
        while done < len(view):
            count = os.preadv(shard.fd, [view[done:]], offset + done)
            if count == 0:
                raise _blame(context, job, f"it ends at byte {offset + done}, {len(view) - done} bytes too early")
            done += count


def _blame(context: JobContext, job: VerifyPersisted, detail: str) -> CorruptSourceError:
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
