"""The window loops of encoding and decoding one stripe: geometry and codec against readers and writers. No I/O of their own.

Every chunk a reader hands out was verified by it in the buffer it filled; a writer gets pieces it must write in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from backstay.format.manifest import CHUNK_BYTES
from backstayd.coder.parity.wrong_parity import Rebuilt
from backstayd.core.inventory import geometry
from backstayd.core.messages.plans import Plan
from backstayd.erasure.codec import Codec, encode_chunk, reconstruct_chunk

_ZEROS = memoryview(bytes(CHUNK_BYTES))


class ChunkSource(Protocol):
    """Hands out the chunks of one fragment in order."""

    def read_into(self, view: memoryview) -> int:
        """Put the next chunk at the start of ``view`` (a chunk long), verify it there and return its length."""
        ...


class ChunkSink(Protocol):
    """Takes the chunks of one fragment in order."""

    def write(self, chunk: int, pieces: Sequence[memoryview]) -> None:
        """Take chunk ``chunk`` of the fragment, made of ``pieces``; does not keep them."""
        ...


class RebuiltSink(ChunkSink, Protocol):
    """Takes rebuilt chunks, and knows what they must be."""

    def is_right(self, chunk: int, pieces: Sequence[memoryview]) -> bool:
        """Whether these are the bytes of chunk ``chunk``."""
        ...


ReadChunk = Callable[
    [int, int], Mapping[int, memoryview]
]  # (chunk, length) -> fragment index -> bytes, k or more of them

Search = Callable[
    [int, int, Sequence[int], Callable[[Rebuilt], bool]], Rebuilt
]  # (chunk, length, wanted, is_right) -> what is right, or it raises


def padded(source: ChunkSource | None, buffer: memoryview, length: int) -> memoryview:
    """The next chunk of ``source`` in ``buffer``, cut or zero-padded to ``length``; zeros for a fragment that has ended."""
    if source is None:
        return _ZEROS[:length]
    found = source.read_into(buffer)
    if found < length:
        buffer[found:length] = _ZEROS[: length - found]
    return buffer[:length]


def encode_windows(
    plan: Plan,
    stripe: int,
    codec: Codec,
    *,
    sources: Sequence[ChunkSource],
    sinks: Sequence[ChunkSink],
    on_chunk: Callable[[int], None],
    chunks: Iterable[int] | None = None,
) -> None:
    """Encode ``stripe``: k data sources in fragment order, m parity sinks in order; ``on_chunk`` before each chunk.

    Args:
        chunks: The positions to encode, ascending; all by default. Sources hand out the data of these alone.
    """
    members = geometry.data_members(stripe, n=len(plan.members), m=plan.m)
    counts = [len(geometry.block_range(plan, stripe, member)) for member in members]
    buffers = [memoryview(bytearray(plan.chunk_bytes)) for _ in sources]
    for chunk in range(geometry.stripe_chunks(plan, stripe)) if chunks is None else chunks:
        on_chunk(chunk)
        length = geometry.fragment_chunk_bytes(plan, stripe, chunk)
        blocks = [
            padded(source if chunk < count else None, buffer, length)
            for source, count, buffer in zip(sources, counts, buffers, strict=True)
        ]
        for sink, pieces in zip(sinks, encode_chunk(codec, blocks, length), strict=True):
            sink.write(chunk, pieces)


def decode_windows(
    plan: Plan,
    stripe: int,
    codec: Codec,
    *,
    chunks: range,
    read_chunk: ReadChunk,
    search: Search,
    sinks: Mapping[int, RebuiltSink],
    on_chunk: Callable[[int], None],
) -> None:
    """Decode the data fragments ``sinks`` names, all from one read, over the stripe's ``chunks``.

    Args:
        read_chunk: Called for each chunk in order; returns at least k fragments, cut or padded to the length given.
        search: Called when a sink says that what these decode to is wrong.
        sinks: By data fragment index; each gets those of ``chunks`` that its block has, at the length of that chunk.
    """
    members = geometry.data_members(stripe, n=len(plan.members), m=plan.m)
    blocks = {index: geometry.block_range(plan, stripe, members[index]) for index in sinks}
    for chunk in chunks:
        on_chunk(chunk)
        lengths = {
            index: geometry.volume_chunk_bytes(plan, members[index], block[chunk])
            for index, block in blocks.items()
            if chunk < len(block)
        }
        length = max(lengths.values(), default=0)
        available = read_chunk(chunk, length)
        if not lengths:
            continue

        def is_right(rebuilt: Rebuilt, chunk: int = chunk, lengths: dict[int, int] = lengths) -> bool:
            return all(
                sinks[index].is_right(chunk, trimmed(pieces, own_length))
                for (index, own_length), pieces in zip(lengths.items(), rebuilt, strict=True)
            )

        rebuilt = reconstruct_chunk(codec, available, tuple(lengths), length=length)
        if not is_right(rebuilt):
            rebuilt = search(chunk, length, tuple(lengths), is_right)
        for (index, own_length), pieces in zip(lengths.items(), rebuilt, strict=True):
            sinks[index].write(chunk, trimmed(pieces, own_length))


def trimmed(pieces: Sequence[memoryview], length: int) -> list[memoryview]:
    """The first ``length`` bytes of ``pieces``."""
    kept = []
    for piece in pieces:
        if length <= 0:
            break
        kept.append(piece[:length])
        length -= len(piece)
    return kept
