"""What an erasure codec must do, and how a chunk is cut into the windows it works on. No I/O, no names of nodes or files.

Every code used here is byte-wise linear: byte i of a parity fragment depends on byte i of the data fragments only, and
zeros map to zeros. So windows are independent, and trimming common zero padding loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from backstay.errors import InvariantError

Buffer = bytes | bytearray | memoryview

MAX_WINDOW_BYTES: Final = 128 * 1024  # per fragment
# Of all k together: measured, 1 MiB falls out of the allocator's reuse and the L2 cache.
MAX_INPUT_BYTES: Final = 512 * 1024


class Codec(Protocol):
    """A systematic k + m code over equal-length fragments; data fragments are 0..k-1, parity k..k+m-1."""

    @property
    def k(self) -> int: ...

    @property
    def m(self) -> int: ...

    def encode(self, blocks: Sequence[Buffer]) -> list[memoryview]:
        """The m parity fragments of k data fragments, all of one length > 0. Blocks the calling thread."""
        ...

    def reconstruct(self, available: Mapping[int, Buffer], wanted: Sequence[int]) -> list[memoryview]:
        """The fragments ``wanted`` (in that order) from k or more others, all of one length > 0.

        Raises:
            UnrecoverableError: with fewer than k fragments.
        """
        ...


def window_bytes(k: int) -> int:
    """Bytes per fragment of one codec call: a power of two, at most 128 KiB, at most 512 KiB for all k together."""
    window = MAX_WINDOW_BYTES
    while window * k > MAX_INPUT_BYTES and window > 4096:
        window //= 2
    return window


def encode_chunk(codec: Codec, blocks: Sequence[memoryview], length: int) -> list[list[memoryview]]:
    """Parity of the first ``length`` bytes of k blocks, window by window: m lists of pieces to be written in order."""
    if len(blocks) != codec.k:
        raise InvariantError(f"encode needs {codec.k} blocks, got {len(blocks)}")
    window = window_bytes(codec.k)
    pieces: list[list[memoryview]] = [[] for _ in range(codec.m)]
    for begin in range(0, length, window):
        end = min(begin + window, length)
        for parity, piece in zip(pieces, codec.encode([block[begin:end] for block in blocks]), strict=True):
            parity.append(piece)
    return pieces


def reconstruct_chunk(
    codec: Codec, available: Mapping[int, memoryview], wanted: Sequence[int], *, length: int
) -> list[list[memoryview]]:
    """The first ``length`` bytes of each wanted fragment, window by window: one list of pieces per wanted index."""
    window = window_bytes(codec.k)
    pieces: list[list[memoryview]] = [[] for _ in wanted]
    for begin in range(0, length, window):
        end = min(begin + window, length)
        found = codec.reconstruct({index: block[begin:end] for index, block in available.items()}, wanted)
        for fragment, piece in zip(pieces, found, strict=True):
            fragment.append(piece)
    return pieces
