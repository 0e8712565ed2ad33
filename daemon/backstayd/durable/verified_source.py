"""What is uploaded: a shard's bytes, verified in the buffer they are sent from. Must not know where they go."""

from __future__ import annotations

from typing import Protocol

from backstay.format.manifest import CHUNK_BYTES
from backstayd.store.record_files import ShardChunks


class ShardSource(Protocol):
    """The bytes of one shard. Used by several threads at once."""

    chunks: ShardChunks

    def read_verified(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset`` (a multiple of the chunk length) and check every chunk in it.

        Raises IntegrityError for a source that is corrupt, UnavailableError once the job is cancelled or late.
        """

    def spend(self, size_bytes: int) -> None:
        """Wait until ``size_bytes`` may be sent; raises as :meth:`read_verified`."""

    def note_done(self, size_bytes: int) -> None:
        """So many more bytes are durable, or were found so."""


def chunk_range(chunks: ShardChunks, offset: int, length: int) -> range:
    """The chunks that begin in ``length`` bytes from ``offset``."""
    assert offset % CHUNK_BYTES == 0, offset
    return range(offset // CHUNK_BYTES, min(chunks.chunk_count, -(-(offset + length) // CHUNK_BYTES)))
