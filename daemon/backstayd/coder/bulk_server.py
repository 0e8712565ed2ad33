"""The serving side of the bulk transport, inside a coder process: sends published bytes, takes in verified ones.

One bounded thread per connection. Serves nothing that is not published under the digest asked for, stores nothing that it
did not verify in its own buffer. Must not import grpc.
"""

from __future__ import annotations

import logging
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from crc32c import crc32c

from backstay import __version__
from backstay.errors import (
    BackstayError,
    ConfigError,
    IntegrityError,
    UnavailableError,
    UsageError,
)
from backstay.format import versions
from backstay.format.manifest import CHUNK_BYTES
from backstayd.coder.jobs import CoderEvent
from backstayd.coder.parity.reuse import OlderFragment
from backstayd.security.connection_limits import Places
from backstayd.security.credentials import Credentials
from backstayd.security.refusals import Refusals
from backstayd.store.fragments import FragmentWriter
from backstayd.store.paths import RunPaths
from backstayd.store.published import find_manifest, open_fragment, open_shard
from backstayd.store.record_files import read_small
from backstayd.store.staging import StagedShard
from backstayd.transport.bulk.tls import accept_channel
from backstayd.transport.bulk.wire import CRC_BYTES, BulkReply, BulkRequest, Channel, Timeouts, enlarge_buffers

logger = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 128
IDLE_S: Final = 60.0  # a client that asks nothing for so long is cut
DRAIN_S: Final = 2.0  # for a refused put: time to let the sender read why
MAX_FRAGMENT_BYTES: Final = 1 << 44
TRAFFIC_S: Final = 1.0  # how often the daemon is told of it


class _Traffic:
    """Bytes that peers read and put since they were last told of. Used by all connection threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sent = self._received = 0
        self._told_s = time.monotonic()

    def add(self, *, sent: int = 0, received: int = 0) -> None:
        with self._lock:
            self._sent += sent
            self._received += received

    def take_due(self) -> CoderEvent | None:
        """What to tell now; None if there is nothing, or something was told just now."""
        if time.monotonic() - self._told_s < TRAFFIC_S or not (self._sent or self._received):
            return None
        with self._lock:
            event = CoderEvent(kind="traffic", sent_bytes=self._sent, received_bytes=self._received)
            self._sent = self._received = 0
            self._told_s = time.monotonic()
        return event


class BulkServer:
    """Accepts on a listening socket that sibling processes share.

    Args:
        on_event: Called from connection threads for everything stored; must be thread-safe.
        credentials: None speaks plaintext, with everybody.
    """

    def __init__(
        self,
        listen_socket: socket.socket,
        *,
        memory_dir: Path,
        incarnation: str,
        on_event: Callable[[CoderEvent], None],
        timeouts: Timeouts | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        self._credentials = credentials
        self._refusals = Refusals(logger)
        self._listen = listen_socket
        self._memory_dir = memory_dir
        self._incarnation = incarnation
        self._on_event = on_event
        self._timeouts = timeouts or Timeouts()
        self._places = Places(MAX_CONNECTIONS)
        self._channels: set[Channel] = set()
        self._lock = threading.Lock()
        self._traffic = _Traffic()
        self._is_closing = False

    def serve(self) -> None:
        """Accept until :meth:`close`; at most MAX_CONNECTIONS at a time, of which those that ask nothing give way."""
        poll = select.poll()
        poll.register(self._listen, select.POLLIN)
        while not self._is_closing:
            if (traffic := self._traffic.take_due()) is not None:
                self._on_event(traffic)
            if not poll.poll(200):
                continue
            try:
                sock, peer = self._listen.accept()
            except OSError:  # a sibling was faster, or the peer has gone
                continue
            if not self._places.take(sock, str(peer[0])):  # all are in mid-transfer: the peer tries again
                self._refusals.note(
                    f"{peer[0]}: {MAX_CONNECTIONS} transfers are under way, or no file can be opened; it is cut"
                )
                sock.close()
                continue
            threading.Thread(target=self._connection, args=(sock, str(peer[0])), daemon=True, name="bulk").start()

    def close(self) -> None:
        """Stop accepting and cut every connection; idempotent."""
        self._is_closing = True
        with self._lock:
            for channel in self._channels:
                channel.abort()

    def _connection(self, sock: socket.socket, peer: str) -> None:
        try:
            with sock:
                try:
                    self._serve_peer(sock, peer)
                finally:
                    self._places.leave(sock)
        except Exception:
            logger.exception("serving %s failed", peer)

    def _serve_peer(self, sock: socket.socket, peer: str) -> None:
        try:
            enlarge_buffers(sock)
            channel = self._open(sock, peer)
        except (OSError, UnavailableError) as error:
            if isinstance(error, UnavailableError):
                self._refusals.note(str(error))
            return
        with self._lock:
            self._channels.add(channel)
        try:
            while not self._is_closing and self._one_request(sock, channel):
                self._places.set_busy(sock, is_busy=False)
        finally:
            with self._lock:
                self._channels.discard(channel)
            channel.close()

    def _open(self, sock: socket.socket, peer: str) -> Channel:
        if self._credentials is None:
            return Channel(sock, name=peer, timeouts=self._timeouts)
        try:
            return accept_channel(sock, self._credentials, name=peer, timeouts=self._timeouts)
        except UnavailableError as error:
            if error.reason == "plaintext":  # it can be told in its own language
                channel = Channel(sock, name=peer, timeouts=self._timeouts)
                message = "TLS is spoken here; set tls_cert, tls_key and tls_ca on this side as well"
                channel.send_record(BulkReply(error_class="UnavailableError", reason="tls_required", message=message))
                channel.drop_incoming(DRAIN_S)
            raise

    def _one_request(self, sock: socket.socket, channel: Channel) -> bool:
        """Answer one request; whether the connection is still in step."""
        channel.set_silence_limit(IDLE_S)
        try:
            request = channel.receive_record(BulkRequest)
        except UnavailableError:
            return False
        except IntegrityError as error:
            self._refusals.note(f"{channel.name}: {error}; the connection is cut")
            return False
        self._places.set_busy(sock, is_busy=True)
        channel.set_silence_limit(self._timeouts.constant_s)
        exchange = _Exchange(self._memory_dir, self._incarnation, channel, request, self._on_event)
        try:
            _check_protocol(request, channel.name)
            exchange.run()
            self._traffic.add(sent=exchange.sent_bytes, received=exchange.received_bytes)
        except UnavailableError as error:
            if error.reason != "not_ready":
                logger.debug("%s: %s of %s ended: %s", channel.name, request.op, request.run, error)
                return False
            exchange.refuse(error)
        except BackstayError as error:
            logger.info("%s: %s of %s refused: %s", channel.name, request.op, request.run, error)
            exchange.refuse(error)
        return not exchange.is_out_of_step


def _check_protocol(request: BulkRequest, peer: str) -> None:
    own = versions.Side(name="this node", release=__version__, protocol=versions.BULK_PROTOCOL)
    problem = versions.why_apart(own, versions.Side(name=f"the peer at {peer}", protocol=request.protocol))
    if problem:
        raise ConfigError(problem, reason="bad_protocol")


class _Exchange:
    """One request and its answer. ``is_out_of_step``: bytes of this exchange are left on the connection."""

    def __init__(
        self,
        memory_dir: Path,
        incarnation: str,
        channel: Channel,
        request: BulkRequest,
        announce: Callable[[CoderEvent], None],
    ) -> None:
        self._incarnation = incarnation
        self._channel = channel
        self._request = request
        self._paths = RunPaths(memory_dir, request.run)
        self._announce = announce
        self.sent_bytes = self.received_bytes = 0
        self.is_out_of_step = False

    def run(self) -> None:
        """Do what the request asks. Raises the error to be answered, or UnavailableError for a lost connection."""
        self._check_request()
        operations: dict[str, Callable[[], None]] = {
            "read_shard": self._read_shard,
            "read_fragment": self._read_fragment,
            "get_plan": self._get_plan,
            "get_manifest": self._get_manifest,
            "put_fragment": self._put_fragment,
            "renew_fragment": self._renew_fragment,
            "put_shard": self._put_shard,
            "is_staged": self._is_staged,
        }
        operation = operations.get(self._request.op)
        if operation is None:
            raise UsageError(f"unknown bulk operation {self._request.op!r}", reason="unknown_operation")
        operation()

    def refuse(self, error: BackstayError) -> None:
        """Answer ``error``; when the sender is in the middle of a put, give it a moment to read it."""
        try:
            self._channel.send_record(
                BulkReply(error_class=type(error).__name__, reason=error.reason, message=str(error)[:2000])
            )
            if self.is_out_of_step:
                self._channel.drop_incoming(DRAIN_S)
        except UnavailableError:
            self.is_out_of_step = True

    def _check_request(self) -> None:
        request = self._request
        _ = self._paths.root  # checks both names
        digits = set("0123456789abcdef")
        if not (
            set(request.digest) <= digits
            and len(request.digest) in (0, 64)
            and set(request.plan_id) <= digits
            and len(request.plan_id) in (0, 32)
            and set(request.older_plan_id) <= digits
            and len(request.older_plan_id) in (0, 32)
            and 0 <= request.older_step < 1 << 48
            and min(request.attempt, request.step, request.first_chunk, request.chunk_count, request.size_bytes) >= 0
            and max(request.attempt, request.step, request.first_chunk, request.chunk_count) < 1 << 48
            and request.size_bytes <= MAX_FRAGMENT_BYTES
            and max(request.rank, request.world_size, request.stripe, request.index) < 1 << 24
        ):
            raise UsageError(f"malformed {request.op} request", reason="bad_request")

    # -- sending -------------------------------------------------------------------------------------------------------

    def _read_shard(self) -> None:
        with open_shard(self._paths, self._request.shard) as (fd, chunks):
            self._send_range(fd, size_bytes=chunks.size_bytes, chunk_crcs="")

    def _read_fragment(self) -> None:
        request = self._request
        with open_fragment(self._paths, request.fragment) as (fd, stored):
            first = 8 * request.first_chunk
            crcs = stored.chunk_crcs[first : first + 8 * request.chunk_count]
            self._send_range(fd, size_bytes=stored.size_bytes, chunk_crcs=crcs)

    def _send_range(self, fd: int, *, size_bytes: int, chunk_crcs: str) -> None:
        request = self._request
        begin = request.first_chunk * CHUNK_BYTES
        end = min(begin + request.chunk_count * CHUNK_BYTES, size_bytes)
        if request.chunk_count and begin >= end:
            raise UsageError(f"range from chunk {request.first_chunk} is past the end", reason="bad_request")
        count = max(0, end - begin)
        self._channel.send_record(BulkReply(payload_bytes=count, total_bytes=size_bytes, chunk_crcs=chunk_crcs))
        try:
            self._channel.send_file(fd, begin, count, on_sent=self._count_sent)
        except UnavailableError:
            self.is_out_of_step = True
            raise

    def _count_sent(self, size_bytes: int) -> None:
        self.sent_bytes += size_bytes

    def _get_plan(self) -> None:
        self._send_document(read_small(self._paths.plan(self._request.key, self._request.plan_id)))

    def _get_manifest(self) -> None:
        self._send_document(find_manifest(self._paths, self._request.shard))

    def _send_document(self, data: bytes) -> None:
        self._channel.send_record(BulkReply(payload_bytes=len(data), total_bytes=len(data)))
        self._channel.send_all([data])

    # -- receiving -----------------------------------------------------------------------------------------------------

    def _renew_fragment(self) -> None:
        request = self._request
        positions = [range(first, first + count) for first, count in request.kept]
        bounds = [bound for one in positions for bound in (one.start, one.stop)]
        if (
            bounds != sorted(bounds)
            or not bounds
            or bounds[0] < 0
            or bounds[-1] > -(-request.size_bytes // CHUNK_BYTES)
        ):
            raise UsageError("renewal of chunks that the fragment does not have", reason="bad_request")
        older = OlderFragment(self._paths, request.older, size_bytes=request.size_bytes)
        try:
            self._put_fragment(older, positions)
        finally:
            older.close()

    def _put_fragment(self, older: OlderFragment | None = None, kept: Sequence[range] = ()) -> None:
        request = self._request
        if request.stripe < 0 or request.index < 0:
            raise UsageError("put of a fragment without stripe and index", reason="bad_request")
        writer = FragmentWriter(
            self._paths, request.fragment, size_bytes=request.size_bytes, incarnation=self._incarnation
        )
        try:
            self._begin_put()
            buffer = memoryview(bytearray(CRC_BYTES + CHUNK_BYTES))
            is_kept = bytearray(writer.chunk_count)
            for one in kept:
                is_kept[one.start : one.stop] = b"\1" * len(one)
            for chunk in range(writer.chunk_count):
                if older is not None and is_kept[chunk]:
                    crc, view = older.read_into(chunk, buffer)
                    writer.write(crc, [view])
                    continue
                crc, view = self._receive_chunk(buffer, writer.chunk_length(chunk))
                if crc32c(view) != crc:
                    raise IntegrityError(f"parity chunk {chunk} arrived damaged", reason="bad_chunk")
                writer.write(crc, [view])
            stored = writer.commit()
        except BaseException:
            writer.abort()
            raise
        self._announce(CoderEvent(kind="fragment_stored", fragment=stored.ref, size_bytes=stored.size_bytes))
        self._end_put()

    def _put_shard(self) -> None:
        request = self._request
        staged = StagedShard(self._paths, request.shard)
        try:
            last = request.first_chunk + request.chunk_count
            if last > staged.chunks.chunk_count:
                raise UsageError(f"put up to chunk {last} of {staged.chunks.chunk_count}", reason="bad_request")
            self._begin_put()
            buffer = memoryview(bytearray(CRC_BYTES + CHUNK_BYTES))
            for chunk in range(request.first_chunk, last):
                _crc, view = self._receive_chunk(buffer, staged.chunks.chunk_length(chunk))
                staged.write(chunk, [view])
            if request.stripe >= 0:
                staged.mark(request.stripe)
                self._announce(CoderEvent(kind="stripe_staged", shard=request.shard))
        finally:
            staged.close()
        self._end_put()

    def _begin_put(self) -> None:
        self._channel.send_record(BulkReply())
        self.is_out_of_step = True

    def _end_put(self) -> None:
        self.is_out_of_step = False
        self._channel.send_record(BulkReply())

    def _receive_chunk(self, buffer: memoryview, length: int) -> tuple[int, memoryview]:
        view = buffer[: CRC_BYTES + length]
        self._channel.receive_into(view)
        self.received_bytes += length
        (crc,) = struct.unpack(">I", view[:CRC_BYTES])
        return crc, view[CRC_BYTES:]

    # -- the rest ------------------------------------------------------------------------------------------------------

    def _is_staged(self) -> None:
        StagedShard(self._paths, self._request.shard).close()
        self._channel.send_record(BulkReply())
