"""Opening published shards and fragments for reading, so that their inode cannot be handed out again meanwhile.

The reader's shared flock is on its own open file description. It is taken first, then the commit record is checked again:
whoever withdraws a file unlinks the record, then waits for an exclusive lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from backstay import record
from backstay.errors import IntegrityError, SnapshotNotFoundError
from backstay.ids import SnapshotKey
from backstayd.core.records import Plan
from backstayd.store.paths import RunPaths
from backstayd.store.stored import ShardChunks, StoredFragment, StoredPlan, read_manifest, read_small


@contextlib.contextmanager
def open_shard(
    paths: RunPaths, key: SnapshotKey, *, rank: int, world_size: int, digest: str
) -> Iterator[tuple[int, ShardChunks]]:
    """A locked read-only descriptor of a committed shard and its chunk digests.

    Raises:
        SnapshotNotFoundError: it is not published here, or is being withdrawn (``gone``).
        IntegrityError: another manifest is published in its place (``wrong_identity``), or the file is cut (``truncated``).
    """
    manifest_path = paths.manifest(key, rank, world_size)
    read_manifest(manifest_path, digest=digest)
    path = paths.shard(key, rank, world_size)
    with _open_locked(path) as fd:
        chunks = read_manifest(manifest_path, digest=digest)
        _check_same_file(path, fd, size_bytes=chunks.size_bytes)
        yield fd, chunks


@contextlib.contextmanager
def open_fragment(
    paths: RunPaths, key: SnapshotKey, plan_id: str, *, stripe: int, index: int
) -> Iterator[tuple[int, StoredFragment]]:
    """A locked read-only descriptor of a committed parity fragment and its record; errors as :func:`open_shard`."""
    path = paths.fragment(key, plan_id, stripe=stripe, index=index)
    record_path = paths.fragment_record(key, plan_id, stripe=stripe, index=index)
    read_small(record_path)
    with _open_locked(path) as fd:
        stored = record.loads(StoredFragment, read_small(record_path))
        _check_same_file(path, fd, size_bytes=stored.size_bytes)
        yield fd, stored


def read_plan(paths: RunPaths, plan: Plan) -> tuple[StoredPlan, dict[str, ShardChunks]]:
    """The stored plan on this node and its verified chunk digests by shard digest.

    Raises:
        SnapshotNotFoundError: it is not stored here. IntegrityError: it is damaged.
    """
    stored = record.loads(StoredPlan, read_small(paths.plan(plan.key, plan.plan_id)))
    if stored.plan != plan:
        raise IntegrityError(f"stored plan {plan.plan_id[:8]} is not the plan of that id", reason="bad_plan")
    return stored, stored.chunks_by_digest()


@contextlib.contextmanager
def _open_locked(path: Path) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise SnapshotNotFoundError(f"{path.name} is not here: {error.strerror}", reason="gone") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SnapshotNotFoundError(f"{path.name} is being withdrawn", reason="gone") from error
        yield fd
    finally:
        os.close(fd)


def _check_same_file(path: Path, fd: int, *, size_bytes: int) -> None:
    opened = os.fstat(fd)
    try:
        current = os.lstat(path)
    except OSError as error:
        raise SnapshotNotFoundError(f"{path.name} was withdrawn", reason="gone") from error
    if current.st_ino != opened.st_ino:
        raise SnapshotNotFoundError(f"{path.name} was replaced", reason="gone")
    if opened.st_size != size_bytes:
        raise IntegrityError(
            f"{path.name} has {opened.st_size} bytes, its record says {size_bytes}", reason="truncated"
        )
