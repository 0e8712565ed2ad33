"""One trainer's connection: frames of the local protocol on a non-blocking Unix socket; descriptors only go out.

Must not know what the messages mean.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from backstay.errors import IntegrityError
from backstay.protocol import framing, messages
from backstayd.security.refusals import Refusals
from backstayd.store.slot_holder import peer_credentials

_refusals = Refusals(logging.getLogger(__name__))

READ_AHEAD_FRAMES: Final = 4
FIRST_FRAME_BYTES: Final = 1024 * 1024  # enough to attach; raised for those who did
PROGRESS_S: Final = 1.0  # a trainer that waits gets a message at least this often
MAX_WAIT_S: Final = 600.0  # of one request that waits for a slot or a seal
SEND_TIMEOUT_S: Final = 10.0  # a trainer that does not read its answers is frozen: it attaches again later


class Connection:
    """Reads a few frames ahead, so that end of file is noticed while a request is being answered."""

    def __init__(self, sock: socket.socket, on_lost: Any) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._uid = peer_credentials(sock).uid
        self._loop = asyncio.get_running_loop()
        self._frames: asyncio.Queue[tuple[Any, int] | None] = asyncio.Queue(READ_AHEAD_FRAMES)
        self._on_lost = on_lost
        self.is_lost = False
        self.max_frame_bytes = FIRST_FRAME_BYTES
        self._reader = asyncio.create_task(self._read_ahead())

    async def receive(self) -> tuple[Any, int] | None:
        """The next message and its id; None at the end of the connection."""
        if self.is_lost and self._frames.empty():
            return None
        return await self._frames.get()

    async def send(self, message: Any, *, message_id: int, fds: tuple[int, ...] = ()) -> None:
        """Send one frame, its descriptors with the first byte.

        Raises:
            ConnectionError, TimeoutError: the trainer is gone or does not read.
        """
        frame = memoryview(framing.encode_frame(message, message_id))
        async with asyncio.timeout(SEND_TIMEOUT_S):
            sent = await self._send_with_fds(frame, fds) if fds else 0
            if sent < len(frame):
                await self._loop.sock_sendall(self._socket, frame[sent:])

    def close(self) -> None:
        """Close at once; idempotent."""
        self._lose()
        self._reader.cancel()
        self._socket.close()

    async def _send_with_fds(self, frame: memoryview, fds: tuple[int, ...]) -> int:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        while True:
            try:
                return self._socket.sendmsg([frame], ancillary)
            except (BlockingIOError, InterruptedError):
                await self._until_writable()

    async def _until_writable(self) -> None:
        writable = self._loop.create_future()
        descriptor = os.dup(self._socket.fileno())
        try:
            self._loop.add_writer(descriptor, lambda: None if writable.done() else writable.set_result(None))
            await writable
        finally:
            self._loop.remove_writer(descriptor)
            os.close(descriptor)

    async def _read_ahead(self) -> None:
        try:
            while True:
                (length,) = struct.unpack(">I", await self._read_exactly(4))
                if length > self.max_frame_bytes:
                    raise IntegrityError(f"frame of {length} bytes exceeds the limit", reason="bad_frame")
                await self._frames.put(framing.decode_payload(await self._read_exactly(length)))
        except (ConnectionError, OSError):
            pass
        except IntegrityError as error:
            _refusals.note(
                f"user {self._uid} sent a malformed frame: {error}; closing the connection",
                cause=f"frame {self._uid}",
            )
        finally:
            self._lose()

    async def _read_exactly(self, count: int) -> bytes:
        buffer = bytearray(count)
        view = memoryview(buffer)
        received = 0
        while received < count:
            size = await self._loop.sock_recv_into(self._socket, view[received:])
            if size == 0:
                raise ConnectionError("the trainer closed the connection")
            received += size
        return bytes(buffer)

    def _lose(self) -> None:
        if not self.is_lost:
            self.is_lost = True
            with contextlib.suppress(asyncio.QueueFull):
                self._frames.put_nowait(None)
            self._on_lost()


@dataclass(slots=True)
class Call:
    """One request of a trainer, to be answered on its connection under the id of the request."""

    connection: Connection
    message_id: int
    _progress: messages.Progress | None = None  # the last that was sent, and when
    _progress_s: float = 0.0

    @property
    def is_lost(self) -> bool:
        return self.connection.is_lost

    def check(self) -> None:
        """Raise ConnectionError if the trainer is gone."""
        if self.is_lost:
            raise ConnectionError("the trainer left while it was waiting")

    def allow_frames(self, limit_bytes: int) -> None:
        """Take frames of up to ``limit_bytes`` of this trainer from now on."""
        self.connection.max_frame_bytes = max(self.connection.max_frame_bytes, limit_bytes)

    async def send(self, message: Any, fds: tuple[int, ...] = ()) -> None:
        await self.connection.send(message, message_id=self.message_id, fds=fds)

    async def send_progress(self, progress: messages.Progress) -> None:
        """Send ``progress`` if it changed, and now and then if it did not."""
        now_s = asyncio.get_running_loop().time()
        if progress != self._progress or now_s - self._progress_s >= PROGRESS_S:
            await self.send(progress)
            self._progress, self._progress_s = progress, now_s

    async def while_working(self, task: asyncio.Task[Any], progress: Callable[[], messages.Progress]) -> None:
        """Until ``task`` is done, send its progress now and then; cancels it when the trainer has gone."""
        try:
            while not (await asyncio.wait({task}, timeout=PROGRESS_S))[0]:
                self.check()
                await self.send(progress())
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
