"""A snapshot of a run, opened at the first read, over a connection of its own that needs no world.

Must not decide what to restore, and must not write.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

import torch

from backstay.errors import IntegrityError, UnavailableError
from backstay.protocol.connection import DaemonConnection
from backstay.restore.snapshot import OpenedSnapshot, ReadTarget
from backstay.session.attach import ignore, retry

T = TypeVar("T")
OPEN_DEADLINE_S: Final = 120.0
ASK_DEADLINE_S: Final = 30.0
RETRY_S: Final = 0.3
READ_DEADLINE_S: Final = 1e6  # each fetch is bounded by the daemon, and by its silence


class SnapshotReader:
    """One snapshot of a run; thread-safe.

    Args:
        snapshot_id: The decided snapshot; any other is refused. "": whatever the daemon has of that step.
    """

    def __init__(self, *, run: str, step: int, socket_path: str, snapshot_id: str = "") -> None:
        self.run, self.step, self._snapshot_id = run, step, snapshot_id
        self._socket_path = socket_path
        self._opened: OpenedSnapshot | None = None
        self._connection: DaemonConnection | None = None
        self._lock = threading.RLock()

    def read(self, work: Callable[[OpenedSnapshot], T]) -> T:
        """Do ``work`` with the open snapshot; if its connection breaks, open it again once."""
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
        if self._opened is None:
            deadline = time.monotonic() + OPEN_DEADLINE_S
            self._connection, self._opened = retry(
                lambda _: self._visit(), deadline=deadline, pause_s=RETRY_S, is_passing=_is_passing
            )
        return self._opened

    def _visit(self) -> tuple[DaemonConnection, OpenedSnapshot]:
        connection = DaemonConnection(self._socket_path, timeout_s=ASK_DEADLINE_S)
        try:
            offer = connection.open(self.run, self.step, deadline_s=ASK_DEADLINE_S)
            if self._snapshot_id not in ("", offer.snapshot_id):
                raise IntegrityError(
                    f"{self.run}: step {self.step} in memory is not the snapshot that was decided; nothing was loaded",
                    reason="wrong_identity",
                )
            deadline = time.monotonic() + READ_DEADLINE_S
            opened = OpenedSnapshot.from_offer(connection, offer, run=self.run, deadline=deadline, on_progress=ignore)
        except BaseException:
            connection.close()
            raise
        return connection, opened


def _is_passing(error: Exception) -> bool:
    """A snapshot that cannot be read yet; where no daemon listens, the caller is not kept waiting."""
    return isinstance(error, UnavailableError) and error.reason != "no_daemon"
