"""The frames of the bulk transport: one length-prefixed JSON record, then raw payload bytes. Sockets with deadlines.

A connection carries requests in sequence, each answered in order; a client may send the next request before it read the
payload of the last. Must not know files, plans or codecs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeVar

from backstay.errors import IntegrityError, UnavailableError
from backstay.format import json_records, versions
from backstay.ids import SnapshotKey
from backstayd.security.sockets import drop_incoming
from backstayd.store.paths import FragmentRef, ShardRef

T = TypeVar("T")

MAX_HEADER_BYTES: Final = 64 * 1024
TLS_HANDSHAKE: Final = 0x16  # first byte of a TLS client; no record of ours is as long as that would mean
CRC_BYTES: Final = 4  # before each chunk of a put, big-endian
SOCKET_BUFFER_BYTES: Final = 4 * 1024 * 1024
FILE_CONSTANT_S: Final = 600.0  # for a file beside its bytes over the floor; silence is limited on its own


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkRequest:
    """``op`` is one of read_shard, read_fragment, get_plan, get_manifest, put_fragment, renew_fragment, put_shard, is_staged.
    To renew is to put a fragment without the chunks ``kept``, ascending (first, count), which the peer takes from the same
    fragment of its older plan."""

    op: str
    protocol: int = versions.BULK_PROTOCOL
    run: str
    attempt: int = 0
    step: int = 0
    rank: int = -1
    world_size: int = 0
    digest: str = ""
    plan_id: str = ""
    stripe: int = -1
    index: int = -1
    first_chunk: int = 0
    chunk_count: int = 0
    size_bytes: int = 0
    older_plan_id: str = ""
    older_step: int = 0
    kept: tuple[tuple[int, int], ...] = ()

    @property
    def key(self) -> SnapshotKey:
        return SnapshotKey(self.attempt, self.step)

    @property
    def shard(self) -> ShardRef:
        return ShardRef(run=self.run, key=self.key, rank=self.rank, world_size=self.world_size, digest=self.digest)

    @property
    def fragment(self) -> FragmentRef:
        return FragmentRef(run=self.run, key=self.key, plan_id=self.plan_id, stripe=self.stripe, index=self.index)

    @property
    def older(self) -> FragmentRef:
        return replace(self.fragment, key=SnapshotKey(self.attempt, self.older_step), plan_id=self.older_plan_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkReply:
    """``error_class`` is "" or a key of ``backstay.errors.ERROR_CLASSES``; ``payload_bytes`` raw bytes follow."""

    error_class: str = ""
    reason: str = ""
    message: str = ""
    payload_bytes: int = 0
    total_bytes: int = 0
    chunk_crcs: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Every socket operation has ``constant_s`` plus its bytes over ``floor_bytes_per_s``."""

    connect_s: float = 3.0
    constant_s: float = 10.0
    floor_bytes_per_s: float = 10e6

    def of(self, size_bytes: int) -> float:
        return self.constant_s + size_bytes / self.floor_bytes_per_s


def enlarge_buffers(sock: socket.socket) -> None:
    """Large socket buffers where the host allows them; else the kernel's own tuning, which a refused wish would turn off."""
    for option, limit in ((socket.SO_RCVBUF, "rmem_max"), (socket.SO_SNDBUF, "wmem_max")):
        if _host_limit(limit) >= SOCKET_BUFFER_BYTES:
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)


@functools.cache
def _host_limit(name: str) -> int:
    try:
        return int(Path("/proc/sys/net/core", name).read_text())
    except (OSError, ValueError):
        return 0


class Channel:
    """A connected TCP socket with deadlines and exact reads and writes. Not safe for two threads; :meth:`abort` is.

    The socket blocks in the kernel (SO_RCVTIMEO, SO_SNDTIMEO), so that one system call fetches a whole chunk.
    """

    def __init__(self, sock: socket.socket, *, name: str, timeouts: Timeouts) -> None:
        self.socket = sock
        self.name = name
        self._timeouts = timeouts
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.set_silence_limit(timeouts.constant_s)

    def allow_work(self, size_bytes: int) -> None:
        """The peer works on so many bytes before it says a word."""
        self.set_silence_limit(self._timeouts.of(size_bytes))

    def set_silence_limit(self, seconds: float) -> None:
        """Longest time one system call may wait without a byte."""
        value = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    def receive_into(self, view: memoryview) -> None:
        """Fill ``view``; raises UnavailableError when the peer ends, fails or is too slow."""
        deadline = 0.0
        received = 0
        total = len(view)
        while received < total:
            try:
                size = self.socket.recv_into(view[received:], total - received, socket.MSG_WAITALL)
            except OSError as error:
                raise self._broken("receiving", error) from error
            if size == 0:
                raise UnavailableError(f"{self.name} closed the connection", reason="peer_closed")
            received += size
            if received < total:
                now = time.monotonic()
                deadline = deadline or now + self._timeouts.of(total)
                if now > deadline:
                    raise UnavailableError(f"{self.name} sent {received} of {total} bytes in time", reason="peer_slow")

    def send_all(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Send all pieces in order; raises UnavailableError when the peer ends, fails or is too slow."""
        total = sum(len(piece) for piece in pieces)
        deadline = 0.0
        try:
            sent = self.socket.sendmsg(pieces)
            while sent < total:
                now = time.monotonic()
                deadline = deadline or now + self._timeouts.of(total)
                if now > deadline:
                    raise UnavailableError(f"{self.name} took {sent} of {total} bytes in time", reason="peer_slow")
                pieces = _rest(pieces, sent - (total - sum(len(piece) for piece in pieces)))
                sent += self.socket.sendmsg(pieces)
        except OSError as error:
            raise self._broken("sending", error) from error

    def send_file(self, fd: int, begin: int, count: int, *, on_sent: Callable[[int], None]) -> None:
        """Send ``count`` bytes of a file: its pages go to the socket without a copy into this process.

        ``on_sent`` hears of each part.

        Raises:
            UnavailableError: the peer ends, fails or is too slow; the stream is out of step then.
        """
        deadline = time.monotonic() + self._file_limit_s(count)
        out = self.socket.fileno()
        while count > 0:
            try:
                sent = os.sendfile(out, fd, begin, count)
            except OSError as error:
                raise self._broken("sending", error) from error
            if sent == 0 or time.monotonic() > deadline:
                raise UnavailableError(f"{count} bytes could not be sent", reason="peer_slow")
            begin += sent
            count -= sent
            on_sent(sent)

    def drop_incoming(self, seconds: float) -> None:
        """Say no more, and read and drop what still comes: closing over unread bytes would destroy our last words."""
        drop_incoming(self.socket, seconds)

    def send_record(self, value: object) -> None:
        payload = json_records.dumps(value)
        if len(payload) > MAX_HEADER_BYTES:
            raise IntegrityError(f"bulk record of {len(payload)} bytes is over the limit of {MAX_HEADER_BYTES}")
        self.send_all([struct.pack(">I", len(payload)) + payload])

    def receive_record(self, cls: type[T]) -> T:
        """One record; raises IntegrityError for bytes that are none, UnavailableError for a broken connection."""
        (length,) = struct.unpack(">I", self._receive(4))
        if length >> 24 == TLS_HANDSHAKE:
            raise IntegrityError(
                f"{self.name} speaks TLS, and here plaintext is spoken (insecure); give all nodes certificates, or none",
                reason="not_plaintext",
            )
        if length > MAX_HEADER_BYTES:
            raise IntegrityError(f"{self.name}: bulk record of {length} bytes is over the limit", reason="bad_frame")
        return json_records.loads(cls, bytes(self._receive(length)))

    def _receive(self, count: int) -> bytearray:
        data = bytearray(count)
        self.receive_into(memoryview(data))
        return data

    def abort(self) -> None:
        """Wake any thread that is blocked on this channel; it gets UnavailableError."""
        # TCP's own: TLS's would leave the other thread reading ciphertext as plaintext.
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)

    def close(self) -> None:
        self.socket.close()

    def _file_limit_s(self, count: int) -> float:
        return FILE_CONSTANT_S + count / self._timeouts.floor_bytes_per_s

    def _broken(self, doing: str, error: OSError) -> UnavailableError:
        if isinstance(error, BlockingIOError | TimeoutError):
            return UnavailableError(f"{self.name} was silent while {doing}", reason="peer_silent")
        return UnavailableError(f"{self.name}: {doing} failed: {error.strerror or error}", reason="peer_failed")


def _rest(pieces: Sequence[bytes | memoryview], sent: int) -> list[bytes | memoryview]:
    rest: list[bytes | memoryview] = []
    for piece in pieces:
        if sent < len(piece):
            rest.append(memoryview(piece)[sent:])
            sent = 0
        else:
            sent -= len(piece)
    return rest
