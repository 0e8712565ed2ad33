"""The supervisor's side of the coder processes: starts them, hands them jobs, hears their results, restarts the dead.

Runs on the supervisor's event loop and touches no bulk bytes. Holds no state that matters: a job whose coder died answers
UnavailableError and is asked again by a supervisor that is level-triggered.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from backstay.errors import BackstayError, UnavailableError
from backstay.format import json_records
from backstayd.coder.jobs import Answer, CoderEvent, Job, JobResult, Request, job_request
from backstayd.security.credentials import Credentials
from backstayd.telemetry import logs

logger = logging.getLogger(__name__)

# A job line carries a plan: bounded by members x shards, never by bytes of state.
MAX_LINE_BYTES: Final = 64 * 1024 * 1024
FIRST_BACKOFF_S: Final = 0.1
LAST_BACKOFF_S: Final = 5.0
GRACE_S: Final = 2.0  # over a job's own deadline before its coder is taken for hung, and for a coder to end by itself


@dataclass(slots=True)
class _Coder:
    """One process and the jobs it has; ``pending`` is empty whenever ``is_alive`` is false."""

    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    pending: dict[int, asyncio.Future[JobResult]] = field(default_factory=dict)
    is_alive: bool = True


class CoderPool:
    """``count`` coder processes that share the bulk listening socket.

    Args:
        count: Processes to keep alive.
        memory_dir: The node's tmpfs directory.
        incarnation: Of this daemon; part of every temporary name.
        listen_socket: Bound and listening TCP socket of the bulk transport; every coder accepts on it.
        on_event: Called on the event loop for everything a coder stored; must not block.
        on_result: Called with every job that ended, its result and the seconds it took, the wait for a coder included.
        niceness: Added to the coders' nice value, so that trainers come first.
        jobs_per_coder: Jobs one coder runs at a time; the rest wait here.
        extra_environment: Added to the coders' environment (fault points in tests).
        credentials: What the coders speak TLS with; None: they speak plaintext.
        is_for_storage: The coders serve no peers, and one that hangs (in a file system that does not answer) is killed.
    """

    def __init__(
        self,
        *,
        count: int,
        memory_dir: Path,
        incarnation: str,
        listen_socket: socket.socket,
        on_event: Callable[[CoderEvent], None] | None = None,
        on_result: Callable[[Job, JobResult, float], None] | None = None,
        niceness: int = 5,
        jobs_per_coder: int = 8,
        extra_environment: dict[str, str] | None = None,
        is_for_storage: bool = False,
        credentials: Credentials | None = None,
    ) -> None:
        self._count = max(1, count)
        self._memory_dir = memory_dir
        self._incarnation = incarnation
        self._listen_socket = listen_socket
        self._on_event = on_event or (lambda event: None)
        self._on_result = on_result or (lambda job, result, seconds: None)
        self._niceness = niceness
        self._jobs_per_coder = jobs_per_coder
        self._extra_environment = extra_environment or {}
        self._is_for_storage = is_for_storage
        self._credentials = credentials
        self._coders: dict[int, _Coder] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._changed = asyncio.Condition()
        self._ids = itertools.count(1)
        self._closing = asyncio.Event()
        self.restart_count = 0

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the coders alive now."""
        return tuple(coder.process.pid for coder in self._coders.values() if coder.is_alive)

    @property
    def failure(self) -> str:
        """What keeps dead coders from being replaced, for people; "" while each is alive or being started again."""
        for place, keeper in enumerate(list(self._keepers)):
            if keeper.done() and not self._closing.is_set():
                return f"coder {place} would not be started again: {keeper.exception()!r}"
        return ""

    async def start(self) -> None:
        """Start all coders; returns when each has been spawned. Raises OSError when one cannot be."""
        for place in range(self._count):
            self._coders[place] = await self._spawn()
        self._keepers = [asyncio.create_task(self._keep(place)) for place in range(self._count)]

    async def run(self, job: Job) -> JobResult:
        """Run ``job`` on a coder and return its result; failures are results too, this raises only CancelledError.

        Cancelling the awaiting task cancels the job in the coder. Bounded by the job's own ``deadline_s``.
        """
        begin_s = asyncio.get_running_loop().time()
        result = await self._run(job)
        self._on_result(job, result, asyncio.get_running_loop().time() - begin_s)
        return result

    async def _run(self, job: Job) -> JobResult:
        job_id = next(self._ids)
        deadline = asyncio.get_running_loop().time() + job.deadline_s
        try:
            async with asyncio.timeout_at(deadline):
                coder, future = await self._assign(job_id)
        except TimeoutError:
            return _failed(
                job_id, "deadline", f"no coder was free for {type(job).__name__} within {job.deadline_s:.1f} s"
            )
        try:
            coder.writer.write(job_request(job_id, job))
            async with asyncio.timeout_at(deadline + GRACE_S):
                return await asyncio.shield(future)
        except TimeoutError:
            self._cancel(coder, job_id)
            if self._is_for_storage:
                coder.process.kill()
            return _failed(job_id, "deadline", f"{type(job).__name__} did not end within its {job.deadline_s:.1f} s")
        except asyncio.CancelledError:
            self._cancel(coder, job_id)
            raise
        finally:
            coder.pending.pop(job_id, None)
            async with self._changed:
                self._changed.notify_all()

    async def close(self) -> None:
        """End all coders (politely, then SIGKILL) and reap them. Jobs that run answer UnavailableError. Idempotent."""
        self._closing.set()
        for coder in self._coders.values():
            coder.writer.close()  # end of file tells a coder to end
        if self._keepers:
            await asyncio.wait(self._keepers, timeout=GRACE_S)
        for coder in self._coders.values():
            if coder.process.returncode is None:
                coder.process.kill()
            await coder.process.wait()
            coder.writer.close()
        await asyncio.gather(*self._keepers)
        self._keepers = []
        async with self._changed:
            self._changed.notify_all()

    async def _assign(self, job_id: int) -> tuple[_Coder, asyncio.Future[JobResult]]:
        """Wait for the least busy live coder with room and register the job there."""
        async with self._changed:
            while True:
                if self._closing.is_set():
                    raise TimeoutError
                free = [c for c in self._coders.values() if c.is_alive and len(c.pending) < self._jobs_per_coder]
                if free:
                    coder = min(free, key=lambda c: len(c.pending))
                    future: asyncio.Future[JobResult] = asyncio.get_running_loop().create_future()
                    coder.pending[job_id] = future
                    return coder, future
                await self._changed.wait()

    def _cancel(self, coder: _Coder, job_id: int) -> None:
        if coder.is_alive and not coder.writer.is_closing():
            coder.writer.write(json_records.dumps(Request(job_id=job_id, kind="cancel")) + b"\n")

    async def _keep(self, place: int) -> None:
        """Read one coder's answers until it dies, then start another after a bounded, growing pause."""
        backoff_s = FIRST_BACKOFF_S
        while not self._closing.is_set():
            coder = self._coders[place]
            started = asyncio.get_running_loop().time()
            await self._listen(coder)
            await self._bury(coder)
            if asyncio.get_running_loop().time() - started > LAST_BACKOFF_S:
                backoff_s = FIRST_BACKOFF_S
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), backoff_s)
            backoff_s = min(2 * backoff_s, LAST_BACKOFF_S)
            await self._respawn(place)

    async def _respawn(self, place: int) -> None:
        """Put a new coder at ``place``; a failure is logged and tried again after the next pause."""
        if self._closing.is_set():
            return
        try:
            self._coders[place] = await self._spawn()
        except OSError as error:
            logger.error("cannot start a coder: %s; trying again", error)
            return
        self.restart_count += 1
        async with self._changed:
            self._changed.notify_all()

    async def _listen(self, coder: _Coder) -> None:
        while True:
            try:
                line = await coder.reader.readline()
                if not line:
                    return
                answer = json_records.loads(Answer, line)
            except OSError:
                return  # it died
            except (ValueError, BackstayError) as error:
                logger.error("coder %d sent an invalid answer (%s); stopping it", coder.process.pid, error)
                return
            if answer.event is not None:
                self._announce(answer.event)
            if answer.result is not None:
                future = coder.pending.get(answer.result.job_id)
                if future is not None and not future.done():
                    future.set_result(answer.result)

    def _announce(self, event: CoderEvent) -> None:
        try:
            self._on_event(event)
        except Exception:  # the listener's mistake must not end the coder
            logger.exception("failed to handle a coder event: %s", event)

    async def _bury(self, coder: _Coder) -> None:
        """Reap a dead coder, answer its jobs, remove its temporary files."""
        coder.is_alive = False
        if not self._closing.is_set() and coder.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                coder.process.kill()
        status = await coder.process.wait()
        coder.writer.close()
        pid = coder.process.pid
        if not self._closing.is_set():
            logger.warning("coder %d ended with status %d and %d jobs; restarting it", pid, status, len(coder.pending))
        for job_id, future in coder.pending.items():
            if not future.done():
                future.set_result(
                    _failed(job_id, "coder_died", f"the coder process {pid} ended; the job is asked again")
                )
        pattern = f"*.{pid}-*.{self._incarnation}.tmp"
        await asyncio.to_thread(_remove_matching, self._memory_dir, pattern)

    async def _spawn(self) -> _Coder:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            listen_fd = self._listen_socket.fileno()
            level, form, component = logs.in_force()
            command = [
                sys.executable, "-m", "backstayd.coder",
                "--control-fd", str(theirs.fileno()), "--listen-fd", str(listen_fd),
                "--memory-dir", str(self._memory_dir), "--incarnation", self._incarnation,
                "--parent", str(os.getpid()), "--nice", str(self._niceness), "--jobs", str(self._jobs_per_coder),
                *(["--jobs-only"] if self._is_for_storage else []), *_tls_arguments(self._credentials),
                "--log-level", level, "--log-format", form, "--component", component,
            ]  # fmt: skip
            try:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), listen_fd),
                    env=os.environ | _ALLOCATOR | self._extra_environment,
                )
            except BaseException:
                ours.close()
                raise
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=MAX_LINE_BYTES)
        return _Coder(process, reader, writer)


def _tls_arguments(credentials: Credentials | None) -> list[str]:
    if credentials is None:
        return []
    files = credentials.files
    return [
        "--tls-cert", str(files.cert), "--tls-key", str(files.key), "--tls-ca", str(files.ca),
        "--trust-domain", credentials.trust_domain, "--node", credentials.name,
    ]  # fmt: skip


# The codec allocates its fragments per window: memory given back to the kernel after each would be faulted in again.
_ALLOCATOR: Final = {"MALLOC_TRIM_THRESHOLD_": str(64 << 20), "MALLOC_MMAP_THRESHOLD_": str(64 << 20)}


def _failed(job_id: int, reason: str, message: str) -> JobResult:
    return JobResult(job_id=job_id, error_class=UnavailableError.__name__, reason=reason, message=message)


def _remove_matching(directory: Path, pattern: str) -> None:
    for path in directory.rglob(pattern):
        path.unlink(missing_ok=True)
