"""Putting a shard and its manifest where another history may be writing the same step: nothing there is ever replaced.

The manifest comes after the shard and says that it is whole. Must not decide what is copied.
"""

from __future__ import annotations

from collections.abc import Callable

from crc32c import crc32c

from backstay import faults
from backstay.errors import IntegrityError, SnapshotNotFoundError, UnavailableError
from backstay.format.manifest import CHUNK_BYTES
from backstayd.core.inventory.durable_names import manifest_name, shard_name
from backstayd.durable.place import Place, ShardSource, chunk_range
from backstayd.store.record_files import ShardChunks

COMPARE_BYTES = 4 * 1024 * 1024  # a multiple of the chunk length


def publish_shard(
    place: Place, *, rank: int, source: ShardSource, manifest: bytes, mark: str, check: Callable[[], None]
) -> None:
    """Write a shard and then its ``manifest``, unless they lie there already.

    Args:
        mark: Tells unfinished files of this writer from those of others.
        check: Called now and then; raises when the job is over.

    Raises:
        UnavailableError (``occupied``): the shard of another history lies there, whole or not.
    """
    chunks = source.chunks
    shard, beside = shard_name(rank, chunks.world_size), manifest_name(rank, chunks.world_size)
    _require_ours(place, beside, manifest)
    if not place.put_shard(shard, source, mark=mark) and not _is_same(place, shard, chunks, check):
        raise _occupied(place, shard)
    faults.reach("after_upload", step=chunks.step, rank=rank)
    if not place.create(beside, manifest):
        _require_ours(place, beside, manifest)


def _require_ours(place: Place, name: str, manifest: bytes) -> None:
    try:
        if place.read_small(name) != manifest:
            raise _occupied(place, name)
    except SnapshotNotFoundError:
        return


def _is_same(place: Place, name: str, chunks: ShardChunks, check: Callable[[], None]) -> bool:
    """Whether what lies there is this very shard: one whose writer died before the manifest."""
    try:
        reader = place.open_read(name)
    except SnapshotNotFoundError:
        raise UnavailableError(f"{place.url}/{name} came and went; it is tried again", reason="changed") from None
    try:
        if reader.size_bytes != chunks.size_bytes:
            return False
        buffer = memoryview(bytearray(min(COMPARE_BYTES, max(1, chunks.size_bytes))))
        for offset in range(0, chunks.size_bytes, COMPARE_BYTES):
            check()
            view = buffer[: min(COMPARE_BYTES, chunks.size_bytes - offset)]
            reader.read_into(offset, view)
            for chunk in chunk_range(chunks, offset, len(view)):
                begin = chunk * CHUNK_BYTES - offset
                if crc32c(view[begin : begin + chunks.chunk_length(chunk)]) != chunks.chunk_crc(chunk):
                    return False
        return True
    except IntegrityError:  # shorter than it was a moment ago
        return False
    finally:
        reader.close()


def _occupied(place: Place, name: str) -> UnavailableError:
    return UnavailableError(
        f"{place.url}/{name} is of another history of this step, which was written under the same run_id; it is not touched. "
        "If two jobs use that run_id, give one of them another; if what lies there is of no use, move it away",
        reason="occupied",
    )
