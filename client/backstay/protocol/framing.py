"""Frames of the local protocol on a blocking Unix socket: a 4-byte big-endian length, then that many bytes of JSON.

The JSON is ``{"type": <class name>, "id": n, "body": {...}}`` with one of :mod:`messages`. File descriptors travel by
SCM_RIGHTS with the first byte of the frame whose body names them. Shared by both sides; standard library only.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import struct
import time
from typing import Any, Final

from backstay.errors import IntegrityError
from backstay.format import json_records
from backstay.protocol.messages import MESSAGES

MAX_FRAME_BYTES: Final = 256 * 1024 * 1024  # a manifest of an 8 TiB shard; admission refuses such a shard long before
MAX_FDS: Final = 128


def encode_frame(message: Any, message_id: int, *, limit_bytes: int = MAX_FRAME_BYTES) -> bytes:
    """One frame: length, then JSON; raises IntegrityError for one longer than ``limit_bytes``."""
    envelope = {"type": type(message).__name__, "id": message_id, "body": json_records.to_json(message)}
    payload = json.dumps(envelope, separators=(",", ":")).encode()
    if len(payload) > limit_bytes:
        raise IntegrityError(
            f"{type(message).__name__} of {len(payload)} bytes is over the limit of {limit_bytes}: too many tensors for the "
            "bytes that they hold; join small ones",
            reason="too_large",
        )
    return struct.pack(">I", len(payload)) + payload


def decode_payload(payload: bytes) -> tuple[Any, int]:
    """The message and its id from the JSON of one frame; raises IntegrityError for anything else."""
    try:
        envelope = json.loads(payload)
        cls = MESSAGES[envelope["type"]]
        message_id = envelope["id"]
        if type(message_id) is not int:
            raise TypeError(f"id is {message_id!r:.40}")
        return json_records.from_json(cls, envelope["body"]), message_id
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(f"not a frame of the local protocol: {error!r}", reason="bad_frame") from error


def send_frame(
    sock: socket.socket,
    message: Any,
    *,
    message_id: int,
    fds: tuple[int, ...] = (),
    deadline: float | None = None,
    limit_bytes: int = MAX_FRAME_BYTES,
) -> None:
    """Send one frame on a blocking socket; ``fds`` ride on its first byte.

    Args:
        limit_bytes: What the other side takes; nothing is sent of a longer frame.
        deadline: A time of ``time.monotonic``; None leaves the socket's own timeout.

    Raises:
        TimeoutError: at the deadline, with part of the frame sent. ConnectionError: the other side is gone.
    """
    frame = memoryview(encode_frame(message, message_id, limit_bytes=limit_bytes))
    sent = 0
    _set_timeout(sock, deadline)
    if fds:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        sent = sock.sendmsg([frame], ancillary)
        _set_timeout(sock, deadline)
    if sent < len(frame):  # sending nothing would fail if the other side read the frame and left
        sock.sendall(frame[sent:])


def receive_frame(sock: socket.socket, *, deadline: float | None = None) -> tuple[Any, int, list[int]]:
    """Receive one frame on a blocking socket: message, id and any descriptors (close-on-exec).

    Args:
        deadline: A time of ``time.monotonic`` for the whole frame; None leaves the socket's own timeout.

    Raises:
        ConnectionError: at end of file. TimeoutError: at the deadline. IntegrityError: for a malformed frame. No
            descriptor stays open then, and the stream is out of step.
    """
    fds: list[int] = []
    try:
        head = _receive_exactly(sock, 4, fds, deadline)
        (length,) = struct.unpack(">I", head)
        if length > MAX_FRAME_BYTES:
            raise IntegrityError(f"frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}", reason="bad_frame")
        message, message_id = decode_payload(_receive_exactly(sock, length, fds, deadline))
    except BaseException:
        close_fds(fds)
        raise
    return message, message_id, fds


def close_fds(fds: list[int]) -> None:
    """Close descriptors that came with a frame and will not be used."""
    while fds:
        with contextlib.suppress(OSError):
            os.close(fds.pop())


def _set_timeout(sock: socket.socket, deadline: float | None) -> None:
    if deadline is not None:
        sock.settimeout(max(1e-6, deadline - time.monotonic()))  # 0 would mean non-blocking


def _receive_exactly(sock: socket.socket, count: int, fds: list[int], deadline: float | None) -> bytes:
    buffer = bytearray(count)
    view = memoryview(buffer)
    received = 0
    while received < count:
        _set_timeout(sock, deadline)
        size, ancillary, flags, _address = sock.recvmsg_into(
            [view[received:]], socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.extend(array.array("i", data[: len(data) - len(data) % 4]))
        if flags & socket.MSG_CTRUNC:
            raise IntegrityError(
                f"lost file descriptors of a frame: more than {MAX_FDS}, or this process reached its open-file limit",
                reason="lost_descriptors",
            )
        if size == 0:
            raise ConnectionError("the other side of the local socket closed it")
        received += size
    return bytes(buffer)
