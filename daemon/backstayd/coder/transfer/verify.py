"""Checking every chunk of a shard or a parity fragment that lies on this node. Changes nothing."""

from __future__ import annotations

import os

from crc32c import crc32c

from backstay.errors import IntegrityError
from backstay.format.manifest import CHUNK_BYTES
from backstayd.coder.context import JobContext, shard_ref_of
from backstayd.coder.jobs import VerifyFragment, VerifyShard
from backstayd.coder.verified_reads import LocalFragment, LocalShards, ShardRange
from backstayd.core.inventory import geometry
from backstayd.store.record_files import read_manifest
from backstayd.store.staging import StagedShard
from backstayd.transport.bulk.client import FragmentRef, ShardRef


def run_verify_shard(context: JobContext, job: VerifyShard) -> None:
    """Do ``job``. Raises CorruptSourceError for a bad chunk or manifest, SnapshotNotFoundError when it is not here."""
    ref = shard_ref_of(job)
    paths = context.paths(job.run)
    if job.is_staged:
        try:
            staged = StagedShard(paths, rank=job.rank, world_size=job.world_size, digest=job.digest)
        except IntegrityError as error:
            raise context.blame(ref, node="", detail=str(error)) from error
        try:
            _verify_staged(context, staged, ref)
        finally:
            staged.close()
        return
    try:
        chunks = read_manifest(paths.manifest(ref.key, job.rank, job.world_size), digest=job.digest)
    except IntegrityError as error:
        raise context.blame(ref, node="", detail=str(error)) from error
    source = LocalShards(context, [ShardRange(chunks, 0, chunks.chunk_count)])
    _read_through(context, source, chunks.chunk_count)


def run_verify_fragment(context: JobContext, job: VerifyFragment) -> None:
    """Do ``job``. Raises as :func:`run_verify_shard`."""
    plan = job.plan
    ref = FragmentRef(run=plan.run, key=plan.key, plan_id=plan.plan_id, stripe=job.stripe, index=job.index)
    source = LocalFragment(context, ref, first_chunk=0)
    expected = geometry.fragment_bytes(plan, job.stripe)
    if source.size_bytes != expected:
        source.close()
        raise context.blame(ref, node="", detail=f"{source.size_bytes} bytes, the plan says {expected}")
    _read_through(context, source, geometry.stripe_chunks(plan, job.stripe))


def _read_through(context: JobContext, source: LocalShards | LocalFragment, chunk_count: int) -> None:
    buffer = memoryview(bytearray(CHUNK_BYTES))
    try:
        for _ in range(chunk_count):
            context.check()
            context.done_bytes += source.read_into(buffer)
    finally:
        source.close()


def _verify_staged(context: JobContext, staged: StagedShard, ref: ShardRef) -> None:
    buffer = memoryview(bytearray(CHUNK_BYTES))
    for chunk in range(staged.chunks.chunk_count):
        context.check()
        view = buffer[: staged.chunks.chunk_length(chunk)]
        read = os.preadv(staged.fd, [view], chunk * CHUNK_BYTES)
        found, expected = crc32c(view[:read]), staged.chunks.chunk_crc(chunk)
        if found != expected:
            raise context.blame(ref, node="", detail=f"chunk {chunk} has crc {found:08x}, expected {expected:08x}")
        context.done_bytes += read
