"""The client of the bulk transport: moves shard and parity bytes between nodes over TCP sockets, plain or TLS.

Answers come into the caller's buffers unverified: whoever uses bytes checks them there. Must not import grpc.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from backstay.errors import ERROR_CLASSES, BackstayError, IntegrityError, UnavailableError
from backstayd.security.credentials import Credentials
from backstayd.store.paths import FragmentRef, ShardRef
from backstayd.store.record_files import MAX_RECORD_BYTES
from backstayd.transport.bulk.tls import connect_channel
from backstayd.transport.bulk.wire import BulkReply, BulkRequest, Channel, Timeouts, enlarge_buffers

R = TypeVar("R")

NOT_READY: Final = "not_ready"
GONE: Final = "gone"
TRUNCATED: Final = "truncated"
BAD_CHUNK: Final = "bad_chunk"
FLIPPED_IN_FLIGHT: Final = "flipped_in_flight"


class BulkClient:
    """One TCP connection to a peer's coders, opened at first use. For one thread; :meth:`abort` may come from another.

    Requests are answered in order, so ``request_...`` may run ahead of ``begin_answer``. After any error but a typed answer the
    connection is closed and the next request opens another.
    """

    def __init__(
        self,
        address: str,
        *,
        timeouts: Timeouts | None = None,
        deadline: float | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        """``deadline``: time.monotonic() after which nothing is begun any more; ``credentials``: None speaks plaintext."""
        self.address = address
        self.timeouts = timeouts or Timeouts()
        self._deadline = deadline
        self._credentials = credentials
        self._channel: Channel | None = None
        self._aborted = threading.Event()

    # -- reading -------------------------------------------------------------------------------------------------------

    def request(self, ref: ShardRef | FragmentRef, *, first_chunk: int, chunk_count: int) -> None:
        """Ask for chunks (0 of a fragment: only its record); :meth:`begin_answer` and :meth:`receive_into` read them."""
        op = "read_shard" if isinstance(ref, ShardRef) else "read_fragment"
        self._send(_request(op, ref, first_chunk=first_chunk, chunk_count=chunk_count))

    def begin_answer(self) -> BulkReply:
        """The next answer in order; its ``payload_bytes`` must be received before the next one.

        Raises:
            SnapshotNotFoundError: the source is gone. IntegrityError: another identity is in its place, or it is truncated.
            UnavailableError: the peer is dead, silent or not ready.
        """
        reply = self._checked(lambda channel: channel.receive_record(BulkReply))
        if reply.reason == BAD_CHUNK:  # right when it left here, wrong when it arrived: nothing at rest is damaged
            raise UnavailableError(f"{self.address}: {reply.message}", reason=FLIPPED_IN_FLIGHT)
        if reply.error_class:
            raise ERROR_CLASSES.get(reply.error_class, UnavailableError)(
                f"{self.address}: {reply.message}", reason=reply.reason
            )
        return reply

    def receive_into(self, view: memoryview) -> None:
        """Fill ``view`` with payload bytes of the current answer."""
        self._checked(lambda channel: channel.receive_into(view))

    def read(self, ref: ShardRef | FragmentRef, *, first_chunk: int, view: memoryview, chunk_count: int) -> None:
        """Read chunks into ``view``, which must have exactly their length."""
        self.request(ref, first_chunk=first_chunk, chunk_count=chunk_count)
        reply = self.begin_answer()
        if reply.payload_bytes != len(view):
            self.close()
            raise IntegrityError(
                f"{self.address} answers {reply.payload_bytes} bytes, not {len(view)}", reason=TRUNCATED
            )
        self.receive_into(view)

    def get_plan(self, ref: FragmentRef) -> bytes:
        """The JSON of a StoredPlan; not verified."""
        self._send(_request("get_plan", ref))
        return self._receive_document()

    def get_manifest(self, ref: ShardRef) -> bytes:
        """The exact bytes of a published manifest; not verified."""
        self._send(_request("get_manifest", ref))
        return self._receive_document()

    # -- writing -------------------------------------------------------------------------------------------------------

    def begin_put_fragment(self, ref: FragmentRef, *, size_bytes: int) -> None:
        """Announce a parity fragment; raises UnavailableError (``not_ready``) until the peer stored the plan."""
        self._send(_request("put_fragment", ref, size_bytes=size_bytes))
        self.begin_answer()

    def begin_renew_fragment(
        self, ref: FragmentRef, *, size_bytes: int, older: FragmentRef, kept: Sequence[range]
    ) -> None:
        """As :meth:`begin_put_fragment`, but the peer takes the chunks ``kept`` from its fragment ``older``."""
        ranges = tuple((one.start, len(one)) for one in kept)
        place = {"older_plan_id": older.plan_id, "older_step": older.key.step}
        self._send(_request("renew_fragment", ref, size_bytes=size_bytes, kept=ranges, **place))
        self.begin_answer()
        self._checked(lambda channel: channel.allow_work(size_bytes))

    def begin_put_shard(self, ref: ShardRef, *, first_chunk: int, chunk_count: int, stripe: int) -> None:
        """Announce a range of a staged shard; raises UnavailableError (``not_ready``) until the peer prepared staging."""
        self._send(_request("put_shard", ref, first_chunk=first_chunk, chunk_count=chunk_count, stripe=stripe))
        self.begin_answer()

    def put_chunk(self, crc: int, pieces: Sequence[memoryview]) -> None:
        """Send the next chunk of the put announced last."""
        if self._channel is None:
            raise UnavailableError(f"{self.address}: the connection was lost", reason="peer_closed")
        try:
            self._channel.send_all([struct.pack(">I", crc), *pieces])
        except UnavailableError as error:
            raise self._refusal() or error from error

    def end_put(self) -> None:
        """Wait until the peer published what was put; raises what it answers."""
        try:
            self.begin_answer()
        except BackstayError:
            self.close()  # the peer ended its side: it does not know where the next request would begin
            raise

    def is_staged(self, ref: ShardRef) -> bool:
        """Whether the peer accepts ranges of this shard now."""
        self._send(_request("is_staged", ref))
        try:
            self.begin_answer()
        except UnavailableError as error:
            if error.reason == NOT_READY:
                return False
            raise
        return True

    # -- the connection ------------------------------------------------------------------------------------------------

    def abort(self) -> None:
        """Make whatever thread uses this client fail soon with UnavailableError; for good."""
        self._aborted.set()
        channel = self._channel
        if channel is not None:
            channel.abort()

    def close(self) -> None:
        """Close the connection; idempotent, the client may be used again."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _receive_document(self) -> bytes:
        reply = self.begin_answer()
        if reply.payload_bytes > MAX_RECORD_BYTES:
            self.close()
            raise IntegrityError(f"{self.address} answers a record of {reply.payload_bytes} bytes", reason="bad_frame")
        data = bytearray(reply.payload_bytes)
        self.receive_into(memoryview(data))
        return bytes(data)

    def _send(self, request: BulkRequest) -> None:
        if self._channel is None:
            self._channel = self._connect()
        self._checked(lambda channel: channel.send_record(request))

    def _checked(self, use: Callable[[Channel], R]) -> R:
        """Run ``use`` on the connection; close it when that fails, since the stream is out of step then."""
        if self._channel is None:
            raise UnavailableError(f"{self.address}: the connection was lost", reason="peer_closed")
        try:
            return use(self._channel)
        except BaseException:
            self.close()
            raise

    def _refusal(self) -> BackstayError | None:
        """What the peer said before it stopped taking bytes, if it can still be read."""
        try:
            self.begin_answer()
        except BackstayError as error:
            if error.reason not in ("peer_closed", "peer_failed", "peer_silent", "peer_slow"):
                return error
        finally:
            self.close()
        return None

    def _connect(self) -> Channel:
        if self._aborted.is_set():
            raise UnavailableError(f"{self.address}: cancelled", reason="cancelled")
        host, _, port = self.address.rpartition(":")
        timeout_s = self.timeouts.connect_s
        if self._deadline is not None:
            timeout_s = min(timeout_s, self._deadline - time.monotonic())
            if timeout_s <= 0:
                raise UnavailableError(f"{self.address}: the deadline has passed", reason="deadline")
        try:
            sock = connect(host.strip("[]"), int(port), timeout_s=timeout_s)
        except (OSError, ValueError) as error:
            raise UnavailableError(f"{self.address} cannot be reached: {error}", reason="unreachable") from error
        if self._credentials is None:
            channel = Channel(sock, name=self.address, timeouts=self.timeouts)
        else:
            channel = connect_channel(sock, self._credentials, name=self.address, timeouts=self.timeouts)
        if self._deadline is not None:
            channel.set_silence_limit(min(self.timeouts.constant_s, max(0.01, self._deadline - time.monotonic())))
        if self._aborted.is_set():
            channel.abort()  # it came while the connection was made
        return channel


def connect(host: str, port: int, *, timeout_s: float) -> socket.socket:
    """A connected TCP socket with a large receive buffer (set before the handshake, for the window scale)."""
    failure: OSError | None = None
    for family, kind, protocol, _name, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            enlarge_buffers(sock)
            sock.settimeout(timeout_s)
            sock.connect(address)
        except OSError as error:
            sock.close()
            failure = error
            continue
        return sock
    raise failure or OSError(f"{host} has no address")


def _request(op: str, ref: ShardRef | FragmentRef, **more: Any) -> BulkRequest:
    if isinstance(ref, ShardRef):
        more |= {"rank": ref.rank, "world_size": ref.world_size, "digest": ref.digest}
    else:
        more |= {"plan_id": ref.plan_id, "stripe": ref.stripe, "index": ref.index}
    return BulkRequest(op=op, run=ref.run, attempt=ref.key.attempt, step=ref.key.step, **more)
