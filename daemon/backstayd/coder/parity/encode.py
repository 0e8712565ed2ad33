"""Encoding one stripe: the k data blocks come from their members, parity 0 stays here, the rest is forwarded."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Sequence

from backstay import faults
from backstay.errors import BackstayError
from backstayd.coder.context import JobContext
from backstayd.coder.jobs import CoderEvent, EncodeStripe
from backstayd.coder.parity.chunk_writers import ForwardSink, OwnParity
from backstayd.coder.parity.reuse import NO_OLDER, Older, OlderFragment, find_older, others
from backstayd.coder.parity.stored_plans import check_plan, gather_plan
from backstayd.coder.parity.windows import encode_windows
from backstayd.coder.verified_reads import RemoteShards, block_ranges
from backstayd.core.inventory import geometry
from backstayd.core.messages.plans import Plan
from backstayd.erasure.pyeclib_codec import codec_for
from backstayd.store.fragments import FragmentWriter
from backstayd.store.paths import FragmentRef
from backstayd.store.record_files import ShardChunks

logger = logging.getLogger(__name__)

UNKNOWN_OPERATION = "unknown_operation"  # a peer of an earlier version


def run_encode(context: JobContext, job: EncodeStripe) -> None:
    """Do ``job``; on return the plan, parity 0 here and parity 1..m-1 on their members are published. Idempotent."""
    plan, stripe = job.plan, job.stripe
    check_plan(plan, stripe)
    with context.timed("plan"):
        by_digest = gather_plan(context, plan, stripe)
    if plan.m == 0:
        return
    older = find_older(context, plan, stripe, by_digest)
    if older is not None:
        try:
            _encode(context, plan, stripe, by_digest, older)
        except BackstayError as error:
            if error.reason not in (NO_OLDER, UNKNOWN_OPERATION):
                raise
            context.check()
            logger.info("stripe %d of step %d is encoded in full: %s", stripe, plan.step, error)
        else:
            return
    _encode(context, plan, stripe, by_digest, None)


def _encode(
    context: JobContext, plan: Plan, stripe: int, by_digest: dict[str, ShardChunks], older: Older | None
) -> None:
    """Make and publish the parity of ``stripe``; of ``older``, what serves again is taken over by each of its holders."""
    n, size = len(plan.members), geometry.fragment_bytes(plan, stripe)
    with contextlib.ExitStack() as stack:
        writer = FragmentWriter(
            context.paths(plan.run),
            FragmentRef.of(plan, stripe, 0),
            size_bytes=size,
            incarnation=context.incarnation,
        )
        stack.callback(writer.abort)
        own = _own_sink(context, plan, stripe, writer, older)
        stack.callback(own.close)
        forwards = []
        for index, member in enumerate(geometry.parity_members(stripe, n=n, m=plan.m)):
            if index > 0:
                forwards.append(_forward(context, plan, stripe, (index, member), older))
                stack.callback(forwards[-1].close)
        chunks = others(older.ranges if older is not None else (), writer.chunk_count)
        sources = [
            _source(context, plan, stripe, member, chunks, by_digest)
            for member in geometry.data_members(stripe, n=n, m=plan.m)
        ]
        for source in sources:
            stack.callback(source.close)
        encode_windows(
            plan,
            stripe,
            codec_for(plan.k, plan.m),
            sources=sources,
            sinks=[own, *forwards],
            on_chunk=_progress(context, plan, stripe, writer.chunk_count),
            chunks=itertools.chain.from_iterable(chunks),
        )
        own.finish()
        stored = writer.commit()
        context.emit(CoderEvent(kind="fragment_stored", fragment=stored.ref, size_bytes=stored.size_bytes))
        for forward in forwards:
            forward.finish()
        context.done_bytes += stored.size_bytes * plan.k


def _own_sink(context: JobContext, plan: Plan, stripe: int, writer: FragmentWriter, older: Older | None) -> OwnParity:
    if older is None:
        return OwnParity(context, writer)
    size = geometry.fragment_bytes(plan, stripe)
    fragment = OlderFragment(context.paths(plan.run), older.ref(stripe, 0), size_bytes=size)
    return OwnParity(context, writer, older=fragment, kept=older.ranges)


def _forward(context: JobContext, plan: Plan, stripe: int, place: tuple[int, int], older: Older | None) -> ForwardSink:
    index, member = place
    return ForwardSink(
        context,
        plan.members[member].bulk_address,
        FragmentRef.of(plan, stripe, index),
        size_bytes=geometry.fragment_bytes(plan, stripe),
        chunk_count=geometry.stripe_chunks(plan, stripe),
        older=None if older is None else (older.ref(stripe, index), older.ranges),
    )


def _source(
    context: JobContext,
    plan: Plan,
    stripe: int,
    member: int,
    chunks: Sequence[range],
    by_digest: dict[str, ShardChunks],
) -> RemoteShards:
    """The data of ``member`` at the positions ``chunks`` of the stripe."""
    block = geometry.block_range(plan, stripe, member)
    ranges = [r for one in chunks for r in block_ranges(plan, member, block[one.start : one.stop], by_digest)]
    context.moved["read"] += sum(
        r.chunks.chunk_length(chunk) for r in ranges for chunk in range(r.first_chunk, r.first_chunk + r.chunk_count)
    )
    return RemoteShards(context, plan.members[member].bulk_address, ranges)


def _progress(context: JobContext, plan: Plan, stripe: int, chunk_count: int) -> Callable[[int], None]:
    def on_chunk(chunk: int) -> None:
        context.check()
        if chunk == chunk_count // 2:
            faults.reach("mid_encode", step=plan.step, stripe=stripe)

    return on_chunk
