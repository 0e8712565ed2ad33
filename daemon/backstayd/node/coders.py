"""The coder processes of a node: those for memory and peers, and one more for durable storage. Knows jobs, not what they do.

A store that hangs holds up only the storage coder; it alone loads what stores need, and its uploads share one bandwidth cap.
"""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import Callable
from typing import Final

from backstay.errors import UnavailableError
from backstayd.coder.jobs import CoderEvent, Job, JobResult, uses_storage
from backstayd.coder.pool import CoderPool
from backstayd.config.schema import NodeConfig
from backstayd.security.credentials import Credentials

STORAGE_NICENESS: Final = 10  # below the coders that protect, which are below the trainers


class Coders:
    """Runs each job in the coder process that it needs.

    Args:
        bulk: The listening socket of the bulk transport, shared by all coders that serve peers.
        on_event: Called for everything a coder stored; must not block.
        on_result: Called with every job that ended, its result and its seconds.
    """

    def __init__(
        self,
        config: NodeConfig,
        *,
        incarnation: str,
        bulk: socket.socket,
        on_event: Callable[[CoderEvent], None],
        on_result: Callable[[Job, JobResult, float], None],
        credentials: Credentials | None,
    ) -> None:
        make = functools.partial(
            CoderPool,
            memory_dir=config.memory_dir,
            incarnation=incarnation,
            listen_socket=bulk,
            on_event=on_event,
            on_result=on_result,
            credentials=credentials,
        )
        self.pool = make(count=config.coders)
        self._storage = make(count=1, niceness=STORAGE_NICENESS, is_for_storage=True)
        self._storage_start = asyncio.Lock()
        self._is_storage_started = False
        self._warming: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start those for memory and peers. Raises OSError when one cannot be started."""
        await self.pool.start()

    async def run(self, job: Job) -> JobResult:
        """Run ``job`` on the coder that it needs; as ``CoderPool.run``."""
        if not uses_storage(job):
            return await self.pool.run(job)
        try:
            await self._start_storage()
        except OSError as error:
            message = f"cannot start the coder for durable storage: {error}"
            return JobResult(job_id=0, error_class=UnavailableError.__name__, reason="coder_died", message=message)
        return await self._storage.run(job)

    def warm_up_storage(self) -> None:
        """Start the storage coder before it is needed: a world that restores waits for its first job."""
        if self._warming is None:
            self._warming = asyncio.create_task(self._start_storage(), name="storage-coder")

    async def close(self) -> None:
        if self._warming is not None:
            await asyncio.gather(self._warming, return_exceptions=True)
        if self._is_storage_started:
            await self._storage.close()
        await self.pool.close()

    async def _start_storage(self) -> None:
        async with self._storage_start:
            if not self._is_storage_started:
                await self._storage.start()
                self._is_storage_started = True
