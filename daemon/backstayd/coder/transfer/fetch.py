"""Bringing shards into this node's staging: whole ones, chunks of them, or manifests alone.

A chunk that is here is not asked for again, whoever brought it; a failing source is replaced by the next. Must not decide
which chunks are wanted.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence

from backstay import faults
from backstay.errors import BackstayError, IntegrityError, UnavailableError
from backstayd.coder.context import CorruptSourceError, JobContext
from backstayd.coder.jobs import CoderEvent, FetchChunks, FetchManifests, FetchShard
from backstayd.coder.transfer.sources import ChunkSource, Take, sources_of
from backstayd.coder.transfer.verify import verify_published
from backstayd.store.paths import ShardRef
from backstayd.store.record_files import ShardChunks, make_directory, write_atomically
from backstayd.store.staging import SparseShard, StagedShard, missing_runs, prepare_staging


def run_fetch(context: JobContext, job: FetchShard) -> None:
    """Do ``job``; on return the shard is whole and verified in staging.

    Raises:
        CorruptSourceError, or what the last source failed with: no source is left.
    """
    staged: StagedShard | None = None
    marks = bytearray()

    def write(first: int, view: memoryview) -> None:
        assert staged is not None
        staged.write_verified(first, [view])
        count = -(-len(view) // staged.chunks.chunk_bytes)
        marks[first : first + count] = b"\x01" * count

    def copy(source: ChunkSource) -> None:
        nonlocal staged, marks
        if staged is None:
            staged = _prepare(context, source, job.shard)
            marks = bytearray(staged.chunks.chunk_count)
        _copy(context, source, staged.chunks, missing_runs(marks, [range(len(marks))]), write)

    try:
        _from_the_first(context, job, copy)
        context.emit(CoderEvent(kind="shard_staged", shard=job.shard))
    finally:
        if staged is not None:
            staged.close()


def run_fetch_chunks(context: JobContext, job: FetchChunks) -> None:
    """Do ``job``; on return every chunk of it is here and verified. Raises as :func:`run_fetch`."""
    wanted = [range(first, first + count) for first, count in zip(job.firsts, job.counts, strict=True)]
    if job.is_here:
        verify_published(context, job.shard, wanted)
        return
    with contextlib.closing(SparseShard(context.paths(job.run), job.shard)) as sparse:
        _from_the_first(
            context,
            job,
            lambda source: _copy(context, source, sparse.chunks, sparse.missing(wanted), sparse.write_verified),
        )


def run_fetch_manifests(context: JobContext, job: FetchManifests) -> None:
    """Do ``job``. Raises UnavailableError, naming ranks, when no source has the manifests of some."""
    paths, left, failure = context.paths(job.run), list(job.shards), "nobody was asked"
    make_directory(paths.staging)
    for source in sources_of(context, job.addresses, job.url):
        with contextlib.closing(source):
            for ref in list(left):
                context.check()
                try:
                    raw = source.manifest(ref)
                except BackstayError as error:
                    context.check()
                    failure = str(error)
                    if isinstance(error, UnavailableError):
                        break
                    continue
                path = paths.sparse_manifest(ref.rank, ref.world_size, ref.digest)
                write_atomically(path, raw, incarnation=context.incarnation)
                left.remove(ref)
        if not left:
            return
    ranks = ", ".join(str(ref.rank) for ref in left[:5])
    raise UnavailableError(
        f"nobody has the manifests of {len(left)} ranks ({ranks}) of step {job.shards[0].key.step}: {failure}",
        reason="no_manifest",
    )


def _from_the_first(context: JobContext, job: FetchShard | FetchChunks, copy: Callable[[ChunkSource], None]) -> None:
    """Call ``copy`` with one source of ``job`` after another, until one does not fail."""
    failures: list[BackstayError] = []
    for source in sources_of(context, job.addresses, job.url):
        context.check()
        try:
            with contextlib.closing(source):
                copy(source)
        except BackstayError as error:
            context.check()
            if error.reason == "no_space":
                raise
            failures.append(error)
            continue
        return
    if failures:
        raise next((error for error in failures if isinstance(error, CorruptSourceError)), failures[-1])
    raise UnavailableError(f"no source named for {job.shard}", reason="no_source")


def _prepare(context: JobContext, source: ChunkSource, ref: ShardRef) -> StagedShard:
    try:
        raw = source.manifest(ref)
    except IntegrityError as error:
        raise source.blame(ref, str(error)) from error
    paths = context.paths(ref.run)
    prepare_staging(paths, raw, digest=ref.digest, incarnation=context.incarnation)
    return StagedShard(paths, ref)


def _copy(context: JobContext, source: ChunkSource, chunks: ShardChunks, runs: Sequence[range], write: Take) -> None:
    """Have ``source`` hand the chunks of ``runs`` to ``write``."""
    lock, done, middle = threading.Lock(), 0, sum(map(len, runs)) // 2

    def take(first: int, view: memoryview) -> None:
        nonlocal done
        with lock:
            begin, done = done, done - (-len(view) // chunks.chunk_bytes)
            is_middle = begin <= middle < done
        if is_middle:
            faults.reach(source.fault_point, step=chunks.step, rank=chunks.rank)
        with context.timed("write"):
            write(first, view)
        with lock:
            context.done_bytes += len(view)

    source.read(chunks, runs, take)
