"""Every pattern of up to m lost nodes rebuilds byte for byte: real codec, real geometry, the production window loops.

Only input and output are in memory, with small chunks, so that every pattern of every shape can be tried.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from backstayd.coder.parity.windows import decode_windows, encode_windows, padded
from backstayd.coder.parity.wrong_parity import Rebuilt, find_fit
from backstayd.core.inventory import geometry
from backstayd.core.messages.plans import Member, Plan, VolumeShard
from backstayd.erasure.pyeclib_codec import codec_for

CHUNK = 64
SHAPES = [(n, m) for n in range(2, 9) for m in range(1, 4) if m < n]


@dataclass
class MemorySource:
    chunks: list[bytes]

    def read_into(self, view: memoryview) -> int:
        chunk = self.chunks.pop(0)
        view[: len(chunk)] = chunk
        return len(chunk)


@dataclass
class MemorySink:
    chunks: list[bytes] = field(default_factory=list)

    def write(self, chunk: int, pieces: Sequence[memoryview]) -> None:
        assert chunk == len(self.chunks)
        self.chunks.append(b"".join(pieces))

    def is_right(self, chunk: int, pieces: Sequence[memoryview]) -> bool:
        """Whatever is decoded is compared at the end."""
        return True


@dataclass
class Group:
    plan: Plan
    shards: dict[int, bytes]  # by rank
    parity: dict[tuple[int, int], list[bytes]]  # (stripe, index) -> chunks

    def block(self, stripe: int, member: int) -> list[bytes]:
        """The chunks a node would read for its data fragment."""
        block = geometry.block_range(self.plan, stripe, member)
        return [
            self.shards[segment.rank][chunk * CHUNK : (chunk + 1) * CHUNK]
            for segment in geometry.segments(self.plan, member, block)
            for chunk in range(segment.first_chunk, segment.first_chunk + segment.chunk_count)
        ]


def nothing(chunk: int) -> None:
    """No progress to report."""


def nothing_fits(*_: object) -> Rebuilt:
    raise AssertionError("what was decoded is said to be wrong")


def encoded_group(n: int, m: int, generator: random.Random) -> Group:
    shards: dict[int, bytes] = {}
    members = []
    for index in range(n):
        volume = []
        for _ in range(generator.choice([0, 1, 1, 2, 3])):
            rank = len(shards)
            shards[rank] = generator.randbytes(generator.choice([0, 1, CHUNK, generator.randrange(1, 12 * CHUNK)]))
            volume.append(VolumeShard(rank=rank, size_bytes=len(shards[rank]), digest=f"{rank}"))
        members.append(Member(node=f"{index}", incarnation="", bulk_address="", shards=tuple(volume)))
    plan = Plan(
        run="j/r",
        snapshot_id="",
        attempt=1,
        step=1,
        world_size=len(shards),
        m=m,
        chunk_bytes=CHUNK,
        members=tuple(members),
    )
    group = Group(plan, shards, {})
    for stripe in range(n):
        sinks = [MemorySink() for _ in range(m)]
        sources = [MemorySource(group.block(stripe, member)) for member in geometry.data_members(stripe, n=n, m=m)]
        encode_windows(plan, stripe, codec_for(n - m, m), sources=sources, sinks=sinks, on_chunk=nothing)
        for index, sink in enumerate(sinks):
            group.parity[stripe, index] = sink.chunks
            assert sum(map(len, sink.chunks)) == geometry.fragment_bytes(plan, stripe)
    return group


def rebuilt_blocks(group: Group, stripe: int, lost: set[int], generator: random.Random) -> dict[int, list[bytes]]:
    """Decode all lost data blocks of a stripe from k random surviving fragments; by member."""
    plan = group.plan
    n = len(plan.members)
    data = geometry.data_members(stripe, n=n, m=plan.m)
    parity = geometry.parity_members(stripe, n=n, m=plan.m)
    chunks = {index: group.block(stripe, member) for index, member in enumerate(data) if member not in lost}
    chunks |= {
        plan.k + index: list(group.parity[stripe, index]) for index, member in enumerate(parity) if member not in lost
    }
    used = generator.sample(sorted(chunks), plan.k)
    counts = {index: len(chunks[index]) for index in used}
    sources = {index: MemorySource(chunks[index]) for index in used}
    buffers = {index: memoryview(bytearray(CHUNK)) for index in used}
    sinks = {index: MemorySink() for index, member in enumerate(data) if member in lost}
    if not sinks:
        return {}

    def read_chunk(chunk: int, length: int) -> dict[int, memoryview]:
        return {
            index: padded(source if chunk < counts[index] else None, buffers[index], length)
            for index, source in sources.items()
        }

    longest = max(len(geometry.block_range(plan, stripe, data[index])) for index in sinks)
    decode_windows(
        plan,
        stripe,
        codec_for(plan.k, plan.m),
        chunks=range(longest),
        read_chunk=read_chunk,
        search=nothing_fits,
        sinks=sinks,
        on_chunk=nothing,
    )
    return {data[index]: sink.chunks for index, sink in sinks.items()}


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_every_pattern_of_up_to_m_lost_nodes_rebuilds_byte_for_byte(n: int, m: int) -> None:
    generator = random.Random(1000 * n + m)
    for _ in range(3):
        group = encoded_group(n, m, generator)
        for count in range(1, m + 1):
            for lost in itertools.combinations(range(n), count):
                assert_rebuilds(group, set(lost), generator)


def assert_rebuilds(group: Group, lost: set[int], generator: random.Random) -> None:
    n, m = len(group.plan.members), group.plan.m
    blocks = {stripe: rebuilt_blocks(group, stripe, lost, generator) for stripe in range(n)}
    for member in lost:
        volume = b"".join(
            chunk for stripe in geometry.member_stripes(member, n=n, m=m) for chunk in blocks[stripe][member]
        )
        original = b"".join(group.shards[shard.rank] for shard in group.plan.members[member].shards)
        assert volume == original, f"n={n} m={m} lost={sorted(lost)} member={member}"


@pytest.mark.parametrize(("n", "m"), [(n, m) for n, m in SHAPES if m > 1])
def test_parity_that_is_wrong_is_told_from_k_and_one_more_fragments_that_are_right(n: int, m: int) -> None:
    k, generator = n - m, random.Random(7000 * n + m)
    codec = codec_for(k, m)
    blocks = [memoryview(generator.randbytes(CHUNK)) for _ in range(k)]
    whole = {**dict(enumerate(blocks)), **{k + index: piece for index, piece in enumerate(codec.encode(blocks))}}
    for lost in range(1, min(k, m - 1) + 1):
        for wrong in itertools.combinations(range(k, n), m - lost):  # ``lost`` fragments of parity are right
            wanted = generator.sample(range(k), lost)
            spoilt = {index: memoryview(generator.randbytes(CHUNK)) for index in wrong}
            available = {index: view for index, view in {**whole, **spoilt}.items() if index not in wanted}
            originals = [blocks[index] for index in wanted]
            fit = find_fit(
                codec, available, wanted, length=CHUNK, is_right=lambda found, o=originals: joined(found) == joined([o])
            )
            assert fit is not None
            assert fit.wrong == wrong
            assert joined(fit.rebuilt) == joined([originals])
            fewer = {index: view for index, view in available.items() if index < k or index in wrong}
            nothing_right = find_fit(codec, fewer, wanted, length=CHUNK, is_right=lambda _: False)
            assert nothing_right is None


def joined(fragments: Rebuilt) -> bytes:
    return b"".join(piece for pieces in fragments for piece in pieces)
