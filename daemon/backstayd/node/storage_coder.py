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
from backstayd.config import NodeConfig

NICENESS: Final = 10  # below the coders that protect, which are below the trainers


class StorageCoder:
    """Runs storage jobs. ``on_event`` hears what the coder says; set it before the first job."""

    def __init__(self, config: NodeConfig, incarnation: str, bulk: socket.socket) -> None:
        self.on_event: Callable[[CoderEvent], None] = lambda event: None
        self._pool = CoderPool(
            count=1,
            memory_dir=config.memory_dir,
            incarnation=incarnation,
            listen_socket=bulk,
            on_event=self._hear,
            niceness=NICENESS,
            is_for_storage=True,
        )
        self._start = asyncio.Lock()
        self._is_started = False

    def _hear(self, event: CoderEvent) -> None:
        self.on_event(event)

    async def run(self, job: Job) -> JobResult:
        """As ``CoderPool.run``."""
        async with self._start:
            if not self._is_started:
                try:
                    await self._pool.start()
                except OSError as error:
                    message = f"cannot start the coder for durable storage: {error}"
                    return JobResult(
                        job_id=0, error_class=UnavailableError.__name__, reason="coder_died", message=message
                    )
                self._is_started = True
        return await self._pool.run(job)

    async def close(self) -> None:
        if self._is_started:
            await self._pool.close()
