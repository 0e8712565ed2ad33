"""One rank's session with its daemon, from its restore on: slots, commits, and attaching again after a break.

Knows nothing of models, DCP or files.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from backstay._version import __version__
from backstay.errors import BackstayError, IntegrityError, StaleGenerationError, UnavailableError
from backstay.format import json_records, shard
from backstay.format.digest import Digests
from backstay.format.manifest import UnchangedRange
from backstay.protocol import framing, messages
from backstay.protocol.connection import DaemonConnection, register_child_cleanup
from backstay.session.attach import attach
from backstay.trainer import raw_memory

T = TypeVar("T")

ATTACH_S: Final = 5.0
COMMIT_S: Final = 10.0  # beyond the lease
MAX_MAPPINGS: Final = 4
MAX_REASON: Final = 500  # characters that the daemon is given of why a step is abandoned
NOT_MAPPED: Final = "not_mapped"
# Reasons after which only attaching again helps.
_BROKEN: Final = (
    "deadline",
    "disconnected",
    "closed",
    "not_attached",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Memory of the daemon that is this rank's to fill, until it is committed or given back."""

    step: int
    slot_id: str
    mapping: raw_memory.Mapping
    grant: messages.Reserved


class Session:
    """The session of one rank; for one thread at a time.

    Invariant: a slot that is granted and neither committed nor abandoned is held by exactly one caller. No slot's descriptor
    stays open in a forked child.

    Args:
        connection: An attached connection whose Restore was answered.
        identity: What it was attached with, with the attempt that this world writes.
        lease_s: Of the daemon: how long it may take to answer.
        on_unmap: Called with a slot's mapping before it is unmapped.
    """

    def __init__(
        self,
        connection: DaemonConnection,
        identity: messages.Attach,
        *,
        lease_s: float,
        on_unmap: Callable[[raw_memory.Mapping], None],
    ) -> None:
        self.identity, self.lease_s, self.socket_path = identity, lease_s, connection.socket_path
        self.connection: DaemonConnection | None = connection
        self.stale: StaleGenerationError | None = None  # set for good when another world has taken over
        self._on_unmap = on_unmap
        self._slots: dict[str, tuple[int, raw_memory.Mapping]] = {}
        self._unregister = register_child_cleanup(self._close_in_child)

    # ---- the connection

    @property
    def is_attached(self) -> bool:
        return self.connection is not None

    def attach(self) -> messages.Attached:
        """Attach again; raises as :func:`backstay.session.attach.attach`."""
        try:
            self.connection, attached = attach(self.socket_path, self.identity, connect_s=ATTACH_S, attach_s=ATTACH_S)
        except StaleGenerationError as error:
            self.stale = error
            raise
        self.lease_s = attached.lease_s
        return attached

    def disconnect(self) -> None:
        """Close the connection; also for another thread, whose call ends then. Slots stay mapped."""
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close()

    def call(self, request: Any, deadline_s: float) -> tuple[Any, list[int]]:
        """The reply to one request, and its descriptors, which are the caller's to close.

        Raises:
            UnavailableError: not attached, or no answer in time; the connection is closed where only attaching again helps.
            StaleGenerationError: another world has taken over. BackstayError: as the daemon answered.
        """
        connection = self.connection
        if connection is None:
            raise UnavailableError(f"not attached to the daemon at {self.socket_path}", reason="closed")
        try:
            return connection.call(request, deadline_s=deadline_s)
        except StaleGenerationError as error:
            self.stale = error
            raise
        except UnavailableError as error:
            if error.reason in _BROKEN:
                self.disconnect()
            raise

    def expect(self, request: Any, kind: type[T], deadline_s: float) -> T:
        """As :meth:`call`, for a reply of ``kind`` without descriptors; raises IntegrityError for any other."""
        reply, fds = self.call(request, deadline_s)
        framing.close_fds(fds)
        if not isinstance(reply, kind):
            raise _bad_reply(request, reply)
        return reply

    # ---- one shard

    def reserve(self, step: int, size_bytes: int, *, wait_s: float, is_ahead: bool = False) -> Slot | messages.Skipped:
        """A slot of exactly ``size_bytes`` for ``step``, or the daemon's answer that there is none within ``wait_s``.

        Raises:
            UnavailableError: the slot's memory cannot be mapped (reason :data:`NOT_MAPPED`); or as :meth:`call`.
        """
        self._prune(size_bytes)
        request = messages.Reserve(
            step=step, size_bytes=size_bytes, wait_s=wait_s, known_slots=tuple(self._slots), is_ahead=is_ahead
        )
        reply, fds = self.call(request, wait_s + self.lease_s)
        if isinstance(reply, messages.Reserved):
            mapping = self._map(reply.slot_id, fds, size_bytes)
            return Slot(step=step, slot_id=reply.slot_id, mapping=mapping, grant=reply)
        framing.close_fds(fds)
        if isinstance(reply, messages.Skipped):
            return reply
        raise _bad_reply(request, reply)

    def commit(
        self,
        slot: Slot,
        layout: shard.Layout,
        digests: Digests,
        *,
        layout_signature: str,
        model_signature: str = "",
        unchanged: tuple[UnchangedRange, ...] = (),
        cost: messages.TrainerCost | None = None,
    ) -> messages.Committed:
        """Publish a filled slot as this rank's shard of its step."""
        identity = self.identity
        manifest = shard.build_manifest(
            layout,
            run=identity.run,
            attempt=identity.attempt,
            step=slot.step,
            rank=identity.rank,
            world_size=identity.world_size,
            world_id=identity.world_id,
            chunk_crcs=digests.chunk_crcs,
            tensor_crcs=digests.tensor_crcs,
            unchanged=unchanged,
            model_signature=model_signature,
            layout_signature=layout_signature,
            writer=f"backstay {__version__}, pid {os.getpid()}",
        )
        request = messages.Commit(
            step=slot.step,
            slot_id=slot.slot_id,
            manifest=json_records.to_json(manifest),
            cost=cost or messages.TrainerCost(),
        )
        return self.expect(request, messages.Committed, self.lease_s + COMMIT_S)

    def finish(self, *, keep: bool, timeout_s: float = 30.0) -> None:
        """The run ended well: its memory is freed everywhere, or stays (``keep``) until ``job_ttl_s``."""
        self.expect(messages.Finish(keep=keep), messages.Done, timeout_s)

    def close(self) -> None:
        """Detach and unmap; what is committed stays in memory. Idempotent; no slot may be in use."""
        self._unregister()
        self.disconnect()
        for slot_id in list(self._slots):
            self._unmap(slot_id)

    # ---- slots

    def _map(self, slot_id: str, fds: Sequence[int], size_bytes: int) -> raw_memory.Mapping:
        if fds:
            self._unmap(slot_id)
            try:
                mapping = raw_memory.Mapping(fds[0], is_writable=True, size_bytes=size_bytes)
            except (BackstayError, OSError) as error:
                framing.close_fds(list(fds))
                raise UnavailableError(
                    f"slot {slot_id} cannot be mapped: {error}; this snapshot is skipped", reason=NOT_MAPPED
                ) from error
            framing.close_fds(list(fds[1:]))
            self._slots[slot_id] = (fds[0], mapping)
        found = self._slots.get(slot_id)
        if found is None or found[1].size_bytes != size_bytes:
            raise UnavailableError(
                f"the daemon granted slot {slot_id} without its memory; this snapshot is skipped", reason=NOT_MAPPED
            )
        return found[1]

    def _prune(self, size_bytes: int) -> None:
        """Unmap slots that the daemon deleted or that have another size: a mapping would keep their memory."""
        for slot_id, (fd, mapping) in list(self._slots.items()):
            if os.fstat(fd).st_nlink == 0 or mapping.size_bytes != size_bytes or len(self._slots) > MAX_MAPPINGS:
                self._unmap(slot_id)

    def _unmap(self, slot_id: str) -> None:
        found = self._slots.pop(slot_id, None)
        if found is not None:
            fd, mapping = found
            self._on_unmap(mapping)
            mapping.close()
            os.close(fd)

    def _close_in_child(self) -> None:
        for fd, _ in self._slots.values():
            with contextlib.suppress(OSError):
                os.close(fd)


def _bad_reply(request: object, reply: object) -> IntegrityError:
    return IntegrityError(
        f"the daemon answered {type(request).__name__} with {type(reply).__name__}; not used", reason="bad_reply"
    )
