"""A snapshot of a run, opened when something of it is read: a visit, a connection of its own that needs no world.

Must not decide what to restore, and must not write.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

import torch

from backstay.errors import IntegrityError, UnavailableError
from backstay.protocol import framing, messages
from backstay.protocol.connection import DaemonConnection
from backstay.restore.snapshot import OpenedSnapshot, ReadTarget

T = TypeVar("T")
OPEN_DEADLINE_S: Final = 120.0
ASK_DEADLINE_S: Final = 30.0
RETRY_S: Final = 0.3
READ_DEADLINE_S: Final = 1e6  # each fetch is bounded by the daemon, and by its silence


class Source:
    """One snapshot of a run; thread-safe.

    Args:
        snapshot_id: What was decided; a visit of anything else is refused. "": whatever the daemon has of that step.
    """

    def __init__(self, *, run: str, step: int, socket_path: str, snapshot_id: str = "") -> None:
        self.run, self.step, self._snapshot_id = run, step, snapshot_id
        self._socket_path = socket_path
        self._opened: OpenedSnapshot | None = None
        self._connection: DaemonConnection | None = None
        self._lock = threading.RLock()

    def read(self, work: Callable[[OpenedSnapshot], T]) -> T:
        """Do ``work`` with the open snapshot; a visit that broke is made anew once."""
        with self._lock:
            is_fresh = self._opened is None
            try:
                return work(self._open())
            except UnavailableError:
                if is_fresh or self._connection is None:
                    raise
                self.close()
                return work(self._open())

    def read_bytes(self, name: str) -> bytearray:
        """One stored uint8 tensor."""

        def work(opened: OpenedSnapshot) -> bytearray:
            data = bytearray(opened.tensor(name).shape[0])
            if data:
                opened.read([ReadTarget(name=name, tensor=torch.frombuffer(data, dtype=torch.uint8), offsets=(0,))])
            return data

        return self.read(work)

    def close(self) -> None:
        """Let go of descriptors and connection. Idempotent; reading opens again."""
        with self._lock:
            if self._opened is not None:
                self._opened.close()
            if self._connection is not None:
                self._connection.close()
            self._opened = self._connection = None

    def _open(self) -> OpenedSnapshot:
        """Open it, and wait a while for shards that are being rebuilt."""
        deadline = time.monotonic() + OPEN_DEADLINE_S
        while self._opened is None:
            connection = DaemonConnection(self._socket_path, timeout_s=ASK_DEADLINE_S)
            try:
                self._opened = self._visit(connection)
                self._connection = connection
            except UnavailableError:
                connection.close()
                if time.monotonic() + RETRY_S > deadline:
                    raise
                threading.Event().wait(RETRY_S)
            except BaseException:
                connection.close()
                raise
        return self._opened

    def _visit(self, connection: DaemonConnection) -> OpenedSnapshot:
        offer, fds = connection.call(messages.Open(run=self.run, step=self.step), deadline_s=ASK_DEADLINE_S)
        framing.close_fds(fds)
        if not isinstance(offer, messages.Offer) or (offer.step != self.step and self.step):
            raise IntegrityError(
                f"{self.run}: step {self.step} was asked for, the daemon answered {type(offer).__name__}; not used",
                reason="bad_reply",
            )
        if self._snapshot_id not in ("", offer.snapshot_id):
            raise IntegrityError(
                f"{self.run}: step {self.step} in memory is not the snapshot that was decided; nothing was loaded",
                reason="wrong_identity",
            )
        deadline = time.monotonic() + READ_DEADLINE_S
        return OpenedSnapshot.from_offer(connection, offer, run=self.run, deadline=deadline, on_progress=lambda _: None)
