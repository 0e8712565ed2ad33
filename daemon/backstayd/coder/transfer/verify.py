"""Checking every chunk of a shard or a parity fragment that lies on this node, or on a file system of it. Changes nothing."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from typing import Final

from crc32c import crc32c

from backstay import faults
from backstay.errors import IntegrityError, SnapshotNotFoundError
from backstay.format.manifest import CHUNK_BYTES
from backstayd.coder.context import JobContext
from backstayd.coder.jobs import VerifyFragment, VerifyShard
from backstayd.coder.transfer.sources import Take, read_blocks, read_in_order
from backstayd.coder.verified_reads import LocalFragment, LocalShards, ShardRange
from backstayd.core.inventory import geometry
from backstayd.durable.reader import open_local_shard
from backstayd.store.paths import FragmentRef, ShardRef
from backstayd.store.record_files import read_manifest
from backstayd.store.staging import StagedShard

BLOCK_CHUNKS: Final = 4  # read at once from a file that is only checked: stays in the cache until it is
THREADS: Final = 2


def run_verify_shard(context: JobContext, job: VerifyShard) -> None:
    """Do ``job``. Raises CorruptSourceError for a bad chunk or manifest, SnapshotNotFoundError when it is not here."""
    if job.url:
        _verify_persisted(context, job)
    elif job.is_staged:
        _verify_staged(context, job.shard)
    else:
        verify_published(context, job.shard)


def run_verify_fragment(context: JobContext, job: VerifyFragment) -> None:
    """Do ``job``. Raises as :func:`run_verify_shard`."""
    ref = FragmentRef.of(job.plan, job.stripe, job.index)
    source = LocalFragment(context, ref, first_chunk=0)
    expected = geometry.fragment_bytes(job.plan, job.stripe)
    if source.size_bytes != expected:
        source.close()
        raise context.blame(ref, detail=f"{source.size_bytes} bytes, the plan says {expected}")
    read_in_order(context, source, [range(geometry.stripe_chunks(job.plan, job.stripe))], _counting(context))


def verify_published(context: JobContext, ref: ShardRef, runs: Sequence[range] | None = None) -> None:
    """Check the chunks of ``runs`` (all: None) of a shard that is published here. Raises as :func:`run_verify_shard`."""
    path = context.paths(ref.run).manifest(ref.key, ref.rank, ref.world_size)
    try:
        chunks = read_manifest(path, digest=ref.digest)
    except IntegrityError as error:
        raise context.blame(ref, detail=str(error)) from error
    runs = [range(chunks.chunk_count)] if runs is None else runs
    reader = LocalShards(context, [ShardRange(chunks, run.start, len(run)) for run in runs])
    read_in_order(context, reader, runs, _counting(context))


def _counting(context: JobContext) -> Take:
    def take(_first: int, view: memoryview) -> None:
        context.done_bytes += len(view)

    return take


def _verify_staged(context: JobContext, ref: ShardRef) -> None:
    try:
        staged = StagedShard(context.paths(ref.run), ref)
    except IntegrityError as error:
        raise context.blame(ref, detail=str(error)) from error
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with contextlib.closing(staged):
        for chunk in range(staged.chunks.chunk_count):
            context.check()
            view = buffer[: staged.chunks.chunk_length(chunk)]
            read = os.preadv(staged.fd, [view], chunk * CHUNK_BYTES)
            found, expected = crc32c(view[:read]), staged.chunks.chunk_crc(chunk)
            if found != expected:
                raise context.blame(ref, detail=f"chunk {chunk} has crc {found:08x}, expected {expected:08x}")
            context.done_bytes += read


def _verify_persisted(context: JobContext, job: VerifyShard) -> None:
    ref = job.shard
    try:
        shard = open_local_shard(job.url, rank=ref.rank, world_size=ref.world_size, digest=ref.digest)
    except (IntegrityError, SnapshotNotFoundError) as error:
        raise context.blame(ref, url=job.url, detail=str(error)) from error
    middle, lock = shard.chunks.chunk_count // 2, threading.Lock()

    def take(first: int, view: memoryview) -> None:
        if first <= middle < first - (-len(view) // CHUNK_BYTES):
            faults.reach("mid_fetch_persisted", step=ref.key.step, rank=ref.rank)
        with lock:
            context.done_bytes += len(view)

    with contextlib.closing(shard):
        everything = [range(shard.chunks.chunk_count)]
        read_blocks(context, shard, job.url, everything, take, block_chunks=BLOCK_CHUNKS, threads=THREADS)
        context.file_id = shard.file_id
