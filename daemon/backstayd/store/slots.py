"""Slots: who may fill which inode, and how a filled one becomes a shard.

An inode passes to another process only when its former holder is dead and no reader is left; otherwise a new inode is
allocated, or the caller waits. Must not decide what is released.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crc32c import crc32c

from backstay import faults
from backstay.errors import CapacityError, IntegrityError, InvariantError, UsageError
from backstay.format import json_records
from backstay.format.manifest import Manifest
from backstay.format.shard import PAGE_BYTES
from backstay.ids import SnapshotKey
from backstayd.core.messages.plans import ShardRecord
from backstayd.core.protect.groups import parity_room
from backstayd.store.adopt import check_size, slot_id_of
from backstayd.store.directory import Directory
from backstayd.store.index import HeldShard, RunIndex, Slot
from backstayd.store.record_files import canonical_bytes, make_directory, write_atomically
from backstayd.store.slot_holder import Holder, HolderRecord

logger = logging.getLogger(__name__)

HUGE_PAGE_BYTES = 2 << 20  # tmpfs may round up to whole ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """The right of one process to fill one slot for one step. ``fd`` is open for reading and writing, owned by the store."""

    run: str
    rank: int
    number: int
    step: int
    slot_id: str
    size_bytes: int
    fd: int
    holder: HolderRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """A slot that must be made first: :func:`allocate` in a thread, then :meth:`Slots.add` or :meth:`Slots.give_up`."""

    run: str
    rank: int
    number: int
    size_bytes: int
    temporary: Path


def allocate(allocation: Allocation) -> None:
    """Make the file with all its pages, charged to the daemon's cgroup. Blocking.

    Raises:
        CapacityError: tmpfs said no (``no_space``).
    """
    fd = os.open(allocation.temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, allocation.size_bytes)
    except OSError as error:
        allocation.temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
            raise CapacityError(
                f"rank {allocation.rank}: tmpfs {allocation.temporary.parent} has no room for a slot of "
                f"{allocation.size_bytes} bytes; this snapshot is skipped",
                reason="no_space",
            ) from error
        raise
    finally:
        os.close(fd)


def _cut_back(path: Path, size_bytes: int) -> int:
    """Cut the file to ``size_bytes`` if more of it is there; returns how much that was."""
    try:
        status = path.lstat()
        excess = max(status.st_size - size_bytes, status.st_blocks * 512 - size_bytes - HUGE_PAGE_BYTES)
        if excess > 0:
            os.truncate(path, size_bytes)
    except OSError:  # it was renamed or deleted just now
        return 0
    return excess


class Slots:
    """The slots of one store. Invariant: a granted inode lies in ``slots/`` and has exactly one grant.

    Args:
        admit: Raises CapacityError unless a run may take so many more bytes, for the purpose named.
    """

    def __init__(
        self, directory: Directory, *, admit: Callable[[RunIndex, int, str], None], reader_wait_s: float
    ) -> None:
        self._directory = directory
        self._admit = admit
        self._reader_wait_s = reader_wait_s
        self.grants: dict[str, Grant] = {}  # by slot id
        self.hosted: dict[tuple[str, int], int] = {}  # (run, rank) of the trainers attached here to their world's size
        self.pending_bytes = 0  # being allocated now
        self._pending: dict[tuple[str, int, int], Allocation] = {}
        self._shelved_at: dict[str, float] = {}  # slot id -> when it became free
        self._known: dict[HolderRecord, Holder] = {}

    def is_alive(self, holder: HolderRecord) -> bool:
        """Whether that process can still write what it was given."""
        known = self._known.get(holder)
        if known is None:
            try:
                known = Holder.find(holder)
            except OSError as error:  # out of descriptors: it may live, so nobody else gets what it was given
                logger.warning("cannot look for process %d: %s", holder.pid, error.strerror)
                return True
            if known is None:
                return False
            self._known[holder] = known
        if not known.is_alive:
            known.close()
            del self._known[holder]
            return False
        return True

    def take(
        self,
        index: RunIndex,
        *,
        rank: int,
        step: int,
        size_bytes: int,
        holder: HolderRecord,
        limit: int,
        world_size: int = 0,
    ) -> Grant | Allocation | None:
        """A slot of exactly ``size_bytes`` for ``holder``, or one to allocate, or None: none is free yet.

        Args:
            limit: Inodes this rank may have, shards and slots together.
            world_size: Shards of a rank of that number in a world of another size are not this rank's; 0 counts all.

        Raises:
            CapacityError: a new slot is needed and there is no room for it and what follows from it.
        """
        usable = [
            slot for slot in self._free(index) if slot.rank == rank and self._may_have(index, slot.slot_id, holder)
        ]
        surplus = self._own_count(index, rank, holder, world_size) - limit
        for slot in usable:
            if slot.size_bytes != size_bytes or (surplus > 0 and slot is not usable[-1]):
                surplus -= 1
                self.discard(index, slot)
            elif self._has_no_reader(index, slot):
                return self._grant(index, slot, step=step, holder=holder)
            elif time.monotonic() - self._shelved_at.get(slot.slot_id, 0.0) > self._reader_wait_s:
                logger.warning("run %s: a reader holds slot %s too long; rank %d gets another", index.run, slot, rank)
                self.discard(index, slot)
        own = self._own_count(index, rank, holder, world_size)
        if own >= limit:
            return None
        for slot in list(self._free(index)):
            is_unused = (index.run, slot.rank) not in self.hosted and slot.size_bytes == size_bytes
            if is_unused and self._may_have(index, slot.slot_id, holder) and self._has_no_reader(index, slot):
                return self._grant(index, self._rename(index, slot, rank), step=step, holder=holder)
        return self._plan_allocation(index, rank=rank, size_bytes=size_bytes, more=limit - own, world_size=world_size)

    def add(self, allocation: Allocation, *, step: int, holder: HolderRecord) -> Grant:
        """Grant the slot that :func:`allocate` made."""
        index = self._directory.index(allocation.run)
        self._end_allocation(allocation)
        path = self._directory.paths(allocation.run).slot(allocation.rank, allocation.number)
        allocation.temporary.rename(path)
        slot = Slot(
            rank=allocation.rank,
            number=allocation.number,
            size_bytes=allocation.size_bytes,
            slot_id=slot_id_of(path.lstat()),
        )
        index.slots[slot.rank, slot.number] = slot
        return self._grant(index, slot, step=step, holder=holder)

    def give_up(self, allocation: Allocation) -> None:
        """The allocation failed or nobody wants it any more."""
        self._end_allocation(allocation)
        allocation.temporary.unlink(missing_ok=True)

    def commit(
        self, grant: Grant, manifest_json: dict[str, object], *, check: Callable[[Manifest], None] = lambda _: None
    ) -> ShardRecord:
        """Check the filled slot and publish it as a shard: data first, manifest last, both by rename.

        Args:
            check: Raises if this is not the manifest that the holder of the grant may publish.

        Raises:
            IntegrityError: size, holes, header or identity contradict the manifest. UsageError: the step exists already.
        """
        index, paths = self._directory.index(grant.run), self._directory.paths(grant.run)
        manifest = json_records.from_json(Manifest, manifest_json)
        check(manifest)
        manifest.check()
        raw = canonical_bytes(manifest_json)
        key = SnapshotKey(manifest.attempt, manifest.step)
        target = paths.shard(key, grant.rank, manifest.world_size)
        if (key, grant.rank) in index.shards:
            raise UsageError(f"rank {grant.rank} committed step {key.step} of attempt {key.attempt} already")
        status = os.fstat(grant.fd)
        check_size(f"slot {grant.number} of rank {grant.rank}", status, manifest.size_bytes)
        check_header(grant.fd, manifest)
        make_directory(target.parent)
        slot_path, manifest_path = (
            paths.slot(grant.rank, grant.number),
            paths.manifest(key, grant.rank, manifest.world_size),
        )
        slot_path.rename(target)
        faults.reach("before_publish", step=key.step, rank=grant.rank)
        try:
            write_atomically(manifest_path, raw, incarnation=self._directory.incarnation)
        except BaseException:
            target.rename(slot_path)  # no room for the manifest: the slot is what it was
            raise
        del index.slots[grant.rank, grant.number]
        faults.reach("after_publish", step=key.step, rank=grant.rank)
        shard = ShardRecord(
            attempt=key.attempt,
            step=key.step,
            rank=grant.rank,
            world_size=manifest.world_size,
            size_bytes=manifest.size_bytes,
            digest=hashlib.sha256(raw).hexdigest(),
            world_id=manifest.world_id,
            layout=manifest.layout,
        )
        index.shards[key, grant.rank] = HeldShard(record=shard, slot_id=grant.slot_id)
        self._end_grant(grant)
        return shard

    def put_back(self, grant: Grant) -> None:
        """The grant ends without a commit; the slot is free (for others only once its holder is dead). Idempotent."""
        if self.grants.get(grant.slot_id) is grant:
            self._end_grant(grant)
            self._shelved_at[grant.slot_id] = time.monotonic()

    def shelve(self, index: RunIndex, path: Path, *, rank: int) -> None:
        """Make the withdrawn shard at ``path`` a free slot of ``rank``; its manifest is gone already."""
        paths = self._directory.paths(index.run)
        status = path.lstat()
        number = self._free_number(index, rank)
        make_directory(paths.slots)
        path.rename(paths.slot(rank, number))
        slot = Slot(rank=rank, number=number, size_bytes=status.st_size, slot_id=slot_id_of(status))
        index.slots[rank, number] = slot
        self._shelved_at[slot.slot_id] = time.monotonic()

    def discard(self, index: RunIndex, slot: Slot) -> None:
        """Unlink a free slot."""
        if slot.slot_id in self.grants:
            raise InvariantError(f"slot {slot} is granted")
        self._directory.paths(index.run).slot(slot.rank, slot.number).unlink(missing_ok=True)
        del index.slots[slot.rank, slot.number]
        self.forget_holder(index, slot.slot_id)

    def forget_holder(self, index: RunIndex, slot_id: str) -> None:
        """The inode is gone: so is the note of who held it."""
        self._shelved_at.pop(slot_id, None)
        if index.holders.pop(slot_id, None) is not None:
            self._directory.paths(index.run).holder(slot_id).unlink(missing_ok=True)

    def reclaim(self, wanted_bytes: int) -> int:
        """Unlink free slots that no living process maps and no attached rank needs; returns the bytes freed."""
        freed = 0
        for index in self._directory.runs.values():
            for slot in list(self._free(index)):
                if freed >= wanted_bytes:
                    return freed
                former = index.holders.get(slot.slot_id)
                if (index.run, slot.rank) not in self.hosted and (former is None or not self.is_alive(former)):
                    self.discard(index, slot)
                    freed += slot.size_bytes
        return freed

    def cut_back(self) -> list[tuple[str, str]]:
        """Take back what trainers added to their files past the size they were granted: their descriptors cannot be sealed.

        Returns for each file who did it, and a sentence for the log.
        """
        found = []
        for index in self._directory.runs.values():
            paths = self._directory.paths(index.run)
            places = [
                (paths.slot(slot.rank, slot.number), slot.size_bytes, slot.slot_id) for slot in index.slots.values()
            ]
            places += [
                (paths.shard(key, rank, held.record.world_size), held.record.size_bytes, held.slot_id)
                for (key, rank), held in index.shards.items()
            ]
            for path, size_bytes, slot_id in places:
                excess = _cut_back(path, size_bytes)
                if excess > 0:
                    holder = index.holders.get(slot_id)
                    process = f"process {holder.pid}" if holder is not None else "a process that is not known"
                    who = f"{process} of user {index.owner_uid}"
                    sentence = (
                        f"{who} added {excess} bytes to {path.name} of run {index.run} past the {size_bytes} bytes that were "
                        "granted; they were taken back"
                    )
                    found.append((who, sentence))
        return found

    def end_run(self, run: str) -> None:
        """The run is forgotten: its grants end, its descriptors are closed."""
        for grant in [grant for grant in self.grants.values() if grant.run == run]:
            self._end_grant(grant)

    def close(self) -> None:
        for grant in list(self.grants.values()):
            self._end_grant(grant)
        for holder in self._known.values():
            holder.close()
        self._known.clear()

    def _free(self, index: RunIndex) -> list[Slot]:
        return [slot for _, slot in sorted(index.slots.items()) if slot.slot_id not in self.grants]

    def _may_have(self, index: RunIndex, slot_id: str, holder: HolderRecord) -> bool:
        former = index.holders.get(slot_id)
        return former is None or former == holder or not self.is_alive(former)

    def _own_count(self, index: RunIndex, rank: int, holder: HolderRecord, world_size: int) -> int:
        inodes = [
            shard.slot_id
            for (_, owner), shard in index.shards.items()
            if owner == rank and world_size in (0, shard.record.world_size)
        ]
        inodes += [slot.slot_id for slot in index.slots.values() if slot.rank == rank]
        own = [slot_id for slot_id in inodes if self._may_have(index, slot_id, holder)]
        pending = sum(1 for run, owner, _ in self._pending if (run, owner) == (index.run, rank))
        return len(own) + pending

    def _has_no_reader(self, index: RunIndex, slot: Slot) -> bool:
        """Readers lock, then look for the manifest, which is gone: once this lock is had, no reader comes any more."""
        path = self._directory.paths(index.run).slot(slot.rank, slot.number)
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        return True

    def _grant(self, index: RunIndex, slot: Slot, *, step: int, holder: HolderRecord) -> Grant:
        paths = self._directory.paths(index.run)
        if index.holders.get(slot.slot_id) != holder:
            write_atomically(
                paths.holder(slot.slot_id), json_records.dumps(holder), incarnation=self._directory.incarnation
            )
            index.holders[slot.slot_id] = holder
        path = paths.slot(slot.rank, slot.number)
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        grant = Grant(
            run=index.run,
            rank=slot.rank,
            number=slot.number,
            step=step,
            slot_id=slot.slot_id,
            size_bytes=slot.size_bytes,
            fd=fd,
            holder=holder,
        )
        self.grants[slot.slot_id] = grant
        return grant

    def _end_grant(self, grant: Grant) -> None:
        del self.grants[grant.slot_id]
        with contextlib.suppress(OSError):
            os.close(grant.fd)

    def _rename(self, index: RunIndex, slot: Slot, rank: int) -> Slot:
        paths = self._directory.paths(index.run)
        number = self._free_number(index, rank)
        paths.slot(slot.rank, slot.number).rename(paths.slot(rank, number))
        del index.slots[slot.rank, slot.number]
        renamed = Slot(rank=rank, number=number, size_bytes=slot.size_bytes, slot_id=slot.slot_id)
        index.slots[rank, number] = renamed
        return renamed

    def _plan_allocation(
        self, index: RunIndex, *, rank: int, size_bytes: int, more: int, world_size: int
    ) -> Allocation:
        parity = parity_room(size_bytes, self._directory.parity_fraction.get(index.run, 0.0))
        held_parity = sum(  # parity of another layout stays until this one's protects as well
            size
            for fragment, size in index.fragments.items()
            if world_size in (0, index.plans[fragment.plan_id].world_size)
        )
        new_parity = max(0, parity - held_parity)
        self._admit(
            index,
            more * size_bytes + new_parity,
            f"run {index.run}: rank {rank} needs {more} more slots of {size_bytes} bytes and {new_parity} bytes for "
            "parity of two plans",
        )
        paths = self._directory.paths(index.run)
        make_directory(paths.slots)
        number = self._free_number(index, rank)
        path = paths.slot(rank, number)
        allocation = Allocation(
            run=index.run,
            rank=rank,
            number=number,
            size_bytes=size_bytes,
            temporary=path.with_name(f"{path.name}.{self._directory.incarnation}.tmp"),
        )
        self._pending[index.run, rank, number] = allocation
        self.pending_bytes += size_bytes
        return allocation

    def pending_of(self, run: str) -> int:
        """Bytes that are being allocated for the run now."""
        return sum(allocation.size_bytes for (owner, _, _), allocation in self._pending.items() if owner == run)

    def _end_allocation(self, allocation: Allocation) -> None:
        del self._pending[allocation.run, allocation.rank, allocation.number]
        self.pending_bytes -= allocation.size_bytes

    def _free_number(self, index: RunIndex, rank: int) -> int:
        taken = {number for owner, number in index.slots if owner == rank}
        taken |= {number for run, owner, number in self._pending if (run, owner) == (index.run, rank)}
        return next(number for number in range(1, len(taken) + 2) if number not in taken)


def check_header(fd: int, manifest: Manifest) -> None:
    """Raise IntegrityError unless the safetensors header in ``fd`` names the manifest's tensors at the manifest's places.

    The chunks that hold the header are compared with their digests as well: they were read anyway. The header is read with
    ``pread``, never through a mapping: a trainer that truncates its slot must not kill the daemon.
    """
    if manifest.header_bytes % PAGE_BYTES or not 8 < manifest.header_bytes <= manifest.size_bytes:
        raise IntegrityError(
            f"header of {manifest.header_bytes} bytes in a file of {manifest.size_bytes} is not whole pages",
            reason="bad_header",
        )
    chunks = -(-manifest.header_bytes // manifest.chunk_bytes)
    head = os.pread(fd, min(chunks * manifest.chunk_bytes, manifest.size_bytes), 0)
    for chunk in range(chunks):
        piece = head[chunk * manifest.chunk_bytes : chunk * manifest.chunk_bytes + manifest.chunk_length(chunk)]
        if crc32c(piece) != manifest.chunk_crc(chunk):
            raise IntegrityError(
                f"chunk {chunk} has crc {crc32c(piece):08x}, its manifest says {manifest.chunk_crc(chunk):08x}",
                reason="bad_chunk",
            )
    (length,) = struct.unpack_from("<Q", head)
    if length + 8 != manifest.header_bytes:
        raise IntegrityError(
            f"header of {length + 8} bytes, its manifest says {manifest.header_bytes}", reason="bad_header"
        )
    try:
        header = json.loads(head[8 : manifest.header_bytes])
        _compare(header, manifest)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise IntegrityError(f"the header is not safetensors JSON: {error!r:.200}", reason="bad_header") from error


def _compare(header: Any, manifest: Manifest) -> None:
    entries = {entry.name: entry for entry in manifest.tensors}
    found = (
        {name: value for name, value in header.items() if name != "__metadata__"} if isinstance(header, dict) else {}
    )
    if found.keys() != entries.keys():
        differing = sorted(found.keys() ^ entries.keys())[:3]
        raise IntegrityError(f"header and manifest name different tensors, such as {differing}", reason="bad_header")
    for name, entry in entries.items():
        value = found[name]
        begin, end = value["data_offsets"]
        said = (value["dtype"], tuple(value["shape"]), begin + manifest.header_bytes, end + manifest.header_bytes)
        if said != (entry.dtype, entry.shape, entry.begin, entry.end):
            raise IntegrityError(f"tensor {name} is {said} in the header, not as in the manifest", reason="bad_header")
