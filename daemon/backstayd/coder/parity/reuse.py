"""Parity that need not be made again: chunk positions of a stripe whose data an older snapshot has too.

Taken only where the writers of all k data chunks said that they did not change and their digests agree. What is wrong all the
same is found like any wrong parity: a chunk that is decoded from it fails its digest. Must not write anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from backstay.errors import BackstayError, IntegrityError, SnapshotNotFoundError
from backstay.format import json_records
from backstay.ids import SnapshotKey
from backstayd.coder.context import JobContext
from backstayd.coder.verified_reads import check_fragment
from backstayd.core.inventory import geometry
from backstayd.core.messages.plans import Plan
from backstayd.store.paths import FragmentRef, RunPaths, parse_snapshot
from backstayd.store.published import open_fragment, read_verified
from backstayd.store.record_files import ShardChunks, StoredPlan, read_small

NO_OLDER: Final = "no_older_parity"  # the reason of a member that cannot take part: the stripe is encoded in full then
MAX_RANGES: Final = 512
MAX_PLANS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Older:
    """The parity of ``plan`` serves again at the chunk positions ``ranges`` of one stripe, ascending."""

    plan: Plan
    ranges: tuple[range, ...]

    def ref(self, stripe: int, index: int) -> FragmentRef:
        return FragmentRef.of(self.plan, stripe, index)


class OlderFragment:
    """A locked older fragment of this node, read chunk by chunk and verified. Close it."""

    def __init__(self, paths: RunPaths, ref: FragmentRef, *, size_bytes: int) -> None:
        """Raises SnapshotNotFoundError (``NO_OLDER``) unless it is here, sound by its record and of that size."""
        self._opened = open_fragment(paths, ref)
        try:
            self._fd, self._stored = self._opened.__enter__()
        except BackstayError as error:
            raise SnapshotNotFoundError(f"older parity of step {ref.key.step}: {error}", reason=NO_OLDER) from error
        try:
            check_fragment(self._stored, ref)
            if self._stored.size_bytes != size_bytes:
                raise IntegrityError(f"it has {self._stored.size_bytes} bytes, not {size_bytes}")
        except IntegrityError as error:
            self.close()
            raise SnapshotNotFoundError(f"older parity of step {ref.key.step}: {error}", reason=NO_OLDER) from error

    def read_into(self, chunk: int, view: memoryview) -> tuple[int, memoryview]:
        """(crc, bytes) of one chunk in ``view``; raises SnapshotNotFoundError (``NO_OLDER``) if they are damaged."""
        view = view[: self._stored.chunk_length(chunk)]
        crc = self._stored.chunk_crc(chunk)
        if not read_verified(self._fd, view, chunk=chunk, crc=crc):
            raise SnapshotNotFoundError(f"chunk {chunk} of the older parity is damaged", reason=NO_OLDER)
        return crc, view

    def close(self) -> None:
        self._opened.__exit__(None, None, None)


def find_older(context: JobContext, plan: Plan, stripe: int, by_digest: dict[str, ShardChunks]) -> Older | None:
    """The newest older plan of this node whose parity of ``stripe`` serves in part, or None."""
    if not any(chunks.unchanged for chunks in by_digest.values()):
        return None
    paths = context.paths(plan.run)
    for older, theirs in itertools.islice(_older_plans(paths, plan, stripe), MAX_PLANS):
        positions = _same_positions(plan, stripe, by_digest, older, theirs)
        ranges = sorted(_ranges(positions), key=len, reverse=True)[:MAX_RANGES]
        if ranges:
            return Older(plan=older, ranges=tuple(sorted(ranges, key=lambda one: one.start)))
    return None


def others(ranges: Sequence[range], count: int) -> list[range]:
    """The positions below ``count`` that lie in none of the ascending ``ranges``."""
    ends = [0, *(one.stop for one in ranges)]
    begins = [*(one.start for one in ranges), count]
    return [range(end, begin) for end, begin in zip(ends, begins, strict=True) if begin > end]


def _older_plans(paths: RunPaths, plan: Plan, stripe: int) -> Iterator[tuple[Plan, dict[str, ShardChunks]]]:
    """Stored plans of the same shape over the same members with older steps of the attempt, newest first."""
    steps = [parse_snapshot(path) for path in paths.snapshot(plan.key).parent.glob("step-*")]
    for step in sorted((key.step for key in steps if key is not None and key.step < plan.step), reverse=True):
        key = SnapshotKey(plan.attempt, step)
        for record_path in paths.parity(key).glob(f"plan-*.stripe-{stripe:02d}.index-0.json"):
            plan_id = record_path.name.removeprefix("plan-").partition(".")[0]
            try:
                stored = json_records.loads(StoredPlan, read_small(paths.plan(key, plan_id)))
                chunks = stored.chunks_by_digest()
            except BackstayError:
                continue  # released meanwhile, or damaged: whoever reads it next puts it aside
            if _shape(stored.plan) == _shape(plan):
                yield stored.plan, chunks


def _shape(plan: Plan) -> tuple[object, ...]:
    """What two plans must share for their chunks to lie in the same places on the same nodes."""
    members = tuple(
        (m.node, m.incarnation, m.bulk_address, tuple((s.rank, s.size_bytes) for s in m.shards)) for m in plan.members
    )
    return (plan.run, plan.attempt, plan.world_size, plan.m, plan.chunk_bytes, members)


def _same_positions(
    plan: Plan, stripe: int, ours: dict[str, ShardChunks], older: Plan, theirs: dict[str, ShardChunks]
) -> bytearray:
    """For each chunk position of the stripe, 1 if all its data chunks are the same in both."""
    count = geometry.stripe_chunks(plan, stripe)
    result = bytearray(b"\1" * count)
    for member in geometry.data_members(stripe, n=len(plan.members), m=plan.m):
        block = geometry.block_range(plan, stripe, member)
        same = bytearray(b"\1" * count)  # behind the block's end are zeros in both
        position = 0
        pairs = zip(plan.members[member].shards, older.members[member].shards, strict=True)
        by_rank = {new.rank: (ours[new.digest], theirs[old.digest]) for new, old in pairs}
        for segment in geometry.segments(plan, member, block):
            flags = _same_chunks(
                *by_rank[segment.rank], range(segment.first_chunk, segment.first_chunk + segment.chunk_count)
            )
            same[position : position + segment.chunk_count] = flags
            position += segment.chunk_count
        both = int.from_bytes(result) & int.from_bytes(same)
        result = bytearray(both.to_bytes(count))
    return result


def _same_chunks(new: ShardChunks, old: ShardChunks, chunks: range) -> bytes:
    """For each of ``chunks`` of a shard, 1 if its writer said that it is as in ``old``, and the digests agree."""
    same = bytearray(len(chunks))
    identity = (new.attempt, new.world_id, new.rank, new.size_bytes, bool(new.world_id))
    if identity != (old.attempt, old.world_id, old.rank, old.size_bytes, True):
        return bytes(same)
    for one in new.unchanged:
        first, last = max(one.first_chunk, chunks.start), min(one.first_chunk + one.chunk_count, chunks.stop)
        if one.since_step > old.step or first >= last:
            continue
        if new.chunk_crcs[8 * first : 8 * last] == old.chunk_crcs[8 * first : 8 * last]:
            same[first - chunks.start : last - chunks.start] = b"\1" * (last - first)
    return bytes(same)


def _ranges(flags: bytearray) -> Iterator[range]:
    begin = flags.find(1)
    while begin >= 0:
        end = flags.find(0, begin)
        end = len(flags) if end < 0 else end
        yield range(begin, end)
        begin = flags.find(1, end)
