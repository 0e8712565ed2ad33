"""What every coder job carries: its deadline, its way to be cancelled, its connections and what it found out.

Must not know what the job does.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from backstay.errors import IntegrityError, UnavailableError
from backstayd.coder.jobs import CoderEvent, Corrupt
from backstayd.core.messages.durable import PersistedSnapshot, Survey
from backstayd.security.credentials import Credentials
from backstayd.store.paths import FragmentRef, RunPaths, ShardRef
from backstayd.transport.bulk.client import BulkClient
from backstayd.transport.bulk.wire import Timeouts

logger = logging.getLogger(__name__)


class CorruptSourceError(IntegrityError):
    """A source that is still published failed verification twice; ``corrupt`` names it."""

    def __init__(self, corrupt: Corrupt) -> None:
        super().__init__(f"{corrupt} on {corrupt.node or 'this node'} is corrupt: {corrupt.detail}", reason="corrupt")
        self.corrupt = corrupt


class JobContext:
    """State of one running job. Used by the job's thread; ``cancel`` may be called from any."""

    def __init__(
        self,
        *,
        memory_dir: Path,
        incarnation: str,
        deadline_s: float,
        emit: Callable[[CoderEvent], None],
        timeouts: Timeouts | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        self.memory_dir = memory_dir
        self.incarnation = incarnation
        self.emit = emit
        self.deadline = time.monotonic() + deadline_s
        self.corrupt: list[Corrupt] = []
        self.flipped_in_flight = 0
        self.done_bytes = 0
        self.seconds: dict[str, float] = defaultdict(float)
        self.moved: dict[str, int] = defaultdict(int)
        self.survey: Survey | None = None
        self.persisted: PersistedSnapshot | None = None
        self.file_id = ""
        self._timeouts = timeouts or Timeouts()
        self._credentials = credentials
        self._deadline_s = deadline_s
        self._cancelled = threading.Event()
        self._clients: set[BulkClient] = set()
        self._lock = threading.Lock()

    def paths(self, run: str) -> RunPaths:
        return RunPaths(self.memory_dir, run)

    def check(self) -> None:
        """Raise UnavailableError once the job is cancelled or past its deadline; called per chunk."""
        if self._cancelled.is_set():
            raise UnavailableError("the job was cancelled", reason="cancelled")
        if time.monotonic() > self.deadline:
            raise UnavailableError(f"the job did not end within its {self._deadline_s:.1f} s", reason="deadline")

    def wait(self, seconds: float) -> None:
        """Pause before trying a peer again; raises as :meth:`check`."""
        self._cancelled.wait(max(0.0, min(seconds, self.deadline - time.monotonic())))
        self.check()

    def cancel(self) -> None:
        """Make the job end soon: wakes whatever it is blocked on."""
        self._cancelled.set()
        with self._lock:
            for client in self._clients:
                client.abort()

    def client(self, address: str) -> BulkClient:
        """A connection that dies with the job."""
        client = BulkClient(address, timeouts=self._timeouts, deadline=self.deadline, credentials=self._credentials)
        with self._lock:
            self._clients.add(client)
        self.check()
        return client

    def release(self, client: BulkClient) -> None:
        client.close()
        with self._lock:
            self._clients.discard(client)

    def close(self) -> None:
        """Close every connection still open."""
        with self._lock:
            clients, self._clients = self._clients, set()
        for client in clients:
            client.close()

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the time spent inside to ``seconds[what]``."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[what] += time.perf_counter() - begin

    def blame(
        self, ref: ShardRef | FragmentRef, *, node: str = "", url: str = "", detail: str, is_misfit: bool = False
    ) -> CorruptSourceError:
        """Note a corrupt source, whose holder will hear from the coordinator, and return the error to raise.

        Args:
            node: Bulk address of the holder; "" is this node.
            url: In place of it, where on durable storage it lies.
            is_misfit: It is parity whose digests are right: its holder would find nothing.
        """
        about = {"shard": ref} if isinstance(ref, ShardRef) else {"fragment": ref}
        corrupt = Corrupt(node=url or node, detail=detail, is_misfit=is_misfit, **about)
        self.corrupt.append(corrupt)
        error = CorruptSourceError(corrupt)
        if not url:
            logger.warning("%s", error)
        return error
