"""Storing a plan with all manifests of its group on this node, before anything of it is acknowledged.

Manifests come from the members that hold the shards, or whole from a peer that stored the plan already.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from backstay.errors import BackstayError, IntegrityError, SnapshotNotFoundError, UnavailableError
from backstay.format import json_records
from backstay.format.manifest import CHUNK_BYTES
from backstayd.coder.context import JobContext
from backstayd.coder.jobs import CoderEvent, FetchPlan
from backstayd.core.messages.plans import Plan, VolumeShard
from backstayd.store.paths import FragmentRef, ShardRef
from backstayd.store.published import read_plan
from backstayd.store.record_files import (
    ShardChunks,
    StoredPlan,
    make_directory,
    parse_manifest,
    read_manifest,
    read_small,
    write_atomically,
)
from backstayd.transport.bulk.client import BulkClient


def check_plan(plan: Plan, stripe: int = 0) -> None:
    """Raise IntegrityError for a plan whose id is not that of its content, or whose shape this coder cannot do."""
    if not plan.is_sealed():
        raise IntegrityError(f"plan {plan.plan_id[:8]} does not have the id of its content", reason="bad_plan")
    if plan.chunk_bytes != CHUNK_BYTES or plan.k < 1 or not 0 <= stripe < len(plan.members):
        raise IntegrityError(
            f"plan {plan.plan_id[:8]}: stripe {stripe} of k={plan.k}, m={plan.m}, chunks of {plan.chunk_bytes} bytes",
            reason="bad_plan",
        )


def gather_plan(context: JobContext, plan: Plan, own_member: int) -> dict[str, ShardChunks]:
    """Store ``plan`` with every member's manifests here unless it is; returns the chunk digests by shard digest.

    Raises:
        SnapshotNotFoundError: a shard is not published any more. IntegrityError: a manifest is corrupt.
    """
    paths = context.paths(plan.run)
    try:
        return read_plan(paths, plan)[1]
    except (SnapshotNotFoundError, IntegrityError):
        pass  # not here, or damaged: written anew
    manifests: list[dict[str, Any]] = []
    by_digest: dict[str, ShardChunks] = {}
    for index, member in enumerate(plan.members):
        client = None if index == own_member or not member.shards else context.client(member.bulk_address)
        for shard in member.shards:
            context.check()
            raw, chunks = _manifest(context, plan, shard, client)
            manifests.append(json.loads(raw))
            by_digest[shard.digest] = chunks
        if client is not None:
            context.release(client)
    store_plan(context, StoredPlan(plan=plan, manifests=tuple(manifests)))
    return by_digest


def run_fetch_plan(context: JobContext, job: FetchPlan) -> None:
    """Store a plan that some peer stored; does nothing when it is here and sound."""
    check_plan(job.plan)
    fetch_plan(context, job.plan, job.addresses)


def fetch_plan(context: JobContext, plan: Plan, addresses: Iterable[str]) -> dict[str, ShardChunks]:
    """The chunk digests of ``plan``: stored here, else from the first peer that has it whole (then stored here).

    Raises:
        UnavailableError: no peer has it.
    """
    try:
        return read_plan(context.paths(plan.run), plan)[1]
    except (SnapshotNotFoundError, IntegrityError):
        pass
    failures = []
    for address in dict.fromkeys(addresses):
        context.check()
        client = context.client(address)
        try:
            stored = json_records.loads(StoredPlan, client.get_plan(FragmentRef.of(plan)))
            if stored.plan != plan:
                raise IntegrityError(f"{address} stores another plan under {plan.plan_id[:8]}", reason="bad_plan")
            by_digest = stored.chunks_by_digest()
        except BackstayError as error:
            failures.append(f"{address}: {error}")
            continue
        finally:
            context.release(client)
        store_plan(context, stored)
        return by_digest
    raise UnavailableError(
        f"no peer has plan {plan.plan_id[:8]} of step {plan.step} with its manifests: {'; '.join(failures) or 'none asked'}",
        reason="no_plan",
    )


def store_plan(context: JobContext, stored: StoredPlan) -> None:
    """Publish a stored plan on this node and say so."""
    plan = stored.plan
    path = context.paths(plan.run).plan(plan.key, plan.plan_id)
    make_directory(path.parent)
    write_atomically(path, json_records.dumps(stored), incarnation=context.incarnation)
    context.emit(CoderEvent(kind="plan_stored", fragment=FragmentRef.of(plan)))


def _manifest(
    context: JobContext, plan: Plan, shard: VolumeShard, client: BulkClient | None
) -> tuple[bytes, ShardChunks]:
    """One member's manifest, its exact bytes checked against the digest in the volume table."""
    ref = ShardRef(run=plan.run, key=plan.key, rank=shard.rank, world_size=plan.world_size, digest=shard.digest)
    try:
        if client is None:
            path = context.paths(plan.run).manifest(plan.key, shard.rank, plan.world_size)
            chunks = read_manifest(path, digest=shard.digest)
            raw = read_small(path)
        else:
            raw = client.get_manifest(ref)
            chunks = parse_manifest(raw, digest=shard.digest)
        if (chunks.rank, chunks.size_bytes, chunks.run) != (shard.rank, shard.size_bytes, plan.run):
            raise IntegrityError(
                f"manifest of rank {chunks.rank} with {chunks.size_bytes} bytes", reason="bad_manifest"
            )
    except IntegrityError as error:
        raise context.blame(ref, node=client.address if client else "", detail=str(error)) from error
    return raw, chunks
