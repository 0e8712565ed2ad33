"""Bringing chunks of a shard into this node's sparse staging, each verified in the buffer it is written from.

A chunk that is there is not asked for again, whoever brought it; a failing source is replaced by the next. Must not decide
which chunks are wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from backstay import faults
from backstay.errors import BackstayError, IntegrityError, UnavailableError
from backstay.format.manifest import CHUNK_BYTES
from backstayd.coder.context import CorruptSourceError, JobContext, shard_ref_of
from backstayd.coder.jobs import FetchChunks
from backstayd.coder.verified_reads import LocalShards, RemoteShards, ShardRange
from backstayd.store.record_files import ShardChunks, read_manifest
from backstayd.store.staging import SparseShard

RANGE_CHUNKS: Final = 64  # 16 MiB a request: large enough to stream, small enough for the next to be asked ahead


def run_fetch_chunks(context: JobContext, job: FetchChunks) -> None:
    """Do ``job``; on return every chunk of it is here and verified.

    Raises:
        CorruptSourceError, or what the last source failed with: no source is left for some of them.
    """
    wanted = [range(first, first + count) for first, count in zip(job.firsts, job.counts, strict=True)]
    if job.is_here:
        _verify(context, job, wanted)
        return
    sparse = SparseShard(context.paths(job.run), rank=job.rank, world_size=job.world_size, digest=job.digest)
    try:
        if job.url:
            from backstayd.coder.durable.fetch_chunks import fetch_stored_chunks  # only where stores are read

            fetch_stored_chunks(context, job, sparse, sparse.missing(wanted))
        else:
            _fetch(context, job, sparse, wanted)
    finally:
        sparse.close()


def _fetch(context: JobContext, job: FetchChunks, sparse: SparseShard, wanted: Sequence[range]) -> None:
    failures: list[BackstayError] = []
    for address in dict.fromkeys(job.addresses):
        context.check()
        runs = sparse.missing(wanted)
        try:
            copy_runs(context, RemoteShards(context, address, _ranges(sparse.chunks, runs)), sparse, runs)
        except BackstayError as error:
            context.check()
            if error.reason == "no_space":
                raise
            failures.append(error)
            continue
        return
    corrupt = [error for error in failures if isinstance(error, CorruptSourceError)]
    if failures:
        raise corrupt[0] if corrupt else failures[-1]
    raise UnavailableError(f"no source named for rank {job.rank} of step {job.step}", reason="no_source")


def copy_runs(context: JobContext, source: RemoteShards, sparse: SparseShard, runs: Sequence[range]) -> None:
    """Write the chunks of ``runs``, which ``source`` hands out verified and in order; closes ``source``."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    total, done = sum(len(run) for run in runs), 0
    try:
        for run in runs:
            for chunk in run:
                context.check()
                if done == total // 2:
                    faults.reach("mid_fetch", step=sparse.chunks.step, rank=sparse.chunks.rank)
                with context.timed("read"):
                    length = source.read_into(buffer)
                with context.timed("write"):
                    sparse.write_verified(chunk, buffer[:length])
                context.done_bytes += length
                done += 1
    finally:
        source.close()


def _verify(context: JobContext, job: FetchChunks, wanted: Sequence[range]) -> None:
    ref = shard_ref_of(job)
    path = context.paths(job.run).manifest(ref.key, job.rank, job.world_size)
    try:
        chunks = read_manifest(path, digest=job.digest)
    except IntegrityError as error:
        raise context.blame(ref, node="", detail=str(error)) from error
    source = LocalShards(context, _ranges(chunks, wanted))
    buffer = memoryview(bytearray(CHUNK_BYTES))
    try:
        for _ in range(sum(len(run) for run in wanted)):
            context.check()
            context.done_bytes += source.read_into(buffer)
    finally:
        source.close()


def _ranges(chunks: ShardChunks, runs: Iterable[range]) -> list[ShardRange]:
    return [ShardRange(chunks, piece.start, len(piece)) for run in runs for piece in _pieces(run)]


def _pieces(run: range) -> Iterator[range]:
    for first in range(run.start, run.stop, RANGE_CHUNKS):
        yield range(first, min(first + RANGE_CHUNKS, run.stop))
