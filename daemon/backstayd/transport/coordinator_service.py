"""The coordinator's gRPC server: streams of reports in, desired state out, and the operator's calls.

Must not decide anything: a backend does. Everything runs in one event loop, so the backend needs no locks.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

import grpc

from backstay.errors import BackstayError, ConfigError, InvariantError
from backstay.format import json_records
from backstayd.change_signal import Signal
from backstayd.core.drain_orders import DrainVerdict
from backstayd.core.messages.desired import NodeDesired
from backstayd.core.messages.report import NodeReport
from backstayd.core.recover.locate import Located
from backstayd.security.credentials import Credentials
from backstayd.security.handshakes import Handshakes
from backstayd.security.refusals import Refusals
from backstayd.transport import convert, delta, errors
from backstayd.transport.access import RoleInterceptor, check_name
from backstayd.transport.audit import Audit
from backstayd.transport.channel import add_port, server_options
from backstayd.transport.node_names import NodeNames
from backstayd.transport.skew import Releases
from backstayd.v1 import coordinator_pb2, coordinator_pb2_grpc, operator_pb2, operator_pb2_grpc

logger = logging.getLogger(__name__)

MAX_AGE_S: Final = 3600.0
Answer = TypeVar("Answer")


class CoordinatorBackend(Protocol):
    """What the server serves. One that does not lead raises NotLeaderError from every method but ``suspect``."""

    def observe(self, report: NodeReport) -> None:
        """Take in a report; must be quick."""

    def suspect(self, node: str, incarnation: str) -> None:
        """The stream of that incarnation of ``node`` ended."""

    def desired(self, node: str) -> NodeDesired:
        """What ``node`` should do now."""

    def status(self, *, is_brief: bool) -> dict[str, Any]:
        """The status document; brief: without what there is of each rank."""

    def forget(self, run: str) -> None:
        """Forget ``run``; raises SnapshotNotFoundError if nobody knows it."""

    def distrust(self, run: str, step: int, reason: str) -> str:
        """Never restore that step again; returns what a restart would do. Raises SnapshotNotFoundError."""

    def trust(self, run: str) -> int:
        """Take back every distrust of ``run``; returns how many. Raises SnapshotNotFoundError."""

    def drain(self, node: str, *, undo: bool) -> DrainVerdict:
        """Have ``node`` drained, or not any more; raises UsageError or UnavailableError."""

    def locate(self, run: str, step: int) -> Located:
        """Where a complete snapshot is; raises SnapshotNotFoundError or UnavailableError."""


class CoordinatorServer:
    """Serves ``backend`` at ``listen`` (``host:port``, port 0: any); :meth:`notify` it when desired state has changed.

    With ``credentials`` callers must show certificates of their role, and connections are cut after ``max_age_s``, so that a
    certificate that was withdrawn meanwhile ends what it began.
    """

    def __init__(
        self,
        listen: str,
        backend: CoordinatorBackend,
        *,
        lease_s: float,
        credentials: Credentials | None = None,
        max_age_s: float = MAX_AGE_S,
    ) -> None:
        self._credentials = credentials
        self._max_age_s = max_age_s
        self._handshakes = Handshakes()
        self._newest: dict[str, _Stream] = {}  # of each node, the stream that began last
        self._names = NodeNames(lease_s=lease_s)
        self._listen = listen
        self._backend = backend
        self._lease_s = lease_s
        self._server: grpc.aio.Server | None = None
        self._releases = Releases()
        self._streams: set[_Stream] = set()

    async def start(self) -> str:
        """Bind and serve; returns the bound ``host:port``. Raises ConfigError if the address cannot be bound."""
        server = self._make_server()
        coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(_CoordinatorServicer(self), server)
        audit = Audit(is_tls=self._credentials is not None)
        operator_pb2_grpc.add_OperatorServiceServicer_to_server(_OperatorServicer(self._backend, audit), server)
        try:
            port = add_port(server, self._listen, self._credentials, self._handshakes)
        except RuntimeError as error:
            await server.stop(grace=None)
            raise ConfigError(
                f"cannot listen on {self._listen}: another process uses it, or it is no address of this machine; choose "
                "another with --listen",
                reason="cannot_listen",
            ) from error
        await server.start()
        self._server = server
        host = self._listen.rpartition(":")[0]
        return f"{host}:{port}"

    def _make_server(self) -> grpc.aio.Server:
        if self._credentials is None:
            return grpc.aio.server(options=server_options(self._lease_s))
        return grpc.aio.server(
            interceptors=[RoleInterceptor(self._credentials.trust_domain, self._handshakes)],
            options=server_options(self._lease_s, max_age_s=self._max_age_s),
        )

    def notify(self) -> None:
        """Desired state may have changed: every stream compares and sends what differs."""
        for stream in self._streams:
            stream.changed.notify()

    async def close(self) -> None:
        """Stop serving; open streams are cut."""
        if self._server is not None:
            await self._server.stop(grace=None)
            self._server = None

    async def sync(self, requests: AsyncIterator[coordinator_pb2.SyncRequest], context: Any) -> None:
        """One node's stream, until either side ends it."""
        stream = _Stream()
        report: NodeReport | None = None
        try:
            async with asyncio.TaskGroup() as group:  # a writer that fails ends the stream
                writer: asyncio.Task[None] | None = None
                async for request in requests:
                    report = self._read(request, report, stream, context)
                    stream.takes_deltas, stream.number = request.takes_deltas, request.number
                    self._names.claim(report.node, stream, asyncio.get_running_loop().time())
                    self._backend.observe(report)
                    stream.is_due = True  # each report is answered, so that neither side needs a clock for the other
                    stream.changed.notify()
                    if writer is None:
                        self._streams.add(stream)
                        self._newest[report.node.name] = stream
                        writer = group.create_task(self._write(report.node.name, stream, context))
                if writer is not None:
                    writer.cancel()
        finally:
            self._names.leave(stream)
            self._streams.discard(stream)
            self._releases.leave(stream)
            if report is not None and self._newest.get(report.node.name) is stream:  # a node may replace its stream
                del self._newest[report.node.name]
                self._backend.suspect(report.node.name, report.node.incarnation)

    def _read(
        self, request: coordinator_pb2.SyncRequest, last: NodeReport | None, stream: _Stream, context: Any
    ) -> NodeReport:
        """The whole report; the last one itself if nothing changed. Raises for a node that may not say this."""
        if request.HasField("delta"):
            report = delta.read(request.report, request.delta, last)
        else:
            report = convert.from_message(NodeReport, request.report)
        if report is not last:
            if self._credentials is not None:
                check_name(context, self._credentials.trust_domain, report.node.name)
            self._releases.admit(stream, report.node)
        return report

    async def _write(self, node: str, stream: _Stream, context: Any) -> None:
        last: NodeDesired | None = None
        seen = 0
        while True:
            await stream.changed.wait(self._lease_s, since=seen)
            seen = stream.changed.count
            desired = self._backend.desired(node)
            if stream.is_due or (desired is not last and desired != last):
                stream.is_due = False
                answer = _response(desired, last if stream.takes_deltas else None, answers=stream.number)
                await self._finish(context.write(answer))
                last = desired

    async def _finish(self, write: Awaitable[None]) -> None:
        """Write to the end, for a lease at most, even when the stream is being cut: gRPC cannot send its status before."""
        writing = asyncio.ensure_future(write)
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            ended, _ = await asyncio.wait({writing}, timeout=self._lease_s)
            for task in ended:
                if not task.cancelled():
                    task.exception()  # the other side has gone: an exception that nobody reads is logged with its trace
            raise


@dataclass(slots=True, eq=False)
class _Stream:
    """One node's stream: notify ``changed`` to have desired state compared."""

    changed: Signal = field(default_factory=Signal)
    takes_deltas: bool = False
    number: int = 0  # of the newest request
    is_due: bool = False  # an answer, changed or not: the heartbeat


def _response(desired: NodeDesired, last: NodeDesired | None, *, answers: int = 0) -> coordinator_pb2.SyncResponse:
    """What changed since ``last``, which the node has; the whole without it."""
    response = coordinator_pb2.SyncResponse(takes_deltas=True, answers=answers)
    if last is None:
        convert.fill_fields(desired, response.desired)
    else:
        response.delta.CopyFrom(delta.write(desired, last, response.desired))
    return response


class _CoordinatorServicer(coordinator_pb2_grpc.CoordinatorServiceServicer):
    def __init__(self, server: CoordinatorServer) -> None:
        self._server = server
        self._refusals = Refusals(logger)

    async def Sync(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        error: BackstayError | None = None
        try:
            await self._server.sync(request_iterator, context)
        except* BackstayError as group:
            error = _first_of(group)
        except* Exception as group:  # noqa: BLE001 - the boundary of a stream: logged below
            if not context.done():
                cause = _first_of(group)
                error = InvariantError(f"the coordinator made a mistake: {cause!r}")
                text = f"a mistake in serving a node's stream ({cause!r}); it is cut, and the node connects anew"
                self._refusals.note(text, cause=repr(type(cause)), level=logging.ERROR, error=cause)
        if error is None:
            return
        if isinstance(error, errors.NotLeaderError):
            logger.debug("a node's stream was refused: %s", error)
        elif not isinstance(error, InvariantError):
            self._refusals.note(f"a node's stream: {error}", cause=f"{_host_of(context)} {error.reason}")
        if not context.done():
            await _abort(context, error)  # not within except*, which would wrap gRPC's own exception and have it logged


class _OperatorServicer(operator_pb2_grpc.OperatorServiceServicer):
    def __init__(self, backend: CoordinatorBackend, audit: Audit) -> None:
        self._backend = backend
        self._audit = audit

    async def GetStatus(self, request: Any, context: Any) -> operator_pb2.GetStatusResponse:
        document = await self._do(context, "GetStatus", "", lambda: self._backend.status(is_brief=request.is_brief))
        return operator_pb2.GetStatusResponse(document_json=json.dumps(document))

    async def Forget(self, request: Any, context: Any) -> operator_pb2.ForgetResponse:
        await self._do(context, "Forget", request.run, lambda: self._backend.forget(request.run))
        return operator_pb2.ForgetResponse()

    async def Distrust(self, request: Any, context: Any) -> operator_pb2.DistrustResponse:
        about = f"{request.run} step {request.step} ({request.reason})"
        message = await self._do(
            context, "Distrust", about, lambda: self._backend.distrust(request.run, request.step, request.reason)
        )
        return operator_pb2.DistrustResponse(message=message)

    async def Trust(self, request: Any, context: Any) -> operator_pb2.TrustResponse:
        count = await self._do(context, "Trust", request.run, lambda: self._backend.trust(request.run))
        return operator_pb2.TrustResponse(count=count)

    async def Drain(self, request: Any, context: Any) -> operator_pb2.DrainResponse:
        about = f"{request.node}{' undone' if request.undo else ''}"
        verdict = await self._do(context, "Drain", about, lambda: self._backend.drain(request.node, undo=request.undo))
        return operator_pb2.DrainResponse(state=verdict.state.value, reason=verdict.reason)

    async def Locate(self, request: Any, context: Any) -> operator_pb2.LocateResponse:
        located = await self._do(
            context, "Locate", request.run, lambda: self._backend.locate(request.run, request.step)
        )
        return operator_pb2.LocateResponse(document_json=json_records.dumps(located).decode())

    async def _do(self, context: Any, verb: str, about: str, call: Callable[[], Answer]) -> Answer:
        """What ``call`` answers; an error of it ends the call. Either way there is a line about it."""
        try:
            answer = call()
        except BackstayError as error:
            self._audit.note(context, verb, about, error=error)
            await _abort(context, error)
            raise  # not reached: abort raises
        self._audit.note(context, verb, about)
        return answer


def _first_of(group: BaseExceptionGroup[Any]) -> Any:
    """The first of the exceptions that are no groups themselves."""
    first = group.exceptions[0]
    return _first_of(first) if isinstance(first, BaseExceptionGroup) else first


def _host_of(context: Any) -> str:
    """Where the caller is, without its port."""
    return str(context.peer()).rpartition(":")[0]


async def _abort(context: Any, error: BackstayError) -> None:
    told = [(errors.REASON_KEY, error.reason)]
    if isinstance(error, errors.NotLeaderError) and error.leader:
        told.append((errors.LEADER_KEY, error.leader))
    await context.abort(errors.code_of(error), str(error), trailing_metadata=tuple(told))
