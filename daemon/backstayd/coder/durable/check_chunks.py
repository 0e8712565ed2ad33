"""Checking chunks that were read from durable storage, in the buffer they will be used from. Chooses and writes nothing."""

from __future__ import annotations

from collections.abc import Callable

from crc32c import crc32c

from backstay.format.manifest import CHUNK_BYTES
from backstayd.coder.context import JobContext
from backstayd.store.record_files import ShardChunks
from backstayd.transport.bulk.client import ShardRef


def check_chunks(
    context: JobContext,
    ref: ShardRef,
    *,
    url: str,
    chunks: ShardChunks,
    first: int,
    view: memoryview,
    read_into: Callable[[int, memoryview], None],
) -> None:
    """Check ``view``, which holds the chunks of ``ref`` from ``first`` on as they lie in the directory ``url``.

    A wrong one is read once more by ``read_into(offset, view)``, for it may have been flipped on its way.

    Raises:
        CorruptSourceError: it is wrong again.
    """
    for place in range(0, len(view), CHUNK_BYTES):
        chunk, piece = first + place // CHUNK_BYTES, view[place : place + CHUNK_BYTES]
        expected = chunks.chunk_crc(chunk)
        if crc32c(piece) == expected:
            continue
        read_into(chunk * CHUNK_BYTES, piece)
        found = crc32c(piece)
        if found != expected:
            detail = f"chunk {chunk} has crc {found:08x}, expected {expected:08x}"
            raise context.blame_stored(ref, url=url, detail=detail)
        context.flipped_in_flight += 1
