"""Encoding one stripe: the k data blocks come from their members, parity 0 stays here, the rest is forwarded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from backstay import faults
from backstayd.coder.context import JobContext
from backstayd.coder.jobs import EncodeStripe, fragment_event
from backstayd.coder.plans import check_plan, gather_plan
from backstayd.coder.sinks import ForwardSink, ParitySink
from backstayd.coder.sources import RemoteShards, block_ranges
from backstayd.coder.windows import ChunkSink, encode_windows
from backstayd.core import geometry
from backstayd.core.records import Plan
from backstayd.erasure.pyeclib_codec import codec_for
from backstayd.store.fragments import FragmentWriter
from backstayd.store.stored import ShardChunks
from backstayd.transport.bulk import FragmentRef


def run_encode(context: JobContext, job: EncodeStripe) -> None:
    """Do ``job``; on return the plan, parity 0 here and parity 1..m-1 on their members are published. Idempotent."""
    plan, stripe = job.plan, job.stripe
    check_plan(plan, stripe)
    with context.timed("plan"):
        by_digest = gather_plan(context, plan, stripe)
    if plan.m == 0:
        return
    writer = FragmentWriter(
        context.paths(plan.run),
        plan.key,
        plan.plan_id,
        stripe=stripe,
        index=0,
        size_bytes=geometry.fragment_bytes(plan, stripe),
        incarnation=context.incarnation,
    )
    try:
        _encode(context, plan, stripe, by_digest, writer)
    finally:
        writer.abort()


def _encode(
    context: JobContext, plan: Plan, stripe: int, by_digest: dict[str, ShardChunks], writer: FragmentWriter
) -> None:
    n = len(plan.members)
    chunk_count = geometry.stripe_chunks(plan, stripe)
    forwards = []
    for index, member in enumerate(geometry.parity_members(stripe, n=n, m=plan.m)):
        if index == 0:
            continue
        ref = FragmentRef(run=plan.run, key=plan.key, plan_id=plan.plan_id, stripe=stripe, index=index)
        size = geometry.fragment_bytes(plan, stripe)
        address = plan.members[member].bulk_address
        forwards.append(ForwardSink(context, address, ref, size_bytes=size, chunk_count=chunk_count))
    sinks: list[ChunkSink] = [ParitySink(context, writer), *forwards]
    with contextlib.ExitStack() as stack:
        sources = []
        for member in geometry.data_members(stripe, n=n, m=plan.m):
            ranges = block_ranges(plan, member, geometry.block_range(plan, stripe, member), by_digest)
            source = RemoteShards(context, plan.members[member].bulk_address, ranges)
            stack.callback(source.close)
            sources.append(source)
        encode_windows(
            plan,
            stripe,
            codec_for(plan.k, plan.m),
            sources=sources,
            sinks=sinks,
            on_chunk=_progress(context, plan, stripe, chunk_count),
        )
    stored = writer.commit()
    context.emit(fragment_event("fragment_stored", stored))
    for forward in forwards:
        forward.finish()
    context.done_bytes += stored.size_bytes * plan.k


def _progress(context: JobContext, plan: Plan, stripe: int, chunk_count: int) -> Callable[[int], None]:
    def on_chunk(chunk: int) -> None:
        context.check()
        if chunk == chunk_count // 2:
            faults.reach("mid_encode", step=plan.step, stripe=stripe)

    return on_chunk
