"""Opening published shards and fragments for reading, so that their inode cannot be handed out again meanwhile.

The reader's shared flock is on its own open file description. It is taken first, then the commit record is checked again:
whoever withdraws a file unlinks the record, then waits for an exclusive lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crc32c import crc32c

from backstay.errors import IntegrityError, SnapshotNotFoundError
from backstay.format import json_records
from backstay.format.manifest import CHUNK_BYTES
from backstay.ids import SnapshotKey
from backstayd.core.messages.plans import Plan
from backstayd.store.index import RunIndex
from backstayd.store.paths import FragmentRef, RunPaths, ShardRef
from backstayd.store.record_files import (
    ShardChunks,
    StoredFragment,
    StoredPlan,
    canonical_bytes,
    parse_manifest,
    read_manifest,
    read_small,
)


@contextlib.contextmanager
def open_shard(paths: RunPaths, ref: ShardRef) -> Iterator[tuple[int, ShardChunks]]:
    """A locked read-only descriptor of a committed shard and its chunk digests.

    Raises:
        SnapshotNotFoundError: it is not published here, or is being withdrawn (``gone``).
        IntegrityError: another manifest is published in its place (``wrong_identity``), or the file is cut (``truncated``).
    """
    manifest_path = paths.manifest(ref.key, ref.rank, ref.world_size)
    read_manifest(manifest_path, digest=ref.digest)
    path = paths.shard(ref.key, ref.rank, ref.world_size)
    with _open_locked(path) as fd:
        chunks = read_manifest(manifest_path, digest=ref.digest)
        _check_same_file(path, fd, size_bytes=chunks.size_bytes)
        yield fd, chunks


def open_for_trainer(index: RunIndex, paths: RunPaths, key: SnapshotKey, *, rank: int) -> tuple[int, dict[str, Any]]:
    """A read-only descriptor of a committed shard and its manifest.

    The descriptor carries a shared lock for as long as the trainer has it, so that the slot is not filled under its eyes.

    Raises:
        SnapshotNotFoundError: it is not here.
    """
    held = index.shards.get((key, rank))
    if held is None:
        raise SnapshotNotFoundError(f"rank {rank} of step {key.step} is not on this node")
    with open_shard(paths, ShardRef.of(index.run, held.record)) as (fd, _):
        manifest = json_records.loads(dict, read_small(paths.manifest(key, rank, held.record.world_size)))
        return os.dup(fd), manifest


@contextlib.contextmanager
def open_fragment(paths: RunPaths, ref: FragmentRef) -> Iterator[tuple[int, StoredFragment]]:
    """A locked read-only descriptor of a committed parity fragment and its record; errors as :func:`open_shard`."""
    path = paths.fragment(ref.key, ref.plan_id, stripe=ref.stripe, index=ref.index)
    record_path = paths.fragment_record(ref.key, ref.plan_id, stripe=ref.stripe, index=ref.index)
    read_small(record_path)
    with _open_locked(path) as fd:
        stored = json_records.loads(StoredFragment, read_small(record_path))
        _check_same_file(path, fd, size_bytes=stored.size_bytes)
        yield fd, stored


def find_manifest(paths: RunPaths, ref: ShardRef) -> bytes:
    """The manifest of that digest, wherever on this node it lies: published, in staging, or in a plan of its group.

    Raises:
        SnapshotNotFoundError: it is nowhere here.
    """
    rank, world_size, digest = ref.rank, ref.world_size, ref.digest
    for path in (
        paths.manifest(ref.key, rank, world_size),
        paths.sparse_manifest(rank, world_size, digest),
        paths.staged_manifest(rank, world_size, digest),
    ):
        with contextlib.suppress(SnapshotNotFoundError, IntegrityError):
            raw = read_small(path)
            parse_manifest(raw, digest=digest)
            return raw
    for path in sorted(paths.parity(ref.key).glob("plan-*.json")):
        if "stripe" not in path.name:
            with contextlib.suppress(OSError, SnapshotNotFoundError, IntegrityError):
                status = path.lstat()
                found = _manifests_of_plan(path, (status.st_ino, status.st_mtime_ns, status.st_size)).get(digest)
                if found is not None:
                    return found
    raise SnapshotNotFoundError(f"the manifest of rank {rank} ({digest[:16]}) is not here", reason="gone")


@functools.lru_cache(maxsize=8)
def _manifests_of_plan(path: Path, _version: tuple[int, ...]) -> dict[str, bytes]:
    stored = json_records.loads(StoredPlan, read_small(path))
    raws = map(canonical_bytes, stored.manifests)
    return {hashlib.sha256(raw).hexdigest(): raw for raw in raws}


def read_plan(paths: RunPaths, plan: Plan) -> tuple[StoredPlan, dict[str, ShardChunks]]:
    """The stored plan on this node and its verified chunk digests by shard digest.

    Raises:
        SnapshotNotFoundError: it is not stored here. IntegrityError: it is damaged.
    """
    stored = json_records.loads(StoredPlan, read_small(paths.plan(plan.key, plan.plan_id)))
    if stored.plan != plan:
        raise IntegrityError(f"stored plan {plan.plan_id[:8]} is not the plan of that id", reason="bad_plan")
    return stored, stored.chunks_by_digest()


def read_verified(fd: int, view: memoryview, *, chunk: int, crc: int) -> bool:
    """Read one chunk into ``view`` (as long as the chunk); whether it is whole and has that crc32c."""
    return os.preadv(fd, [view], chunk * CHUNK_BYTES) == len(view) and crc32c(view) == crc


@contextlib.contextmanager
def _open_locked(path: Path) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise SnapshotNotFoundError(f"cannot open {path.name}: {error.strerror}", reason="gone") from error
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
