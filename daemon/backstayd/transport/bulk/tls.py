"""The bulk transport's connection over TLS. Same frames; what is sent is copied where plaintext is not.

Copies on the way out: file to our buffer (sendfile cannot encrypt), our buffer to OpenSSL's record as it is encrypted, record
to the kernel's socket buffer. On the way in: socket buffer to OpenSSL's record, record to the caller's view as it is
deciphered. Plaintext has none on the way out and one on the way in.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import time
from collections.abc import Callable, Collection, Sequence
from typing import Final

from backstay.errors import UnavailableError
from backstayd.security.credentials import Credentials, Material
from backstayd.security.identity import Role
from backstayd.security.sockets import DRAIN_S, accept_tls, check_peer, connect_tls, refused
from backstayd.transport.bulk.wire import BulkReply, Channel, Timeouts

PIECE_BYTES: Final = 256 * 1024  # read and sent at a time: stays in the cache between the two
NODES: Final[Collection[Role]] = frozenset({Role.NODE})  # bytes of runs go between nodes and to nobody else


class TlsChannel(Channel):
    """A channel whose socket speaks TLS. Use :func:`connect_channel` or :func:`accept_channel`."""

    def __init__(self, sock: ssl.SSLSocket, *, name: str, timeouts: Timeouts, material: Material) -> None:
        self._tls = sock
        self._material = material
        super().__init__(sock, name=name, timeouts=timeouts)

    def set_silence_limit(self, seconds: float) -> None:
        # OpenSSL asks again after the kernel's SO_RCVTIMEO, for ever; Python's own timeout polls.
        self._tls.settimeout(max(0.01, seconds))

    def receive_into(self, view: memoryview) -> None:
        deadline = 0.0
        received, total = 0, len(view)
        while received < total:
            try:
                size = self._tls.recv_into(view[received:])  # one record, at most 16 KiB
            except OSError as error:
                raise self._broken("receiving", error) from error
            if size == 0:
                raise UnavailableError(f"{self.name} closed the connection", reason="peer_closed")
            received += size
            if received < total:
                deadline = self._check("sent", received, total, deadline)

    def send_all(self, pieces: Sequence[bytes | memoryview]) -> None:
        total = sum(len(piece) for piece in pieces)
        deadline, sent = 0.0, 0
        for piece in pieces:
            rest = memoryview(piece)
            while rest:
                try:
                    size = self._tls.send(rest)
                except OSError as error:
                    raise self._broken("sending", error) from error
                rest = rest[size:]
                sent += size
                if sent < total:
                    deadline = self._check("took", sent, total, deadline)

    def send_file(self, fd: int, begin: int, count: int, *, on_sent: Callable[[int], None]) -> None:
        buffer = memoryview(bytearray(min(count, PIECE_BYTES)))
        deadline = time.monotonic() + self._file_limit_s(count)
        while count > 0:
            size = os.preadv(fd, [buffer[: min(count, PIECE_BYTES)]], begin)
            if size == 0 or time.monotonic() > deadline:
                raise UnavailableError(f"{count} bytes could not be sent", reason="peer_slow")
            self.send_all([buffer[:size]])
            begin += size
            count -= size
            on_sent(size)

    def _check(self, did: str, done: int, total: int, deadline: float) -> float:
        now = time.monotonic()
        deadline = deadline or now + self._timeouts.of(total)
        if now > deadline:
            raise UnavailableError(f"{self.name} {did} {done} of {total} bytes in time", reason="peer_slow")
        return deadline

    def _broken(self, doing: str, error: OSError) -> UnavailableError:
        if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return refused(error, peer=self.name, material=self._material)
        return super()._broken(doing, error)


def connect_channel(sock: socket.socket, credentials: Credentials, *, name: str, timeouts: Timeouts) -> TlsChannel:
    """The client's side; ``sock`` is connected and has the timeout of the handshake."""
    material = credentials.current()
    wrapped, _ = connect_tls(sock, credentials, peer=name, roles=NODES, doing="serve what runs hold")
    return TlsChannel(wrapped, name=name, timeouts=timeouts, material=material)


def accept_channel(sock: socket.socket, credentials: Credentials, *, name: str, timeouts: Timeouts) -> TlsChannel:
    """The server's side; raises as ``accept_tls``. Who may not speak here is told so first."""
    material = credentials.current()
    sock.settimeout(timeouts.connect_s)
    wrapped = accept_tls(sock, credentials, peer=name)
    try:
        identity = check_peer(wrapped, credentials, peer=name, roles=NODES, doing="read or write what runs hold")
    except UnavailableError as error:
        channel = TlsChannel(wrapped, name=name, timeouts=timeouts, material=material)
        with contextlib.suppress(UnavailableError):
            refusal = BulkReply(error_class=UnavailableError.__name__, reason=error.reason, message=str(error))
            channel.send_record(refusal)
        channel.drop_incoming(DRAIN_S)
        channel.close()
        raise
    return TlsChannel(wrapped, name=f"{name} (node {identity.name})", timeouts=timeouts, material=material)
