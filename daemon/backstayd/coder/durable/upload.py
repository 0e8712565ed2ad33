"""Doing what is asked of durable storage: surveys, uploads, completion records, pruning.

Each byte of a shard is read once from tmpfs, checked in the buffer it is sent from, and written once. Must not decide what
is copied.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from crc32c import crc32c

from backstay.errors import IntegrityError, SnapshotNotFoundError, UnavailableError
from backstay.format import json_records
from backstay.format.manifest import CHUNK_BYTES
from backstay.ids import SnapshotKey
from backstayd.coder.context import JobContext, shard_ref_of
from backstayd.coder.durable.bandwidth import BUCKET
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
from backstayd.store.published import open_shard
from backstayd.store.record_files import ShardChunks, read_small
from backstayd.transport.bulk.client import ShardRef

logger = logging.getLogger(__name__)

PARALLEL_SMALL = 8  # records and manifests read at a time
PROGRESS_S = 0.5
MAX_REASON = 300  # characters of what is wrong with a record


def run_survey(context: JobContext, job: SurveyStorage) -> Survey:
    """Do ``job``. A record that cannot be used is named and logged; what cannot be listed raises."""
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
    return Survey(
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
    ref = shard_ref_of(job)
    place = open_place(snapshot_url(job.url, ref.key))
    paths = context.paths(job.run)
    raw = read_small(paths.manifest(ref.key, job.rank, job.world_size))
    if _is_there(place, job, raw):
        context.done_bytes = job.size_bytes
        return
    _require_free(place, ref)
    with open_shard(paths, ref.key, rank=job.rank, world_size=job.world_size, digest=job.digest) as (fd, chunks):
        source = _TmpfsSource(context, job, ref, fd, chunks)
        publish_shard(
            place, rank=job.rank, source=source, manifest=raw, mark=f"{job.digest[:16]}.{job.mark}", check=context.check
        )


def _is_there(place: Place, job: UploadShard, raw: bytes) -> bool:
    try:
        return (
            place.read_small(manifest_name(job.rank, job.world_size)) == raw
            and place.size_of(shard_name(job.rank, job.world_size)) == job.size_bytes
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

    def __init__(self, context: JobContext, job: UploadShard, ref: ShardRef, fd: int, chunks: ShardChunks) -> None:
        self.chunks = chunks
        self._context, self._job, self._ref, self._fd = context, job, ref, fd
        self._lock = threading.Lock()
        self._told_s = 0.0

    def read_verified(self, offset: int, view: memoryview) -> None:
        self._context.check()
        pread_chunks(self._fd, view, offset)
        for chunk in chunk_range(self.chunks, offset, len(view)):
            begin = chunk * CHUNK_BYTES - offset
            found = crc32c(view[begin : begin + self.chunks.chunk_length(chunk)])
            expected = self.chunks.chunk_crc(chunk)
            if found != expected:
                detail = f"chunk {chunk} has crc {found:08x}, expected {expected:08x}"
                raise self._context.blame(self._ref, node="", detail=detail)

    def spend(self, size_bytes: int) -> None:
        BUCKET.take(size_bytes, self._job.bandwidth_bytes_per_s, pause=self._context.wait)

    def note_done(self, size_bytes: int) -> None:
        with self._lock:
            self._context.done_bytes += size_bytes
            if time.monotonic() - self._told_s < PROGRESS_S:
                return
            self._told_s = time.monotonic()
            event = CoderEvent(
                kind="shard_uploading",
                run=self._job.run,
                attempt=self._job.attempt,
                step=self._job.step,
                rank=self._job.rank,
                digest=self._job.digest,
                size_bytes=self._context.done_bytes,
            )
        self._context.emit(event)
