"""One rank's line to its daemon for tools that bring their own bytes: slots, commits, seals; attached again after a break.

Knows nothing of models, DCP or files. Must not be used together with a Snapshotter of the same run in one process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from backstay._version import __version__
from backstay.capture.fill import Filler
from backstay.errors import BackstayError, CapacityError, StaleGenerationError, UnavailableError, UsageError
from backstay.format import json_records, shard
from backstay.format.digest import Digests
from backstay.protocol import framing, messages
from backstay.protocol.connection import DaemonConnection, register_child_cleanup
from backstay.trainer import checked_arguments, raw_memory
from backstay.trainer.torch_world import World

ATTACH_DEADLINE_S: Final = 5.0
POLL_S: Final = 0.2  # one request at a time: a longer one would hold up the others of this process
RETRY_S: Final = 0.2
MAX_MAPPINGS: Final = 4
BY_CHUNKS: Final = "by-chunks"  # the layout of no shard: this reader is always offered chunks, never given whole shards


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Memory of the daemon that is this rank's to fill, until it is committed or given back."""

    step: int
    slot_id: str
    mapping: raw_memory.Mapping


class Line:
    """The session of one rank from its restore on; thread-safe.

    Invariant: a slot that is granted and neither committed nor abandoned is held by exactly one caller.

    Args:
        connection: An attached connection whose restore was answered.
        attach: What it was attached with, with the attempt that this world writes.
        lease_s: As the daemon said.
    """

    def __init__(
        self, connection: DaemonConnection, attach: messages.Attach, *, lease_s: float, socket_path: str
    ) -> None:
        self.attach = attach
        self.filler = Filler(rank=attach.rank)
        self._socket_path, self._lease_s = socket_path, lease_s
        self._connection: DaemonConnection | None = connection
        self._slots: dict[str, tuple[int, raw_memory.Mapping]] = {}
        self._sealed_step = 0
        self._ban: StaleGenerationError | None = None
        self._is_closed = False
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._unregister = register_child_cleanup(self._forget_in_child)

    @property
    def place(self) -> World:
        return World(rank=self.attach.rank, size=self.attach.world_size)

    # ---- one shard

    def reserve(self, step: int, size_bytes: int, *, wait_s: float) -> Slot:
        """A slot of exactly ``size_bytes`` for ``step``.

        Raises:
            CapacityError: none came free within ``wait_s``, or the memory does not hold one; the step is skipped.
        """
        with self._lock:
            self._prune(size_bytes)
            request = messages.Reserve(step=step, size_bytes=size_bytes, wait_s=wait_s, known_slots=tuple(self._slots))
            reply, fds = self._call(request, wait_s + self._lease_s, is_repeatable=True)
            if not isinstance(reply, messages.Reserved):
                framing.close_fds(fds)
                reason = (
                    reply.reason if isinstance(reply, messages.Skipped) else f"the daemon sent {type(reply).__name__}"
                )
                raise CapacityError(f"step {step} is not kept in memory: {reason}", reason="no_slot")
            mapping = self._map(reply.slot_id, fds, size_bytes)
            return Slot(step=step, slot_id=reply.slot_id, mapping=mapping)

    def commit(self, slot: Slot, layout: shard.Layout, digests: Digests, *, kind: str) -> messages.Committed:
        """Publish a filled slot as this rank's shard of its step; ``kind`` is the shard's layout in its manifest."""
        attach = self.attach
        manifest = shard.build_manifest(
            layout,
            run=attach.run,
            attempt=attach.attempt,
            step=slot.step,
            rank=attach.rank,
            world_size=attach.world_size,
            world_id=attach.world_id,
            chunk_crcs=digests.chunk_crcs,
            tensor_crcs=digests.tensor_crcs,
            writer=f"backstay {__version__}, pid {os.getpid()}",
        )
        body = json_records.to_json(dataclasses.replace(manifest, layout=kind))
        reply = self._expect(
            messages.Commit(step=slot.step, slot_id=slot.slot_id, manifest=body),
            messages.Committed,
            self._lease_s + 10.0,
        )
        assert isinstance(reply, messages.Committed)
        return reply

    def abandon(self, step: int, reason: str, *, slot: Slot | None = None) -> None:
        """Say that this rank will have no shard of ``step``; what cannot be said now, the daemon learns by itself."""
        request = messages.Abandon(step=step, slot_id=slot.slot_id if slot else "", reason=reason[:500])
        with contextlib.suppress(BackstayError):
            self._expect(request, messages.Done, self._lease_s)

    # ---- the world's steps

    def seal(self, step: int) -> None:
        """Declare ``step`` whole: every rank of the world commits its part."""
        self._sealed_step = max(self._sealed_step, step)
        self._expect(messages.Seal(step=step), messages.Done, self._lease_s, is_repeatable=True)

    def await_seal(self, after_step: int, *, wait_s: float = POLL_S) -> messages.Sealed:
        """The newest sealed step; waits up to ``wait_s`` for one after ``after_step``."""
        request = messages.AwaitSeal(after_step=after_step, wait_s=wait_s)
        reply = self._expect(request, messages.Sealed, wait_s + self._lease_s, is_repeatable=True)
        assert isinstance(reply, messages.Sealed)
        return reply

    def complete_step(self, *, awaited: int = 0, wait_s: float = 0.0) -> int:
        """The newest complete step of this history; waits up to ``wait_s`` for step ``awaited``."""
        request = messages.AwaitSeal(after_step=1 << 62, wait_s=wait_s, complete_step=awaited)
        reply = self._expect(request, messages.Sealed, wait_s + self._lease_s, is_repeatable=True)
        assert isinstance(reply, messages.Sealed)
        return reply.complete_step

    def wait_complete(self, step: int, timeout_s: float) -> bool:
        """Wait until every rank's shard of ``step`` (or of a later one) is held; False at the end of the time."""
        deadline = time.monotonic() + checked_arguments.seconds_of("timeout_s", timeout_s)
        while True:
            left = deadline - time.monotonic()
            try:
                if self.complete_step(awaited=step, wait_s=max(0.0, min(POLL_S, left))) >= step:
                    return True
            except UnavailableError:
                threading.Event().wait(max(0.0, min(RETRY_S, left)))
            if time.monotonic() >= deadline:
                return False

    # ---- the end

    def finish(self, *, keep: bool, timeout_s: float = 30.0) -> None:
        """The run ended well: its memory is freed everywhere, or stays (``keep``) until ``job_ttl_s``."""
        self._expect(messages.Finish(keep=keep), messages.Done, timeout_s)

    def close(self) -> None:
        """Detach and unmap; what is committed stays in memory. Idempotent; nothing in a forked child."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._unregister()
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            for slot_id in list(self._slots):
                self._unmap(slot_id)
            self.filler.close()

    # ---- inside

    def _expect(self, request: Any, kind: type[Any], deadline_s: float, *, is_repeatable: bool = False) -> Any:
        with self._lock:
            reply, fds = self._call(request, deadline_s, is_repeatable=is_repeatable)
        framing.close_fds(fds)
        if not isinstance(reply, kind):
            raise UnavailableError(f"the daemon answered {type(request).__name__} with {type(reply).__name__}")
        return reply

    def _call(self, request: Any, deadline_s: float, *, is_repeatable: bool) -> tuple[Any, list[int]]:
        """One request; a line that broke is made anew, and what may be asked twice is asked again."""
        if self._is_closed:
            raise UsageError("this store was closed; make another one", reason="closed")
        if self._ban is not None:
            raise self._ban
        is_fresh = self._connection is None
        if self._connection is None:
            self._attach()
        try:
            return self._ask(request, deadline_s)
        except UnavailableError:
            if is_fresh or not is_repeatable or self._connection is not None:
                raise
        self._attach()
        return self._ask(request, deadline_s)

    def _ask(self, request: Any, deadline_s: float) -> tuple[Any, list[int]]:
        assert self._connection is not None
        try:
            return self._connection.call(request, deadline_s=deadline_s)
        except StaleGenerationError as error:
            self._ban = error
            raise
        except UnavailableError as error:
            if error.reason in ("deadline", "disconnected", "closed", "not_attached"):
                self._connection.close()
                self._connection = None
            raise

    def _attach(self) -> None:
        connection = DaemonConnection(self._socket_path, timeout_s=ATTACH_DEADLINE_S)
        try:
            attached = connection.attach(self.attach, deadline_s=ATTACH_DEADLINE_S)
            if self._sealed_step:
                connection.call(messages.Seal(step=self._sealed_step), deadline_s=ATTACH_DEADLINE_S)
        except BaseException as error:
            connection.close()
            if isinstance(error, StaleGenerationError):
                self._ban = error
            raise
        self._connection, self._lease_s = connection, attached.lease_s

    def _map(self, slot_id: str, fds: Sequence[int], size_bytes: int) -> raw_memory.Mapping:
        if fds:
            self._unmap(slot_id)
            try:
                mapping = raw_memory.Mapping(fds[0], is_writable=True, size_bytes=size_bytes)
            except (BackstayError, OSError) as error:
                framing.close_fds(list(fds))
                raise UnavailableError(f"slot {slot_id} cannot be mapped: {error}; this step is skipped") from error
            framing.close_fds(list(fds[1:]))
            self._slots[slot_id] = (fds[0], mapping)
        found = self._slots.get(slot_id)
        if found is None or found[1].size_bytes != size_bytes:
            raise UnavailableError(f"the daemon granted slot {slot_id} without its memory; this step is skipped")
        return found[1]

    def _prune(self, size_bytes: int) -> None:
        """Let go of slots that the daemon deleted or that have another size: a mapping would keep their memory."""
        for slot_id, (fd, mapping) in list(self._slots.items()):
            if os.fstat(fd).st_nlink == 0 or mapping.size_bytes != size_bytes or len(self._slots) > MAX_MAPPINGS:
                self._unmap(slot_id)

    def _unmap(self, slot_id: str) -> None:
        found = self._slots.pop(slot_id, None)
        if found is not None:
            for copier in self.filler.copiers.values():
                copier.forget(found[1])
            found[1].close()
            os.close(found[0])

    def _forget_in_child(self) -> None:
        for fd, _ in self._slots.values():
            with contextlib.suppress(OSError):
                os.close(fd)
