"""Reading a persisted shard: its manifest, checked against the digest, and ranges of its file.

Bytes of the file are not verified here: whoever uses a chunk checks it in the buffer it uses (``chunks.chunk_crc``).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from backstay.errors import IntegrityError
from backstayd.core.inventory.durable_names import manifest_name, shard_name
from backstayd.durable.local_place import LocalFile, LocalPlace
from backstayd.durable.open import open_place
from backstayd.durable.place import MIN_RANGE_BYTES, Place, RangeReader
from backstayd.store.record_files import ShardChunks, parse_manifest

PARALLEL_REQUESTS: Final = 4


class PersistedShard:
    """One shard of a persisted snapshot, open. Close it.

    Attributes:
        chunks: Size and chunk digests, from its manifest.
        manifest_bytes: The manifest as it was committed in memory; its SHA-256 is the shard's digest. b"": not read.
        is_remote: Large reads, in parallel, pay.
    """

    def __init__(
        self, chunks: ShardChunks, reader: RangeReader, *, is_remote: bool, manifest_bytes: bytes = b""
    ) -> None:
        """Takes ``reader`` over; raises IntegrityError (``truncated``) unless the file has the shard's size."""
        self.chunks = chunks
        self.manifest_bytes = manifest_bytes
        self.is_remote = is_remote
        self._reader = reader
        self._pool = ThreadPoolExecutor(PARALLEL_REQUESTS, thread_name_prefix="storage") if is_remote else None
        if reader.size_bytes != chunks.size_bytes:
            self.close()
            raise IntegrityError(
                f"{shard_name(chunks.rank, chunks.world_size)} has {reader.size_bytes} bytes, its manifest says "
                f"{chunks.size_bytes}",
                reason="truncated",
            )

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``: in parallel pieces of at least 8 MiB where the store is remote.

        Raises:
            IntegrityError: the file ends before (``truncated``). UnavailableError: the store does not answer.
        """
        self.read_ranges([(offset, view)])

    def read_ranges(self, ranges: Sequence[tuple[int, memoryview]]) -> None:
        """Fill every (offset, view), at once where the store is remote. Errors as :meth:`read_into`."""
        if self._pool is None:
            for offset, view in ranges:
                self._reader.read_into(offset, view)
            return
        pieces = [piece for offset, view in ranges for piece in _pieces(offset, view)]
        list(self._pool.map(lambda piece: self._reader.read_into(*piece), pieces))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._reader.close()


class LocalShard(PersistedShard):
    """A persisted shard as a file of this machine, open for readers that are handed its descriptor ``fd``.

    ``file_id`` tells this file from another one that takes its name.
    """

    def __init__(self, manifest_bytes: bytes, chunks: ShardChunks, file: LocalFile) -> None:
        super().__init__(chunks, file, is_remote=False, manifest_bytes=manifest_bytes)
        self.fd = file.fd
        self.file_id = file.file_id


def open_shard(url: str, *, rank: int, world_size: int, digest: str) -> PersistedShard:
    """The shard of ``rank`` in the snapshot directory ``url`` (``Base.url``).

    Raises:
        SnapshotNotFoundError: it is not there (``gone``). IntegrityError: what is there is another shard, or cut short.
        UnavailableError: the store does not answer. ConfigError: the URL's package is missing.
    """
    place = open_place(url)
    raw = place.read_small(manifest_name(rank, world_size))
    return open_file(place, parse_manifest(raw, digest=digest), manifest_bytes=raw)


def open_file(place: Place, chunks: ShardChunks, *, manifest_bytes: bytes = b"") -> PersistedShard:
    """The shard of ``chunks`` in the snapshot directory ``place``; raises as :func:`open_shard`."""
    reader = place.open_read(shard_name(chunks.rank, chunks.world_size))
    return PersistedShard(chunks, reader, is_remote=place.is_remote, manifest_bytes=manifest_bytes)


def open_local_shard(url: str, *, rank: int, world_size: int, digest: str) -> LocalShard:
    """The shard of ``rank`` in the snapshot directory ``url``, which :func:`durable_names.is_local`.

    Raises:
        As :func:`open_shard`, and IntegrityError where something else than a file has its name.
    """
    place = LocalPlace(url)
    raw = place.read_small(manifest_name(rank, world_size))
    return LocalShard(raw, parse_manifest(raw, digest=digest), place.open_file(shard_name(rank, world_size)))


def _pieces(offset: int, view: memoryview) -> list[tuple[int, memoryview]]:
    count = max(1, min(PARALLEL_REQUESTS, len(view) // MIN_RANGE_BYTES))
    length = -(-len(view) // count)
    return [(offset + begin, view[begin : begin + length]) for begin in range(0, len(view), length)]
