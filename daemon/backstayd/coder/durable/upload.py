"""Doing what is asked of durable storage: surveys, uploads, completion records, pruning.

Each byte of a shard is read once from tmpfs, checked in the buffer it is sent from, and written once. Must not decide what
is copied.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from crc32c import crc32c

from backstay.errors import IntegrityError, SnapshotNotFoundError, UnavailableError
from backstay.format import json_records
from backstay.format.manifest import CHUNK_BYTES
from backstay.ids import SnapshotKey
from backstayd.coder.context import JobContext
from backstayd.coder.durable.shared_changes import read_marks, with_reason
from backstayd.coder.jobs import CoderEvent, SurveyStorage, UploadShard
from backstayd.coder.verified_reads import pread_chunks
from backstayd.core.inventory.distrust import MAX_DISTRUSTED
from backstayd.core.inventory.durable_names import (
    RECORD_NAME,
    attempt_of,
    manifest_name,
    root_of,
    shard_name,
    snapshot_name,
    snapshot_url,
    step_of,
)
from backstayd.core.inventory.survey import why_no_snapshot
from backstayd.core.messages.durable import PersistedSnapshot, Survey, Unreadable
from backstayd.durable.open import open_place
from backstayd.durable.place import Place, chunk_range
from backstayd.durable.publish import publish_shard
from backstayd.store.paths import ShardRef
from backstayd.store.published import open_shard
from backstayd.store.record_files import ShardChunks, read_small

logger = logging.getLogger(__name__)

BURST_S = 0.25  # so much of a second may be sent at once after a pause
PARALLEL_SMALL = 8  # records and manifests read at a time
PROGRESS_S = 0.5
MAX_REASON = 300  # characters of what is wrong with a record


def run_survey(context: JobContext, job: SurveyStorage) -> None:
    """Do ``job``; the answer is ``context.survey``. A record that cannot be used is named; what cannot be listed raises."""
    open_place(root_of(job.url)).require_root()
    place = open_place(job.url)
    attempts = [entry.name for entry in place.list() if entry.is_directory and attempt_of(entry.name) is not None]
    keys = []
    for name in attempts:
        context.check()
        attempt = attempt_of(name)
        for entry in place.list(name):
            step = step_of(entry.name)
            if entry.is_directory and attempt is not None and step is not None:
                keys.append(SnapshotKey(attempt, step))
    with ThreadPoolExecutor(PARALLEL_SMALL, thread_name_prefix="survey") as pool:
        found = list(pool.map(lambda key: _read_record(context, place, job.run, key), sorted(keys)))
    snapshots = tuple(item for item in found if isinstance(item, PersistedSnapshot))
    unreadable = tuple(item for item in found if isinstance(item, Unreadable))
    has_record = {item.key for item in snapshots} | {item.key for item in unreadable}
    context.survey = Survey(
        url=job.url,
        survey_id=job.survey_id,
        is_done=True,
        is_known=bool(attempts),
        snapshots=snapshots,
        partial=tuple(key for key in sorted(keys) if key not in has_record),
        unreadable=unreadable,
        distrusted=tuple(with_reason(place, mark) for mark in read_marks(place)[-MAX_DISTRUSTED:]),
    )


def _read_record(
    context: JobContext, place: Place, run: str, key: SnapshotKey
) -> PersistedSnapshot | Unreadable | None:
    """None: there is no record, which is another thing than one that cannot be used."""
    context.check()
    name = f"{snapshot_name(key)}/{RECORD_NAME}"
    try:
        snapshot = json_records.loads(PersistedSnapshot, place.read_small(name))
    except SnapshotNotFoundError:
        return None
    except (IntegrityError, MemoryError) as error:
        problem = str(error) or "it is too large to be read"
    else:
        problem = why_no_snapshot(snapshot, run=run, key=key)
        if not problem:
            return snapshot
    logger.error("%s/%s cannot be used; the snapshot is passed over and kept: %s", place.url, name, problem)
    return Unreadable(attempt=key.attempt, step=key.step, reason=problem[:MAX_REASON])


def run_upload(context: JobContext, job: UploadShard) -> None:
    """Do ``job``; a shard that lies there whole already is left alone.

    Raises:
        CorruptSourceError: the shard of this node is corrupt. UnavailableError, CapacityError: the store, in words for people.
    """
    open_place(root_of(job.url)).require_root()
    ref = job.shard
    place = open_place(snapshot_url(job.url, ref.key))
    paths = context.paths(job.run)
    raw = read_small(paths.manifest(ref.key, ref.rank, ref.world_size))
    if _is_there(place, job, raw):
        context.done_bytes = job.size_bytes
        return
    _require_free(place, ref)
    with open_shard(paths, ref) as (fd, chunks):
        source = _TmpfsSource(context, job, fd, chunks)
        mark = f"{ref.digest[:16]}.{job.mark}"
        publish_shard(place, rank=ref.rank, source=source, manifest=raw, mark=mark, check=context.check)


def _is_there(place: Place, job: UploadShard, raw: bytes) -> bool:
    rank, world_size = job.shard.rank, job.shard.world_size
    try:
        return (
            place.read_small(manifest_name(rank, world_size)) == raw
            and place.size_of(shard_name(rank, world_size)) == job.size_bytes
        )
    except SnapshotNotFoundError:
        return False


def _require_free(place: Place, ref: ShardRef) -> None:
    """Never write into the directory of a snapshot that is whole."""
    if place.size_of(RECORD_NAME) is not None:
        raise UnavailableError(
            f"{place.url} holds another snapshot of step {ref.key.step} already; it is not touched. If it is not of this "
            "run, move it away",
            reason="occupied",
        )


class _TmpfsSource:
    """A committed shard as the storage package reads it; see ``durable.place.ShardSource``."""

    def __init__(self, context: JobContext, job: UploadShard, fd: int, chunks: ShardChunks) -> None:
        self.chunks = chunks
        self._context, self._job, self._fd = context, job, fd
        self._lock = threading.Lock()
        self._emitted_s = 0.0

    def read_verified(self, offset: int, view: memoryview) -> None:
        self._context.check()
        pread_chunks(self._fd, view, offset)
        for chunk in chunk_range(self.chunks, offset, len(view)):
            begin = chunk * CHUNK_BYTES - offset
            found = crc32c(view[begin : begin + self.chunks.chunk_length(chunk)])
            expected = self.chunks.chunk_crc(chunk)
            if found != expected:
                detail = f"chunk {chunk} has crc {found:08x}, expected {expected:08x}"
                raise self._context.blame(self._job.shard, detail=detail)

    def spend(self, size_bytes: int) -> None:
        _BUCKET.take(size_bytes, self._job.bandwidth_bytes_per_s, pause=self._context.wait)

    def note_done(self, size_bytes: int) -> None:
        with self._lock:
            self._context.done_bytes += size_bytes
            if time.monotonic() - self._emitted_s < PROGRESS_S:
                return
            self._emitted_s = time.monotonic()
            done_bytes = self._context.done_bytes
        self._context.emit(CoderEvent(kind="shard_uploading", shard=self._job.shard, size_bytes=done_bytes))


class _TokenBucket:
    """Bytes that may be sent; filled at the rate last set. Threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ready_s = 0.0  # when everything that was taken so far will have been paid for

    def take(self, size_bytes: int, rate: int, *, pause: Callable[[float], None]) -> None:
        """Wait until ``size_bytes`` may be sent at ``rate`` bytes a second; 0: at once.

        Args:
            pause: waits that many seconds, or raises to give up.
        """
        if rate <= 0:
            return
        with self._lock:
            now_s = time.monotonic()
            begin_s = max(self._ready_s, now_s - BURST_S)
            self._ready_s = begin_s + size_bytes / rate
        pause(max(0.0, self._ready_s - size_bytes / rate - now_s))


_BUCKET = _TokenBucket()  # one for all uploads of this process, which runs every upload of its node
