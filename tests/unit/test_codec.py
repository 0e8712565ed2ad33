"""The codec behind its interface: every loss pattern decodes, at every length, without pyeclib's headers showing."""

from __future__ import annotations

import itertools
import random

import pytest

from backstay.errors import InvariantError, UnrecoverableError
from backstayd.erasure.codec import MAX_INPUT_BYTES, encode_chunk, reconstruct_chunk, window_bytes
from backstayd.erasure.pyeclib_codec import PyeclibCodec
from tests.kit.wording import refuses

SHAPES = [(1, 1), (1, 4), (2, 1), (3, 2), (4, 2), (5, 3), (12, 4), (15, 1)]


def blocks_of(k: int, length: int, seed: int = 0) -> list[memoryview]:
    generator = random.Random(seed)
    return [memoryview(bytearray(generator.randbytes(length))) for _ in range(k)]


@pytest.mark.parametrize(("k", "m"), SHAPES)
@pytest.mark.parametrize("length", [1, 17, 4096, 65537])
def test_parity_has_the_length_of_the_data(k: int, m: int, length: int) -> None:
    parity = PyeclibCodec(k, m).encode(blocks_of(k, length))
    assert [len(fragment) for fragment in parity] == [length] * m


@pytest.mark.parametrize(("k", "m"), [(1, 1), (1, 4), (2, 1), (3, 2), (4, 2), (5, 3), (4, 4)])
def test_every_pattern_of_up_to_m_losses_decodes(k: int, m: int) -> None:
    codec = PyeclibCodec(k, m)
    data = blocks_of(k, 333)
    fragments = dict(enumerate([*data, *codec.encode(data)]))
    for count in range(1, m + 1):
        for lost in itertools.combinations(range(k + m), count):
            available = {index: fragment for index, fragment in fragments.items() if index not in lost}
            assert codec.reconstruct(available, lost) == [fragments[index] for index in lost]


def test_more_fragments_than_k_may_be_given_in_any_order() -> None:
    codec = PyeclibCodec(4, 2)
    data = blocks_of(4, 100)
    fragments = dict(enumerate([*data, *codec.encode(data)]))
    available = {index: fragments[index] for index in (5, 3, 4, 1, 0)}
    assert codec.reconstruct(available, [2]) == [data[2]]


def test_fragments_come_in_the_order_in_which_they_are_asked_for() -> None:
    codec = PyeclibCodec(3, 2)
    data = blocks_of(3, 500)
    fragments = {**dict(enumerate(data)), **{3 + index: piece for index, piece in enumerate(codec.encode(data))}}
    available = {index: fragments[index] for index in (1, 3, 4)}
    for wanted in itertools.permutations([0, 2]):
        assert codec.reconstruct(available, wanted) == [fragments[index] for index in wanted]
    available = {index: fragments[index] for index in (0, 1, 3)}
    for wanted in itertools.permutations([2, 4]):
        assert codec.reconstruct(available, wanted) == [fragments[index] for index in wanted]


def test_fewer_than_k_fragments_are_refused() -> None:
    with pytest.raises(UnrecoverableError, match="3 of 4"):
        PyeclibCodec(4, 2).reconstruct(dict(enumerate(blocks_of(3, 10))), [5])


def test_a_code_without_parity_is_refused() -> None:
    with pytest.raises(InvariantError):
        PyeclibCodec(4, 0)


@pytest.mark.parametrize("k", range(1, 17))
def test_windows_stay_within_the_measured_sweet_spot(k: int) -> None:
    window = window_bytes(k)
    assert window * k <= MAX_INPUT_BYTES
    assert window & (window - 1) == 0
    assert k < 4 or window * k > MAX_INPUT_BYTES // 2


def test_bytes_are_coded_independently_so_windows_and_zero_padding_change_nothing() -> None:
    codec = PyeclibCodec(4, 2)
    window = window_bytes(4)
    data = blocks_of(4, 2 * window + 777)
    windowed = [b"".join(pieces) for pieces in encode_chunk(codec, data, len(data[0]))]
    assert windowed == [bytes(fragment) for fragment in codec.encode(data)]
    padded = codec.encode([bytes(block) + bytes(500) for block in data])
    assert [bytes(fragment[: len(data[0])]) for fragment in padded] == windowed
    assert all(bytes(fragment[len(data[0]) :]) == bytes(500) for fragment in padded)


def test_a_prefix_of_lost_fragments_is_decoded_from_prefixes() -> None:
    codec = PyeclibCodec(4, 2)
    data = blocks_of(4, window_bytes(4) + 999)
    parity = [memoryview(b"".join(pieces)) for pieces in encode_chunk(codec, data, len(data[0]))]
    available = {0: data[0], 2: data[2], 4: parity[0], 5: parity[1]}
    length = window_bytes(4) + 5
    found = reconstruct_chunk(codec, available, (1, 3), length=length)
    assert [b"".join(pieces) for pieces in found] == [bytes(data[1][:length]), bytes(data[3][:length])]


def test_encode_chunk_refuses_a_wrong_number_of_blocks() -> None:
    with refuses(InvariantError, "invariant", 4, 3):
        encode_chunk(PyeclibCodec(4, 2), blocks_of(3, 8), 8)
