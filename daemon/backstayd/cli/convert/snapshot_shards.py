"""The shards of one snapshot, opened through this node's daemon or from durable storage.

Returns unverified bytes, as :class:`backstay.convert.consolidate.ShardBytes`; the reader verifies every chunk.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from backstay.convert.consolidate import Shard
from backstay.errors import IntegrityError, SnapshotNotFoundError, UsageError
from backstay.format import json_records
from backstay.format.manifest import Manifest
from backstay.ids import RunKey, SnapshotKey, check_name
from backstay.protocol import framing, messages
from backstay.protocol.connection import DaemonConnection
from backstayd.core.inventory.durable_names import RECORD_NAME, attempt_of, run_url, snapshot_url, step_of
from backstayd.core.messages.durable import PersistedSnapshot

DEADLINE_S: Final = 600.0
_RANK = re.compile(r"rank-\d{5,}\.")


@dataclass(frozen=True, slots=True)
class FileBytes:
    """A shard file behind a descriptor."""

    fd: int

    def read_into(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            count = os.preadv(self.fd, [view[done:]], offset + done)
            if count == 0:
                raise IntegrityError(
                    f"shard file is truncated at byte {offset + done}; it was not used", reason="truncated"
                )
            done += count


@contextlib.contextmanager
def open_in_memory(socket: str, run: str, *, step: int, prefix: str) -> Iterator[list[Shard]]:
    """The newest readable snapshot of ``run`` (or that of ``step``), its chunks of tensors under ``prefix`` on this node.

    Raises:
        SnapshotNotFoundError: no complete snapshot is in memory. UnavailableError: no daemon, or a shard cannot be fetched.
    """
    connection = DaemonConnection(socket, timeout_s=5.0)
    fds: dict[int, int] = {}
    try:
        offer = connection.open(run, step, deadline_s=DEADLINE_S)
        manifests = [json_records.from_json(Manifest, body) for body in offer.manifests]
        for group in _grouped([_chunks_of(m, prefix) for m in manifests]):
            reply, received = connection.fetch(
                messages.Fetch(decision_id=offer.decision_id, shards=tuple(group), deadline_s=DEADLINE_S),
                on_progress=lambda _: None,
            )
            fds |= {shard.rank: received[shard.fd_index] for shard in reply.shards}
        yield [Shard(manifest=m, bytes=FileBytes(fds.get(m.rank, -1))) for m in manifests]
    finally:
        connection.close()
        framing.close_fds(list(fds.values()))


@contextlib.contextmanager
def open_persisted(persist_url: str, run: str, *, step: int) -> Iterator[list[Shard]]:
    """The newest complete snapshot of ``run`` below ``persist_url``, or that of ``step``.

    Raises:
        SnapshotNotFoundError: there is none. ConfigError, UnavailableError: the storage cannot be read.
    """
    from backstayd.durable.reader import open_shard

    run = _full_name(persist_url, run)
    root = run_url(persist_url, run)
    found = newest_persisted(root, run, step=step)
    url = snapshot_url(root, found.key)
    with contextlib.ExitStack() as stack:
        shards = []
        for row in found.shards:
            shard = open_shard(url, rank=row.rank, world_size=found.world_size, digest=row.digest)
            stack.callback(shard.close)
            shards.append(Shard(manifest=json_records.loads(Manifest, shard.manifest_bytes), bytes=shard))
        yield shards


def _full_name(persist_url: str, name: str) -> str:
    """``name`` as job/run_id; a run_id alone is looked up in every job's directory."""
    from backstayd.durable.open import open_place

    if "/" in name:
        return str(RunKey.parse(name))
    check_name("run_id", name)
    place = open_place(persist_url)
    jobs = sorted(job.name for job in place.list() if job.is_directory)
    found = [f"{job}/{name}" for job in jobs if any(run.name == name for run in place.list(job))]
    if len(found) > 1:
        raise UsageError(f"several jobs have a run {name}; give one of: {', '.join(found)}", reason="bad_arguments")
    if not found:
        raise SnapshotNotFoundError(f"no job in {persist_url} has a run {name}", reason="unknown_run")
    return found[0]


def newest_persisted(root: str, run: str, *, step: int) -> PersistedSnapshot:
    """The completion record of the newest snapshot in the run's directory ``root``, or of the newest at ``step``."""
    keys = sorted((key for key in persisted_keys(root) if step in (0, key.step)), reverse=True)
    for key in keys:
        found = _read_record(snapshot_url(root, key), run)
        if found is not None:
            return found
    which = f"at step {step} " if step else ""
    raise SnapshotNotFoundError(f"no complete snapshot of {run} {which}is in {root}", reason="unknown_snapshot")


def persisted_keys(root: str) -> Iterator[SnapshotKey]:
    """The snapshot directories below ``root``, complete or not."""
    from backstayd.durable.open import open_place

    place = open_place(root)
    for attempt in place.list():
        number = attempt_of(attempt.name)
        for entry in place.list(attempt.name) if number is not None and attempt.is_directory else ():
            found = step_of(entry.name)
            if number is not None and found is not None:
                yield SnapshotKey(number, found)


def _read_record(url: str, run: str) -> PersistedSnapshot | None:
    from backstayd.durable.open import open_place

    try:
        found = json_records.loads(PersistedSnapshot, open_place(url).read_small(RECORD_NAME))
    except (SnapshotNotFoundError, IntegrityError):
        return None
    return found if found.run == run else None


def _chunks_of(manifest: Manifest, prefix: str) -> messages.ChunkRanges | None:
    """The chunks that hold tensors under ``prefix``; None if there are none."""
    size = manifest.chunk_bytes
    chunks = sorted(
        {
            chunk
            for entry in manifest.tensors
            if _RANK.sub("", entry.name, count=1).startswith(prefix) and entry.end > entry.begin
            for chunk in range(entry.begin // size, (entry.end - 1) // size + 1)
        }
    )
    firsts: list[int] = []
    counts: list[int] = []
    for chunk in chunks:
        if firsts and firsts[-1] + counts[-1] == chunk:
            counts[-1] += 1
        else:
            firsts.append(chunk)
            counts.append(1)
    return messages.ChunkRanges(rank=manifest.rank, firsts=tuple(firsts), counts=tuple(counts)) if firsts else None


def _grouped(ranges: Iterable[messages.ChunkRanges | None]) -> Iterator[list[messages.ChunkRanges]]:
    """Groups of as many shards as fit into one answer."""
    group: list[messages.ChunkRanges] = []
    for wanted in ranges:
        if wanted is not None:
            group.append(wanted)
        if len(group) == framing.MAX_FDS // 2:
            yield group
            group = []
    if group:
        yield group
