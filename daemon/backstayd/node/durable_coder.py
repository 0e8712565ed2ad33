"""The coder that talks to durable storage: one process, started with its first job. Must not know what the jobs do.

A store that hangs holds up only this process; it alone loads what stores need, and its uploads share one bandwidth cap.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Final

from backstay.errors import UnavailableError
from backstayd.coder.jobs import CoderEvent, Job, JobResult
from backstayd.coder.pool import CoderPool
from backstayd.config.schema import NodeConfig
from backstayd.security.credentials import Credentials

NICENESS: Final = 10  # below the coders that protect, which are below the trainers


class StorageCoder:
    """Runs storage jobs. ``on_event`` hears what the coder says; set it before the first job."""

    def __init__(
        self,
        config: NodeConfig,
        incarnation: str,
        bulk: socket.socket,
        on_result: Callable[[Job, JobResult, float], None],
        *,
        credentials: Credentials | None,
    ) -> None:
        self.on_event: Callable[[CoderEvent], None] = lambda event: None
        self._pool = CoderPool(
            count=1,
            memory_dir=config.memory_dir,
            incarnation=incarnation,
            listen_socket=bulk,
            on_event=self._hear,
            on_result=on_result,
            niceness=NICENESS,
            is_for_storage=True,
            credentials=credentials,
        )
        self._start = asyncio.Lock()
        self._is_started = False
        self._warming: asyncio.Task[None] | None = None

    def _hear(self, event: CoderEvent) -> None:
        self.on_event(event)

    async def run(self, job: Job) -> JobResult:
        """As ``CoderPool.run``."""
        try:
            await self._be_ready()
        except OSError as error:
            message = f"cannot start the coder for durable storage: {error}"
            return JobResult(job_id=0, error_class=UnavailableError.__name__, reason="coder_died", message=message)
        return await self._pool.run(job)

    def warm_up(self) -> None:
        """Start the coder before it is needed: a world that restores waits for its first job."""
        if self._warming is None:
            self._warming = asyncio.create_task(self._be_ready(), name="storage-coder")

    async def close(self) -> None:
        if self._warming is not None:
            await asyncio.gather(self._warming, return_exceptions=True)
        if self._is_started:
            await self._pool.close()

    async def _be_ready(self) -> None:
        async with self._start:
            if not self._is_started:
                await self._pool.start()
                self._is_started = True
