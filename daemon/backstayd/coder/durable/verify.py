"""Checking every chunk of a persisted shard where it lies, on a file system of this machine. Writes nothing."""

from __future__ import annotations

import os
import threading
from typing import Final

from backstay import faults
from backstay.errors import IntegrityError, SnapshotNotFoundError
from backstay.format.manifest import CHUNK_BYTES
from backstayd.coder.context import JobContext, shard_ref_of
from backstayd.coder.durable.block_threads import each_block
from backstayd.coder.durable.check_chunks import check_chunks
from backstayd.coder.jobs import VerifyPersisted
from backstayd.durable.errors import explained
from backstayd.durable.local_shard import LocalShard, open_local_shard
from backstayd.transport.bulk.client import ShardRef

READ_BYTES: Final = 4 * CHUNK_BYTES  # stays in the cache until it is checked
THREADS: Final = 2


def run_verify_persisted(context: JobContext, job: VerifyPersisted) -> str:
    """Do ``job``; returns the ``LocalShard.file_id`` of the file that is right.

    Raises:
        CorruptSourceError: what lies there is missing or not the shard that is wanted. UnavailableError: the file system.
    """
    ref = shard_ref_of(job)
    try:
        shard = open_local_shard(job.url, rank=job.rank, world_size=job.world_size, digest=job.digest)
    except (IntegrityError, SnapshotNotFoundError) as error:
        raise context.blame_stored(ref, url=job.url, detail=str(error)) from error
    try:
        _read_through(context, job, ref, shard)
    finally:
        shard.close()
    return shard.file_id


def _read_through(context: JobContext, job: VerifyPersisted, ref: ShardRef, shard: LocalShard) -> None:
    lock, size = threading.Lock(), shard.chunks.size_bytes

    def read_into(offset: int, view: memoryview) -> None:
        with explained("read", job.url):
            short = _read(shard, offset, view)
        if short:
            detail = f"it ends at byte {offset + len(view) - short}, {short} bytes too early"
            raise context.blame_stored(ref, url=job.url, detail=detail)

    def check(offset: int, view: memoryview) -> None:
        context.check()
        if offset <= size // 2 < offset + len(view):
            faults.reach("mid_fetch_persisted", step=job.step, rank=job.rank)
        read_into(offset, view)
        first = offset // CHUNK_BYTES
        check_chunks(context, ref, url=job.url, chunks=shard.chunks, first=first, view=view, read_into=read_into)
        with lock:
            context.done_bytes += len(view)

    with context.timed("read"):
        each_block(size, READ_BYTES, check, threads=THREADS)


def _read(shard: LocalShard, offset: int, view: memoryview) -> int:
    """Fill ``view``; returns how many bytes are missing at its end because the file ends."""
    done = 0
    while done < len(view):
        count = os.preadv(shard.fd, [view[done:]], offset + done)
        if count == 0:
            break
        done += count
    return len(view) - done
