"""The layout of volumes in stripes, checked by enumeration against its definition."""

from __future__ import annotations

import itertools
import random

import pytest

from backstayd.core.inventory import geometry
from backstayd.core.messages.plans import Member, Plan, VolumeShard

CHUNK = 16
SHAPES = [(n, m) for n in range(2, 13) for m in range(min(n, 5))]


def plan_of(sizes: list[list[int]], m: int) -> Plan:
    ranks = itertools.count()
    members = tuple(
        Member(
            node=f"node-{index}",
            incarnation="i",
            bulk_address=f"host:{index}",
            shards=tuple(VolumeShard(rank=next(ranks), size_bytes=size, digest="") for size in volume),
        )
        for index, volume in enumerate(sizes)
    )
    return Plan(run="job/run", snapshot_id="", attempt=1, step=1, world_size=1, m=m, chunk_bytes=CHUNK, members=members)


def random_sizes(n: int, seed: int) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(0, 9 * CHUNK) for _ in range(generator.randrange(0, 4))] for _ in range(n)]


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_every_stripe_has_each_member_once_as_data_or_parity(n: int, m: int) -> None:
    for stripe in range(n):
        data = geometry.data_members(stripe, n=n, m=m)
        parity = geometry.parity_members(stripe, n=n, m=m)
        assert sorted(data + parity) == list(range(n))
        assert len(parity) == m
        assert parity == tuple((stripe + index) % n for index in range(m))
        assert m == 0 or parity[0] == stripe


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_every_member_contributes_its_k_blocks_to_k_stripes_and_holds_m_parities(n: int, m: int) -> None:
    for member in range(n):
        stripes = geometry.member_stripes(member, n=n, m=m)
        assert len(stripes) == n - m
        assert [geometry.block_of(stripe, member, n=n, m=m) for stripe in stripes] == list(range(n - m))
        assert sum(member in geometry.parity_members(stripe, n=n, m=m) for stripe in range(n)) == m


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_every_byte_of_every_volume_is_in_exactly_one_data_fragment(n: int, m: int) -> None:
    for seed in range(3):
        plan = plan_of(random_sizes(n, seed), m)
        seen: dict[tuple[int, int], int] = {}
        for stripe in range(n):
            for member in geometry.data_members(stripe, n=n, m=m):
                block = geometry.block_range(plan, stripe, member)
                for segment in geometry.segments(plan, member, block):
                    for chunk in range(segment.first_chunk, segment.first_chunk + segment.chunk_count):
                        seen[segment.rank, chunk] = seen.get((segment.rank, chunk), 0) + 1
        expected = {
            (shard.rank, chunk)
            for member_ in plan.members
            for shard in member_.shards
            for chunk in range(geometry.chunk_count(shard.size_bytes, CHUNK))
        }
        assert set(seen) == expected
        assert set(seen.values()) <= {1}


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_segments_of_a_block_are_its_chunks_in_order_with_their_lengths(n: int, m: int) -> None:
    plan = plan_of(random_sizes(n, 7), m)
    for stripe in range(n):
        for member in geometry.data_members(stripe, n=n, m=m):
            block = geometry.block_range(plan, stripe, member)
            sizes = {shard.rank: shard.size_bytes for shard in plan.members[member].shards}
            walked = [
                min(CHUNK, sizes[segment.rank] - chunk * CHUNK)
                for segment in geometry.segments(plan, member, block)
                for chunk in range(segment.first_chunk, segment.first_chunk + segment.chunk_count)
            ]
            assert walked == [geometry.volume_chunk_bytes(plan, member, chunk) for chunk in block]


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_a_fragment_is_as_long_as_its_longest_block_and_covers_every_byte(n: int, m: int) -> None:
    for seed in range(3):
        plan = plan_of(random_sizes(n, seed), m)
        for stripe in range(n):
            ends = [0]
            for member in geometry.data_members(stripe, n=n, m=m):
                block = geometry.block_range(plan, stripe, member)
                ends += [
                    place * CHUNK + geometry.volume_chunk_bytes(plan, member, chunk)
                    for place, chunk in enumerate(block)
                ]
            assert geometry.fragment_bytes(plan, stripe) == max(ends)
            assert geometry.stripe_chunks(plan, stripe) == -(-max(ends) // CHUNK)


def test_parity_is_at_most_m_kths_of_the_largest_volume_and_a_chunk() -> None:
    plan = plan_of([[100 * CHUNK + 3] for _ in range(6)], 2)
    for stripe in range(6):
        assert geometry.fragment_bytes(plan, stripe) <= (100 // 4 + 1) * CHUNK


def test_a_chunk_past_the_end_of_a_volume_is_an_error() -> None:
    with pytest.raises(IndexError):
        geometry.volume_chunk_bytes(plan_of([[5], [5]], 1), 0, 1)
