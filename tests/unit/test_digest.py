"""Digests: pieces combine to what hashing the whole would give, and each reader finds each flipped byte."""

from __future__ import annotations

import itertools
import threading
from random import Random

import pytest
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from backstay.errors import IntegrityError, UsageError
from backstay.format.digest import Digester, combine, verify_chunks
from backstay.format.manifest import CHUNK_BYTES, Manifest
from backstay.format.shard import Layout, TensorSpec, build_manifest, plan_layout
from tests.kit.wording import refuses

PATTERN = bytes(value * 37 + value // 251 & 255 for value in range(1 << 16))


def content(layout: Layout) -> bytearray:
    body = layout.size_bytes - layout.header_bytes
    return bytearray(layout.header + (PATTERN * (body // len(PATTERN) + 1))[:body])


def a_layout() -> Layout:
    """Tensors that end inside chunks, span several, share one with many others, and are empty."""
    sizes = [3 * CHUNK_BYTES + 64, CHUNK_BYTES, 1, 7, 64, 2 * CHUNK_BYTES, CHUNK_BYTES // 2 + 3, 0, 128]
    return plan_layout([TensorSpec.whole(f"t{index}", "torch.uint8", (size,)) for index, size in enumerate(sizes)])


def digest(layout: Layout, data: bytes | bytearray) -> Manifest:
    digester = Digester(layout)
    digester.update_span(data)
    chunk_crcs, tensor_crcs = digester.finish()
    return build_manifest(
        layout,
        run="default/gpt",
        attempt=1,
        step=7,
        rank=3,
        world_size=8,
        world_id="w",
        chunk_crcs=chunk_crcs,
        tensor_crcs=tensor_crcs,
    )


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_combining_two_crcs_is_the_crc_of_both(a: bytes, b: bytes) -> None:
    assert combine(crc32c(a), crc32c(b), len(b)) == crc32c(a + b)


@given(st.binary(min_size=1, max_size=20), st.integers(0, 1_200_000))
@settings(max_examples=60, deadline=None)
def test_combining_holds_for_long_pieces(a: bytes, length: int) -> None:
    b = bytes(length)
    assert combine(crc32c(a), crc32c(b), length) == crc32c(b, crc32c(a))


def test_every_chunk_and_tensor_has_the_crc_of_its_bytes() -> None:
    layout = a_layout()
    data = content(layout)
    manifest = digest(layout, data)
    manifest.check()
    for index in range(manifest.chunk_count):
        assert manifest.chunk_crc(index) == crc32c(data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])
    for entry in manifest.tensors:
        assert entry.crc == crc32c(data[entry.begin : entry.end]), entry.name


@pytest.mark.parametrize("seed", range(8))
def test_chunks_in_any_order_and_in_parts_give_the_same_digests(seed: int) -> None:
    random = Random(seed)
    layout = a_layout()
    data = memoryview(content(layout))
    digester = Digester(layout)
    order = list(range(-(-layout.size_bytes // CHUNK_BYTES)))
    random.shuffle(order)
    for index in order:
        chunk = data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
        cuts = sorted({0, *random.sample(range(len(chunk) + 1), k=random.randint(0, 2)), len(chunk)})
        for begin, end in itertools.pairwise(cuts):
            digester.update(chunk[begin:end], index)
    manifest = digest(layout, data)
    assert digester.finish() == (manifest.chunk_crcs, {entry.name: entry.crc for entry in manifest.tensors})


def test_two_threads_may_hash_different_chunks() -> None:
    layout = a_layout()
    data = memoryview(content(layout))
    digester = Digester(layout)
    middle = 3

    def second_half() -> None:
        digester.update_span(data[middle * CHUNK_BYTES :], middle)

    thread = threading.Thread(target=second_half)
    thread.start()
    digester.update_span(data[: middle * CHUNK_BYTES])
    thread.join()
    assert digester.finish()[0] == digest(layout, data).chunk_crcs


def test_a_shard_that_was_not_hashed_whole_has_no_digest() -> None:
    layout = a_layout()
    data = content(layout)
    digester = Digester(layout)
    digester.update_span(data[:-1])
    with refuses(UsageError, "usage"):
        digester.finish()
    with refuses(UsageError, "usage"):
        digester.update(b"12", layout.size_bytes // CHUNK_BYTES)


def test_views_of_any_element_type_are_hashed_as_their_bytes() -> None:
    layout = plan_layout([TensorSpec.whole("w", "torch.float64", (1000,))])
    data = content(layout)
    as_doubles = memoryview(data).cast("d", (2, len(data) // 16))
    assert digest(layout, as_doubles).chunk_crcs == digest(layout, data).chunk_crcs  # type: ignore[arg-type]


@pytest.mark.parametrize("where", [0, 1, 5000, CHUNK_BYTES - 1, CHUNK_BYTES, 3 * CHUNK_BYTES + 17, -1])
def test_a_reader_names_the_chunk_of_a_flipped_bit(where: int) -> None:
    layout = a_layout()
    data = content(layout)
    manifest = digest(layout, data)
    verify_chunks(data, manifest, 0)
    data[where] ^= 16
    chunk = (where % len(data)) // CHUNK_BYTES
    begin, end = chunk * CHUNK_BYTES, (chunk + 1) * CHUNK_BYTES
    found, expected = crc32c(data[begin:end]), manifest.chunk_crc(chunk)
    facts = ("rank 3", "step 7", f"chunk {chunk} of {manifest.chunk_count}", f"{found:08x}", f"{expected:08x}")
    with refuses(IntegrityError, "corrupt_chunk", *facts):
        verify_chunks(data, manifest, 0)
    with refuses(IntegrityError, "corrupt_chunk", *facts):
        verify_chunks(memoryview(data)[begin:end], manifest, chunk)


def test_chunks_around_a_corrupt_one_still_verify() -> None:
    layout = a_layout()
    data = content(layout)
    manifest = digest(layout, data)
    data[CHUNK_BYTES] ^= 1
    verify_chunks(memoryview(data)[:CHUNK_BYTES], manifest, 0)
    verify_chunks(memoryview(data)[2 * CHUNK_BYTES :], manifest, 2)


def test_a_buffer_that_ends_inside_a_chunk_is_not_taken_for_verified() -> None:
    layout = a_layout()
    data = content(layout)
    manifest = digest(layout, data)
    for view, first in ((data[:-1], 0), (data[: CHUNK_BYTES + 1], 0), (data[:1], manifest.chunk_count)):
        with pytest.raises(UsageError):
            verify_chunks(view, manifest, first)
