"""A persisted shard as a file of this machine, open for readers that are handed its descriptor.

The manifest is checked, bytes are not: whoever uses a chunk checks it in the buffer it uses.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from backstay.errors import IntegrityError
from backstayd.core.inventory.durable_names import manifest_name, shard_name
from backstayd.durable.local_place import LocalPlace
from backstayd.store.record_files import ShardChunks, parse_manifest


@dataclass(frozen=True, slots=True)
class LocalShard:
    """One shard of a persisted snapshot. Close it.

    Attributes:
        manifest_bytes: The manifest as it was committed in memory; its SHA-256 is the shard's digest.
        file_id: Tells this file from another one that takes its name.
    """

    fd: int
    manifest_bytes: bytes
    chunks: ShardChunks
    file_id: str

    def close(self) -> None:
        os.close(self.fd)


def open_local_shard(url: str, *, rank: int, world_size: int, digest: str) -> LocalShard:
    """The shard of ``rank`` in the snapshot directory ``url``, which :func:`storage_names.is_local`.

    Raises:
        SnapshotNotFoundError: it is not there (``gone``). IntegrityError: what is there is another shard, or cut short, or
            no file. UnavailableError: the file system does not answer.
    """
    place = LocalPlace(url)
    raw = place.read_small(manifest_name(rank, world_size))
    chunks = parse_manifest(raw, digest=digest)
    fd = place.open_file(shard_name(rank, world_size))
    found = os.fstat(fd)
    if found.st_size != chunks.size_bytes:
        os.close(fd)
        raise IntegrityError(
            f"{url}/{shard_name(rank, world_size)} has {found.st_size} bytes, its manifest says {chunks.size_bytes}",
            reason="truncated",
        )
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return LocalShard(fd, raw, chunks, f"{found.st_dev}:{found.st_ino}")
