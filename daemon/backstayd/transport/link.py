"""A node's line to the coordinator: reports up, desired state down, reconnecting for as long as the node lives.

Where there are several coordinators it finds the one that leads. Must not interpret what it carries. A lost message costs
one heartbeat: everything is sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

import grpc

from backstay.errors import BackstayError
from backstayd.addresses import split_address
from backstayd.change_signal import Signal
from backstayd.clock import boot_s
from backstayd.core.messages.desired import NodeDesired
from backstayd.core.messages.report import NodeReport
from backstayd.security import probe
from backstayd.security.credentials import Credentials
from backstayd.transport import convert, delta, errors
from backstayd.transport.address_book import AddressBook, Resolver, Target
from backstayd.transport.channel import MAX_MESSAGE_BYTES, open_channel
from backstayd.v1 import coordinator_pb2, coordinator_pb2_grpc

logger = logging.getLogger(__name__)

COALESCE_S = 0.01  # reports at most this often
RENEW_S = 1800.0  # a connection over TLS is replaced after so long, well before the coordinator cuts it
RENEW_AGAIN_S = 30.0  # when the coordinator took none with a new certificate
PROBE_AGAIN_S = 30.0
MAX_PROBED = 16
MAX_REPORT_BYTES = MAX_MESSAGE_BYTES * 3 // 4
LEFT_OUT_S = 60.0  # so long a run that makes the report too large is not in it; then it is tried again
MAX_UNANSWERED = 1000


@dataclass(slots=True, kw_only=True)
class LinkState:
    """Which coordinator the node is or was last connected to, and, while to none, what each address answered."""

    address: str = ""
    error: str = ""
    is_connected: bool = False


class CoordinatorLink:
    """One bidirectional stream at a time; everything runs in the loop that :meth:`start` was called in.

    Args:
        addresses: ``host:port`` of the coordinator, or several separated by commas; a name may stand for several machines.
        report: Called for each report that is sent; must be quick.
        on_desired: Called with each answer (each is a heartbeat as well); must be quick and must not raise.
        lease_s: The coordinator is lost after this long without an answer; reports go out at least each sixth of it.
        on_state: Called with True when the first answer of a connection arrived and with False when it is lost.
        credentials: None speaks plaintext. When they change, the connection is replaced by one that uses them.
        renew_s: The same happens after so long, so that a certificate that was withdrawn does not work for ever.
        state: Kept up to date for others to read.
        changed: Notified when the report changed and should be sent soon.
    """

    def __init__(
        self,
        addresses: str,
        *,
        report: Callable[[], NodeReport],
        on_desired: Callable[[NodeDesired], None],
        lease_s: float,
        on_state: Callable[[bool], None] | None = None,
        credentials: Credentials | None = None,
        renew_s: float = RENEW_S,
        state: LinkState | None = None,
        changed: Signal | None = None,
    ) -> None:
        self.state = state or LinkState()
        self.answered_s = float("-inf")  # since boot: when the newest report that was answered was sent
        self._book = AddressBook(addresses)
        self._resolver = Resolver()
        self._report = report
        self._on_desired = on_desired
        self._lease_s = lease_s
        self._on_state = on_state
        self._credentials = credentials
        self._renew_s = renew_s
        self._probed: dict[str, tuple[float, str]] = {}
        self._is_connected = False
        self._changed = changed or Signal()
        self._task: asyncio.Task[None] | None = None
        self._is_closing = False

    @property
    def is_connected(self) -> bool:
        """Whether an answer came within the last lease."""
        return self._is_connected

    @property
    def address(self) -> str:
        return self.state.address

    @property
    def last_error(self) -> str:
        """Why none is connected, for people: what each answered."""
        return self.state.error

    def failure(self) -> str:
        """What keeps it from ever connecting again, for people; "" while it goes on. From any thread."""
        task = self._task
        return "it ended by itself" if task is not None and task.done() and not self._is_closing else ""

    def start(self) -> None:
        """Begin connecting, in the running loop."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="coordinator-link")

    def notify(self) -> None:
        """The report changed: send it soon (several calls within 10 ms make one report)."""
        self._changed.notify()

    async def close(self) -> None:
        """Stop; returns when nothing of the link is left."""
        if self._task is not None:
            self._is_closing = True
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        self._set_connected(False)

    async def _run(self) -> None:
        shortest = min(0.05, self._lease_s / 3)
        backoff_s = shortest
        while True:
            if self._book.is_round_over:
                resolved = await self._resolver.resolve(self._book.names(), timeout_s=self._lease_s)
                self._book.begin_round(resolved)
            target = self._book.next()
            was_connected = await self._try(target)
            if was_connected:
                backoff_s = shortest
            elif self._book.is_round_over:
                backoff_s = min(backoff_s * 2, self._lease_s / 3)
            await asyncio.sleep(backoff_s if self._book.is_round_over else shortest)

    async def _try(self, target: Target) -> bool:
        """One connection for as long as it holds; whether there was an answer at all."""
        was_connected, patience_s = False, self._patience_s()
        try:
            await self._connect_once(target, patience_s)
        except TimeoutError:
            was_connected = self._is_connected
            silence_s = self._lease_s if was_connected else patience_s
            self._note(target, f"coordinator {target.address} was silent for {silence_s:g} s")
        except grpc.RpcError as error:
            was_connected = self._is_connected
            told = errors.error_of(error, asked=f"coordinator {target.address}")
            text = await self._explain(target) if errors.is_nobodys_answer(error) and not was_connected else ""
            leader = told.leader if isinstance(told, errors.NotLeaderError) else ""
            self._note(target, text or str(told), leader=leader)
        except (BackstayError, OSError) as error:
            was_connected = self._is_connected
            self._note(target, f"coordinator {target.address}: {error}")
        except asyncio.CancelledError:  # ours, or gRPC's own way to say that the stream was torn down
            if self._is_closing:
                raise
            was_connected = self._is_connected
            self._note(target, f"coordinator {target.address}: the stream was cancelled")
        except Exception:
            logger.exception("unexpected error while reporting or applying orders; reconnecting")
        self._set_connected(False)
        return was_connected

    async def _explain(self, target: Target) -> str:
        """What gRPC does not say: whether it is TLS that keeps us apart; "" when it is not. Looked at now and then."""
        now = asyncio.get_running_loop().time()
        probed_s, text = self._probed.get(target.address, (-PROBE_AGAIN_S, ""))
        if now - probed_s >= PROBE_AGAIN_S:
            host, port = split_address(target.address)
            found = await asyncio.to_thread(probe.diagnose, host, port, self._credentials)
            text = f"coordinator {found}" if found is not None else ""
            self._probed = dict(list(self._probed.items())[-MAX_PROBED:]) | {target.address: (now, text)}
        return text

    def _patience_s(self) -> float:
        """How long the first answer may take: less where there are others, so that a dead machine does not hide them."""
        return self._lease_s if self._book.count == 1 else self._lease_s / 2

    async def _connect_once(self, target: Target, patience_s: float) -> None:
        async with contextlib.AsyncExitStack() as stack:
            line = await stack.enter_async_context(self._open(target))
            while True:
                limit_s = self._lease_s if self._is_connected else patience_s
                self._take(target, line, await line.read(limit_s))
                if self._is_due(line):
                    line = await self._renew(line, target, stack)

    async def _renew(self, line: _Line, target: Target, stack: contextlib.AsyncExitStack) -> _Line:
        """Another line with the newest certificate; ``line`` goes on, until it is old, if the coordinator takes no such one.

        Raises what was against it if ``line`` is old.
        """
        try:
            return await self._replace(target, stack)
        except (TimeoutError, grpc.RpcError, BackstayError, OSError) as error:
            now = asyncio.get_running_loop().time()
            if now - line.began_s >= self._renew_s:
                raise
            line.renew_again_s = now + RENEW_AGAIN_S
            text = await self._explain(target) or repr(error)
            logger.warning(
                "cannot connect with the new certificate, keeping the connection of the previous one: %s", text
            )
            return line

    async def _replace(self, target: Target, stack: contextlib.AsyncExitStack) -> _Line:
        """A second line; that of ``stack`` ends once the new one has been answered: the node is never without."""
        async with contextlib.AsyncExitStack() as fresh:
            new = await fresh.enter_async_context(self._open(target))
            self._take(target, new, await new.read(self._lease_s))
            await stack.aclose()
            await stack.enter_async_context(fresh.pop_all())
        logger.info("the connection to the coordinator at %s was made anew", target.address)
        return new

    def _take(self, target: Target, line: _Line, desired: NodeDesired) -> None:
        self.answered_s = max(self.answered_s, line.answered_s)
        if not self._is_connected:
            self.state.address = target.address
            self._book.found(target)
            self._set_connected(True)
        self._on_desired(desired)

    def _is_due(self, line: _Line) -> bool:
        if self._credentials is None:
            return False
        now = asyncio.get_running_loop().time()
        is_renewed = self._credentials.current().number != line.number and now >= line.renew_again_s
        return is_renewed or now - line.began_s >= self._renew_s

    @contextlib.asynccontextmanager
    async def _open(self, target: Target) -> AsyncIterator[_Line]:
        number = self._credentials.current().number if self._credentials is not None else 0
        async with open_channel(target.address, lease_s=self._lease_s, credentials=self._credentials) as channel:
            words = _Words()
            call = coordinator_pb2_grpc.CoordinatorServiceStub(channel).Sync(self._reports(words))
            try:
                yield _Line(call, words, number=number, began_s=asyncio.get_running_loop().time())
            finally:
                call.cancel()

    async def _reports(self, words: _Words) -> AsyncIterator[coordinator_pb2.SyncRequest]:
        while True:
            seen = self._changed.count
            yield self._make_request(words)
            await asyncio.sleep(COALESCE_S)
            await self._changed.wait(self._lease_s / 6 - COALESCE_S, since=seen)

    def _make_request(self, words: _Words) -> coordinator_pb2.SyncRequest:
        try:
            return words.write(self._report())
        except Exception:  # gRPC would turn it into a bare cancellation of the stream
            logger.exception("the report could not be made")
            raise

    def _set_connected(self, is_connected: bool) -> None:
        if is_connected != self._is_connected:
            self._is_connected = self.state.is_connected = is_connected
            if is_connected:
                self.state.error = ""
                logger.info("connected to the coordinator at %s", self.address)
            if self._on_state is not None:
                self._on_state(is_connected)

    def _note(self, target: Target, text: str, *, leader: str = "") -> None:
        level = logging.WARNING if self._is_connected or not self.state.error else logging.DEBUG
        what = "lost the coordinator" if self._is_connected else "no coordinator yet"
        logger.log(level, "%s, trying again: %s", what, text)
        self._book.note(target, text, leader=leader)
        self.state.error = self._book.summary()


class _Line:
    """One stream: its call, which certificate it was opened with (``number``), and since when it stands."""

    def __init__(self, call: Any, words: _Words, *, number: int, began_s: float) -> None:
        self._call = call
        self._words = words
        self.number = number
        self.began_s = began_s
        self.renew_again_s = 0.0

    @property
    def answered_s(self) -> float:
        """When the newest report was sent that the last answer knew of."""
        return self._words.answered_s

    async def read(self, limit_s: float) -> NodeDesired:
        async with asyncio.timeout(limit_s):
            response = await self._call.read()
        if not isinstance(response, coordinator_pb2.SyncResponse):
            raise ConnectionError("the coordinator closed the stream")
        return self._words.read(response)


class _Words:
    """What one stream has carried so far: each side leaves out what the other has. A new stream knows of nothing."""

    def __init__(self) -> None:
        self._takes_deltas = False  # the coordinator at the other end
        self._sent: NodeReport | None = None
        self._desired: NodeDesired | None = None
        self._count = 0
        self._sent_s: dict[int, float] = {}  # requests that no answer knew of yet: when they were written
        self.answered_s = float("-inf")
        self._left_out: dict[str, float] = {}  # runs that made a report too large, and until when

    def write(self, report: NodeReport, *, limit_bytes: int = MAX_REPORT_BYTES) -> coordinator_pb2.SyncRequest:
        """What changed since the report before; a bare heartbeat if nothing did (its number counts no change).

        A report over ``limit_bytes``, which the coordinator would refuse, loses its largest run, never the node.
        """
        now_s = time.monotonic()
        self._left_out = {run: until_s for run, until_s in self._left_out.items() if until_s > now_s}
        while True:
            if self._left_out:
                report = replace(report, runs=tuple(run for run in report.runs if run.run not in self._left_out))
            last = self._sent if self._takes_deltas else None
            if last is not None and replace(report, sequence=last.sequence) == last:
                report = last
            request = _request(report, last)
            if request.ByteSize() <= limit_bytes or not request.report.runs:
                self._sent = report
                request.number = self._number()
                return request
            largest = max(request.report.runs, key=lambda run: run.ByteSize())
            logger.error(
                "run %s: its report is %d bytes, over the limit of %d; omitting it for %g s, so the coordinator sees nothing "
                "of this run on this node",
                largest.run, largest.ByteSize(), limit_bytes, LEFT_OUT_S,
            )  # fmt: skip
            self._left_out[largest.run] = now_s + LEFT_OUT_S

    def read(self, response: coordinator_pb2.SyncResponse) -> NodeDesired:
        """The whole answer; raises IntegrityError for a change of nothing."""
        self._takes_deltas = response.takes_deltas
        self._note_answer(response.answers)
        if response.HasField("delta"):
            self._desired = delta.read(response.desired, response.delta, self._desired)
        else:
            self._desired = convert.from_message(NodeDesired, response.desired)
        return self._desired

    def _number(self) -> int:
        """Of a request that is written now."""
        self._count += 1
        if len(self._sent_s) >= MAX_UNANSWERED:
            del self._sent_s[next(iter(self._sent_s))]
        self._sent_s[self._count] = boot_s()
        return self._count

    def _note_answer(self, number: int) -> None:
        """What an answer says was so when the request ``number`` arrived, and not before that was sent.

        An answer can lie in a buffer for as long as this process is frozen: when it is read says nothing. A coordinator of
        an older release does not tell the number.
        """
        sent_s = self._sent_s.get(number, float("-inf")) if number else boot_s()
        self.answered_s = max(self.answered_s, sent_s)
        for old in [known for known in self._sent_s if known <= number]:
            del self._sent_s[old]


def _request(report: NodeReport, last: NodeReport | None) -> coordinator_pb2.SyncRequest:
    """What differs from ``last``, which the other side has; all of it without one."""
    request = coordinator_pb2.SyncRequest(takes_deltas=True)
    if last is None:
        convert.fill_fields(report, request.report)
    else:
        request.delta.CopyFrom(delta.write(report, last, request.report))
    return request
