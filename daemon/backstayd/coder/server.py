"""A coder process: serves bulk peers and runs jobs in threads, until its daemon closes the control socket.

Stateless: everything it produces is files. Must not decide anything: what to do comes in jobs, what exists is said in events.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from backstay.errors import BackstayError, InvariantError
from backstay.format import json_records
from backstayd.coder.bulk_server import BulkServer
from backstayd.coder.context import JobContext
from backstayd.coder.durable.shared_changes import run_check, run_mark, run_prune, run_record
from backstayd.coder.durable.upload import run_survey, run_upload
from backstayd.coder.jobs import (
    Answer,
    CheckUploaded,
    CoderEvent,
    DecodeStripe,
    EncodeStripe,
    FetchChunks,
    FetchManifests,
    FetchPlan,
    FetchShard,
    Job,
    JobResult,
    MarkSnapshot,
    PruneSnapshot,
    Request,
    SurveyStorage,
    UploadShard,
    VerifyFragment,
    VerifyShard,
    WriteRecord,
    parse_job,
)
from backstayd.coder.parity.encode import run_encode
from backstayd.coder.parity.rebuild import run_decode
from backstayd.coder.parity.stored_plans import run_fetch_plan
from backstayd.coder.transfer.fetch import run_fetch, run_fetch_chunks, run_fetch_manifests
from backstayd.coder.transfer.verify import run_verify_fragment, run_verify_shard
from backstayd.security.credentials import Credentials

logger = logging.getLogger(__name__)

END_S: Final = 1.0  # for running jobs to remove their temporary files once the daemon has gone


class CoderServer:
    """One coder process's life. ``control`` is the socket to the supervisor, ``listen`` the shared bulk socket."""

    def __init__(
        self,
        control: socket.socket,
        listen: socket.socket,
        *,
        memory_dir: Path,
        incarnation: str,
        job_count: int,
        credentials: Credentials | None = None,
    ) -> None:
        self._control = control
        self._memory_dir = memory_dir
        self._incarnation = incarnation
        self._jobs = ThreadPoolExecutor(max_workers=job_count, thread_name_prefix="job")
        self._running: dict[int, JobContext] = {}
        self._lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._credentials = credentials
        self._bulk = BulkServer(
            listen, memory_dir=memory_dir, incarnation=incarnation, on_event=self._emit, credentials=credentials
        )

    def run(self, *, is_serving: bool = True) -> None:
        """Serve until the control socket ends. Then cancels what runs and returns within about END_S."""
        if is_serving:
            threading.Thread(target=self._bulk.serve, daemon=True, name="bulk-accept").start()
        with contextlib.suppress(OSError), self._control.makefile("rb") as lines:
            for line in lines:
                self._take(line)
        self._end()

    def _take(self, line: bytes) -> None:
        request = json_records.loads(Request, line)
        if request.kind == "cancel":
            with self._lock:
                context = self._running.get(request.job_id)
            if context is not None:
                context.cancel()
            return
        try:
            job = parse_job(request)
        except BackstayError as error:
            self._answer(Answer(result=_failure(request.job_id, error)))
            return
        context = JobContext(
            memory_dir=self._memory_dir,
            incarnation=self._incarnation,
            deadline_s=job.deadline_s,
            emit=self._emit,
            credentials=self._credentials,
        )
        with self._lock:
            self._running[request.job_id] = context
        self._jobs.submit(self._run_job, request.job_id, job, context)

    def _run_job(self, job_id: int, job: Job, context: JobContext) -> None:
        try:
            context.check()
            _RUNNERS[type(job)](context, job)
            result = JobResult(job_id=job_id)
        except BackstayError as error:
            result = _failure(job_id, error)
        except Exception as error:
            logger.exception("job %s failed", type(job).__name__)
            result = _failure(job_id, InvariantError(f"{type(job).__name__}: {error!r}"))
        finally:
            context.close()
            with self._lock:
                self._running.pop(job_id, None)
        result = replace(
            result,
            corrupt=tuple(context.corrupt),
            done_bytes=context.done_bytes,
            flipped_in_flight=context.flipped_in_flight,
            seconds=dict(context.seconds),
            moved=dict(context.moved),
            survey=context.survey,
            persisted=context.persisted,
            file_id=context.file_id,
        )
        self._answer(Answer(result=result))

    def _emit(self, event: CoderEvent) -> None:
        self._answer(Answer(event=event))

    def _answer(self, answer: Answer) -> None:
        with self._write_lock, contextlib.suppress(OSError):  # a daemon that has gone hears nothing
            self._control.sendall(json_records.dumps(answer) + b"\n")

    def _end(self) -> None:
        with self._lock:
            contexts = list(self._running.values())
        for context in contexts:
            context.cancel()
        self._bulk.close()
        ender = threading.Thread(target=self._jobs.shutdown, kwargs={"cancel_futures": True}, daemon=True)
        ender.start()
        ender.join(END_S)


_RUNNERS: Final[dict[type[Job], Callable[[JobContext, Any], None]]] = {
    EncodeStripe: run_encode,
    FetchPlan: run_fetch_plan,
    DecodeStripe: run_decode,
    FetchShard: run_fetch,
    FetchManifests: run_fetch_manifests,
    FetchChunks: run_fetch_chunks,
    VerifyShard: run_verify_shard,
    VerifyFragment: run_verify_fragment,
    SurveyStorage: run_survey,
    UploadShard: run_upload,
    CheckUploaded: run_check,
    WriteRecord: run_record,
    PruneSnapshot: run_prune,
    MarkSnapshot: run_mark,
}


def _failure(job_id: int, error: BackstayError) -> JobResult:
    cls = next(c for c in type(error).__mro__ if c.__module__ == "backstay.errors")
    return JobResult(job_id=job_id, error_class=cls.__name__, reason=error.reason, message=str(error))


def serve(
    *,
    control_fd: int,
    listen_fd: int,
    memory_dir: Path,
    incarnation: str,
    job_count: int,
    credentials: Credentials | None = None,
    is_serving: bool = True,
) -> None:
    """Run a coder on inherited descriptors; never returns."""
    control = socket.socket(fileno=control_fd)
    listen = socket.socket(fileno=listen_fd)
    server = CoderServer(
        control,
        listen,
        memory_dir=memory_dir,
        incarnation=incarnation,
        job_count=job_count,
        credentials=credentials,
    )
    server.run(is_serving=is_serving)
    os._exit(0)  # connection threads may be blocked in the kernel; nothing of theirs is worth waiting for
