"""A session for tools that bring their own bytes: for any thread, attached again by itself, with steps that are sealed.

Must not be used together with a Snapshotter of the same run in one process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from backstay._version import __version__
from backstay.capture.fill import Filler
from backstay.errors import BackstayError, CapacityError, UnavailableError, UsageError
from backstay.format import shard
from backstay.protocol import messages
from backstay.protocol.connection import DaemonConnection
from backstay.restore.decision import await_decision
from backstay.session.attach import RETRY_S
from backstay.session.progress import announce
from backstay.session.session import ATTACH_S, MAX_REASON, Session, Slot
from backstay.stores.fill_bytes import fill
from backstay.stores.snapshot_reader import SnapshotReader
from backstay.trainer import argument_checks
from backstay.trainer.process_group import World

POLL_S: Final = 0.2  # one request at a time: a longer one would hold up the others of this process
BY_CHUNKS: Final = "by-chunks"  # the layout of no shard: this reader is always offered chunks, never given whole shards
_REPEATABLE: Final = (messages.Reserve, messages.Seal, messages.AwaitSeal)


class StoreSession(Session):
    """One rank's session; thread-safe. Attaches again when the connection broke, and repeats what may be repeated."""

    def __init__(self, connection: DaemonConnection, identity: messages.Attach, *, lease_s: float) -> None:
        self.filler = Filler(rank=identity.rank)
        super().__init__(connection, identity, lease_s=lease_s, on_unmap=self.filler.forget)
        self._sealed_step = 0
        self._is_closed = False
        self._pid = os.getpid()
        self._lock = threading.RLock()

    @property
    def place(self) -> World:
        return World(rank=self.identity.rank, size=self.identity.world_size)

    def attach(self) -> messages.Attached:
        attached = super().attach()
        if self._sealed_step and self.connection is not None:
            try:
                self.connection.call(messages.Seal(step=self._sealed_step), deadline_s=ATTACH_S)
            except BaseException:
                self.disconnect()
                raise
        return attached

    def call(self, request: Any, deadline_s: float) -> tuple[Any, list[int]]:
        with self._lock:
            if self._is_closed:
                raise UsageError("this store was closed; make another one", reason="closed")
            if self.stale is not None:
                raise self.stale
            is_fresh = not self.is_attached
            if is_fresh:
                self.attach()
            try:
                return super().call(request, deadline_s)
            except UnavailableError:
                if is_fresh or self.is_attached or not isinstance(request, _REPEATABLE):
                    raise
            self.attach()
            return super().call(request, deadline_s)

    # ---- one shard

    def grant(self, step: int, size_bytes: int, *, wait_s: float) -> Slot:
        """A slot of exactly ``size_bytes`` for ``step``.

        Raises:
            CapacityError: none came free within ``wait_s``, or the memory does not hold one; the step is skipped.
        """
        with self._lock:
            found = self.reserve(step, size_bytes, wait_s=wait_s)
        if isinstance(found, messages.Skipped):
            raise CapacityError(f"step {step} is not kept in memory: {found.reason}", reason="no_slot")
        return found

    def write(
        self, step: int, layout: shard.Layout, sources: Mapping[str, torch.Tensor], *, kind: str, wait_s: float
    ) -> None:
        """Fill a slot with ``sources`` (by name) and commit it as this rank's shard of ``step``.

        Args:
            kind: The shard's layout in its manifest.
        """
        slot = self.grant(step, layout.size_bytes, wait_s=wait_s)
        digests = fill(self.filler, slot.mapping, layout, sources, step=step)
        self.commit(slot, layout, digests, layout_signature=kind)

    def abandon(self, step: int, reason: str, *, slot: Slot | None = None) -> None:
        """Report that this rank will have no shard of ``step``; what cannot be reported now, the daemon learns by itself."""
        request = messages.Abandon(step=step, slot_id=slot.slot_id if slot else "", reason=reason[:MAX_REASON])
        with contextlib.suppress(BackstayError):
            self.expect(request, messages.Done, self.lease_s)

    # ---- the world's steps

    def seal(self, step: int) -> None:
        """Declare ``step`` whole: every rank of the world commits its part."""
        self._sealed_step = max(self._sealed_step, step)
        self.expect(messages.Seal(step=step), messages.Done, self.lease_s)

    def await_seal(self, after_step: int, *, wait_s: float = POLL_S) -> messages.Sealed:
        """The newest sealed step; waits up to ``wait_s`` for one after ``after_step``."""
        request = messages.AwaitSeal(after_step=after_step, wait_s=wait_s)
        return self.expect(request, messages.Sealed, wait_s + self.lease_s)

    def complete_step(self, *, awaited: int = 0, wait_s: float = 0.0) -> int:
        """The newest complete step of this history; waits up to ``wait_s`` for step ``awaited``."""
        request = messages.AwaitSeal(after_step=1 << 62, wait_s=wait_s, complete_step=awaited)
        return self.expect(request, messages.Sealed, wait_s + self.lease_s).complete_step

    def wait_complete(self, step: int, timeout_s: float) -> bool:
        """Wait until every rank's shard of ``step`` (or of a later one) is held; False at the end of the time."""
        deadline = time.monotonic() + argument_checks.seconds_of("timeout_s", timeout_s)
        while True:
            left_s = deadline - time.monotonic()
            try:
                if self.complete_step(awaited=step, wait_s=max(0.0, min(POLL_S, left_s))) >= step:
                    return True
            except UnavailableError:
                time.sleep(max(0.0, min(RETRY_S, left_s)))
            if time.monotonic() >= deadline:
                return False

    def close(self) -> None:
        """Detach and unmap; what is committed stays in memory. Idempotent; nothing in a forked child."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                super().close()
                self.filler.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """One rank in its world: the session it writes by, and the snapshot it begins from (None: a new run)."""

    session: StoreSession
    source: SnapshotReader | None
    restored: messages.Restored


def begin(run: str, place: World, world_id: str, *, socket_path: str, allow_fresh: bool, deadline_s: float) -> Begun:
    """Join the world of a run. Nothing of its snapshot is fetched: it is read when the tool asks for it.

    Raises:
        UnavailableError: no daemon, or not all ranks in time. UnrecoverableError: a known run without a restorable snapshot.
    """
    identity = messages.Attach(
        run=run, world_id=world_id, rank=place.rank, world_size=place.size, layout=BY_CHUNKS,
        collective_timeout_s=place.collective_timeout_s, client_version=__version__,
    )  # fmt: skip
    deadline_s = argument_checks.seconds_of("deadline_s", deadline_s)
    decision = await_decision(socket_path, identity, None, allow_fresh=allow_fresh, deadline_s=deadline_s)
    restored = decision.restored
    session = StoreSession(
        decision.connection, dataclasses.replace(identity, attempt=restored.attempt), lease_s=decision.attached.lease_s
    )
    source = None
    if restored.outcome != "NONE":
        source = SnapshotReader(run=run, step=restored.step, socket_path=socket_path, snapshot_id=restored.snapshot_id)
    announce(run, restored, rank=place.rank)
    return Begun(session=session, source=source, restored=restored)
