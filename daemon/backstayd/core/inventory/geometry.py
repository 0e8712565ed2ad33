"""Where each byte of a group's volumes lies in its stripes: the layout of docs/architecture.md, as arithmetic.

A volume is a node's shards one after another, each padded (in arithmetic only) to whole chunks, so a chunk of a shard is a
chunk of its volume and every reader can check it against the manifest. A volume of V chunks is cut into k blocks of
ceil(V / k) chunks, one for each stripe in which the node is not a parity node. Parity of stripe s lies on members s, s+1,
..., s+m-1 (mod n). Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from backstayd.core.messages.plans import Member, Plan


@dataclass(frozen=True, slots=True)
class Segment:
    """``chunk_count`` chunks of one shard, beginning at the shard's chunk ``first_chunk``; the last may be short."""

    rank: int
    first_chunk: int
    chunk_count: int


def parity_members(stripe: int, *, n: int, m: int) -> tuple[int, ...]:
    """Members that hold parity 0..m-1 of ``stripe``, in that order. Member ``stripe`` is its encoder."""
    return tuple((stripe + index) % n for index in range(m))


def data_members(stripe: int, *, n: int, m: int) -> tuple[int, ...]:
    """Members that contribute data fragments 0..k-1 of ``stripe``, in that order."""
    parity = set(parity_members(stripe, n=n, m=m))
    return tuple(member for member in range(n) if member not in parity)


def block_of(stripe: int, member: int, *, n: int, m: int) -> int:
    """Which of its k blocks ``member`` contributes to ``stripe``; ``member`` must be a data member of it."""
    stripes = member_stripes(member, n=n, m=m)
    return stripes.index(stripe)


def member_stripes(member: int, *, n: int, m: int) -> tuple[int, ...]:
    """The k stripes to which ``member`` contributes data, ascending: its blocks 0..k-1."""
    return tuple(s for s in range(n) if (member - s) % n >= m)


def chunk_count(size_bytes: int, chunk_bytes: int) -> int:
    return -(-size_bytes // chunk_bytes)


def volume_chunks(member: Member, chunk_bytes: int) -> int:
    return sum(chunk_count(shard.size_bytes, chunk_bytes) for shard in member.shards)


def block_range(plan: Plan, stripe: int, member: int) -> range:
    """The chunks of ``member``'s volume that form its data fragment of ``stripe`` (may be empty)."""
    total = volume_chunks(plan.members[member], plan.chunk_bytes)
    block_chunks = -(-total // plan.k)
    block = block_of(stripe, member, n=len(plan.members), m=plan.m)
    return range(min(block * block_chunks, total), min((block + 1) * block_chunks, total))


def stripe_chunks(plan: Plan, stripe: int) -> int:
    """Length of every parity fragment of ``stripe`` in chunks: that of its longest data fragment."""
    members = data_members(stripe, n=len(plan.members), m=plan.m)
    return max((len(block_range(plan, stripe, member)) for member in members), default=0)


def fragment_chunk_bytes(plan: Plan, stripe: int, chunk: int) -> int:
    """Bytes of parity chunk ``chunk`` of ``stripe``: whole chunks, but the last is as long as its longest data chunk.

    Shorter data chunks are zero-padded in arithmetic; a linear code maps zeros to zeros, so nothing is lost by trimming.
    """
    if chunk < stripe_chunks(plan, stripe) - 1:
        return plan.chunk_bytes
    longest = 0
    for member in data_members(stripe, n=len(plan.members), m=plan.m):
        blocks = block_range(plan, stripe, member)
        if chunk < len(blocks):
            longest = max(longest, volume_chunk_bytes(plan, member, blocks[chunk]))
    return longest


def fragment_bytes(plan: Plan, stripe: int) -> int:
    """Size of a parity fragment file of ``stripe``: chunk c begins at byte c * chunk_bytes."""
    chunks = stripe_chunks(plan, stripe)
    if chunks == 0:
        return 0
    return (chunks - 1) * plan.chunk_bytes + fragment_chunk_bytes(plan, stripe, chunks - 1)


def volume_chunk_bytes(plan: Plan, member: int, chunk: int) -> int:
    """Bytes of one chunk of a volume: ``chunk_bytes`` but for the last chunk of each shard."""
    for shard in plan.members[member].shards:
        count = chunk_count(shard.size_bytes, plan.chunk_bytes)
        if chunk < count:
            return min(plan.chunk_bytes, shard.size_bytes - chunk * plan.chunk_bytes)
        chunk -= count
    raise IndexError(f"member {member} has no chunk {chunk} past its end")


def segments(plan: Plan, member: int, chunks: range) -> Iterator[Segment]:
    """The shard ranges that the volume chunks ``chunks`` of ``member`` cover, in order."""
    begin = 0
    for shard in plan.members[member].shards:
        count = chunk_count(shard.size_bytes, plan.chunk_bytes)
        first = max(chunks.start, begin)
        last = min(chunks.stop, begin + count)
        if first < last:
            yield Segment(shard.rank, first - begin, last - first)
        begin += count
