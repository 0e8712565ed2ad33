"""One directory on durable storage, whatever keeps it: the few operations that persisting needs.

Names are relative and use '/'. Every operation raises errors of ours only. Must not know which stores there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from backstay.format.manifest import CHUNK_BYTES
from backstayd.store.record_files import ShardChunks

MIN_RANGE_BYTES: Final = 8 * 1024 * 1024  # a request of less costs a remote store as much
MAX_SMALL_BYTES: Final = 256 * 1024 * 1024  # manifests and records


@dataclass(frozen=True, slots=True)
class Entry:
    """What lies directly in a directory; ``size_bytes`` is -1 for a directory."""

    name: str
    size_bytes: int

    @property
    def is_directory(self) -> bool:
        return self.size_bytes < 0


class Place(Protocol):
    """A directory that need not exist yet."""

    url: str
    is_remote: bool  # many requests at once pay

    def list(self, name: str = "") -> list[Entry]:
        """What lies in the directory ``name``; nothing if it is not there."""

    def read_small(self, name: str) -> bytes:
        """A whole small file; raises SnapshotNotFoundError (``gone``) without one."""

    def size_of(self, name: str) -> int | None:
        """Bytes of a file; None without one."""

    def open_read(self, name: str) -> RangeReader:
        """Ranges of a file; raises SnapshotNotFoundError (``gone``) without one."""

    def put_shard(self, name: str, source: ShardSource, *, mark: str) -> bool:
        """Write ``source`` as ``name``, whole or not at all, going on where an earlier call under ``mark`` was cut off.

        False: something of that name was there, and stays as it is.
        """

    def put_small(self, name: str, data: bytes) -> None:
        """Write or replace a small file, whole or not at all."""

    def create(self, name: str, data: bytes) -> bool:
        """Write a small file unless it exists, atomically where the store can; whether it was written. Where the store
        cannot, two that write at once may both have: read it to know whose is there."""

    def remove(self, name: str) -> None:
        """Remove a file; fine if it is not there."""

    def remove_tree(self, name: str, *, check: Callable[[], None] = lambda: None) -> None:
        """Remove a directory, what lies in it and uploads to it that never ended; fine if it is not there.

        ``check`` is called before each change that others could notice; it raises to end it there.
        """

    def require_root(self) -> None:
        """Raise UnavailableError (``no_root``) unless this directory or bucket exists."""


class RangeReader(Protocol):
    """An open file. Close it."""

    size_bytes: int

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``; raises IntegrityError when the file ends before."""

    def close(self) -> None: ...


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
