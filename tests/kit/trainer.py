"""A trainer that speaks plain frames of the local protocol: what the daemon sees of a real one. Runs no model."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import time
from pathlib import Path
from typing import Any

from backstay.errors import ERROR_CLASSES
from backstay.protocol import framing, messages
from tests.kit.node import NodeThread
from tests.kit.shards import MadeShard, make_shard


class PlainTrainer:
    """One connection of one rank. Blocking; use it in a thread or a process of its own."""

    def __init__(
        self,
        path: Path,
        *,
        run: str = "job/run",
        rank: int = 0,
        world_size: int = 1,
        world_id: str = "world",
        payload_bytes: int = 300_000,
        needs: tuple[int, ...] = (),
        tensor: str = "w",
    ) -> None:
        self.run, self.rank, self.world_size, self.world_id = run, rank, world_size, world_id
        self.payload_bytes, self.needs, self.tensor = payload_bytes, needs, tensor
        self.attempt = 0
        self.fds: dict[str, int] = {}  # slot id -> descriptor
        self._ids = itertools.count(1)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(30)
        self.socket.connect(str(path))

    def close(self) -> None:
        self.socket.close()
        for fd in self.fds.values():
            with contextlib.suppress(OSError):
                os.close(fd)
        self.fds.clear()

    def call(self, message: Any) -> tuple[Any, list[int]]:
        """Send, skip Progress, raise what an Error says."""
        number = next(self._ids)
        framing.send_frame(self.socket, message, message_id=number)
        while True:
            reply, answered, fds = framing.receive_frame(self.socket)
            assert answered == number
            if isinstance(reply, messages.Error):
                raise ERROR_CLASSES[reply.error_class](reply.message, reason=reply.reason)
            if not isinstance(reply, messages.Progress):
                return reply, fds

    def attach(self, *, attempt: int = 0, protocol: int = messages.PROTOCOL_VERSION) -> messages.Attached:
        message = messages.Attach(
            protocol=protocol,
            run=self.run,
            world_id=self.world_id,
            rank=self.rank,
            world_size=self.world_size,
            attempt=attempt,
            needs=self.needs,
        )
        self.attempt = attempt
        reply, _ = self.call(message)
        assert isinstance(reply, messages.Attached)
        return reply

    def restore(
        self, *, allow_fresh: bool = False, deadline_s: float = 20.0
    ) -> tuple[messages.Restored, dict[int, bytes]]:
        """The answer and the bytes of every shard handed over, by rank."""
        reply, fds = self.call(
            messages.Restore(allow_fresh=allow_fresh, deadline_s=deadline_s, world_size=self.world_size)
        )
        assert isinstance(reply, messages.Restored)
        self.attempt = reply.attempt
        shards = {}
        for shard in reply.shards:
            shards[shard.rank] = os.pread(fds[shard.fd_index], shard.manifest["size_bytes"], 0)
        for fd in fds:
            os.close(fd)
        return reply, shards

    def make(self, step: int, *, seed: int = 0) -> MadeShard:
        return make_shard(
            run=self.run,
            attempt=self.attempt,
            step=step,
            rank=self.rank,
            world_size=self.world_size,
            world_id=self.world_id,
            payload_bytes=self.payload_bytes,
            seed=seed,
            tensor=self.tensor,
        )

    def reserve(
        self, step: int, *, size_bytes: int | None = None, wait_s: float = 0.0, is_ahead: bool = False
    ) -> messages.Reserved | messages.Skipped:
        size = len(self.make(step).data) if size_bytes is None else size_bytes
        message = messages.Reserve(
            step=step, size_bytes=size, wait_s=wait_s, known_slots=tuple(self.fds), is_ahead=is_ahead
        )
        reply, fds = self.call(message)
        if isinstance(reply, messages.Reserved):
            if fds:
                (self.fds[reply.slot_id],) = fds
            return reply
        assert isinstance(reply, messages.Skipped)
        return reply

    def fill(self, slot_id: str, data: bytes) -> None:
        os.pwrite(self.fds[slot_id], data, 0)

    def commit(self, step: int, slot_id: str, shard: MadeShard) -> messages.Committed:
        reply, _ = self.call(messages.Commit(step=step, slot_id=slot_id, manifest=shard.json))
        assert isinstance(reply, messages.Committed)
        return reply

    def snapshot(self, step: int, *, wait_s: float = 0.0) -> MadeShard:
        """Reserve, fill and commit ``step``; raises AssertionError when it is skipped."""
        shard = self.make(step)
        reserved = self.reserve(step, wait_s=wait_s)
        assert isinstance(reserved, messages.Reserved), reserved
        self.fill(reserved.slot_id, shard.data)
        self.commit(step, reserved.slot_id, shard)
        return shard


def wait_until(condition: Any, *, why: str, deadline_s: float = 15.0) -> Any:
    """Poll until ``condition()`` is true; AssertionError naming ``why`` when it never is."""
    end = time.monotonic() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"not within {deadline_s:g} s: {why}"
        time.sleep(0.01)


def trainer_of(node: NodeThread, **facts: object) -> PlainTrainer:
    """A trainer that is attached to ``node`` and has restored (nothing)."""
    trainer = PlainTrainer(node.socket, **facts)  # type: ignore[arg-type]
    trainer.attach()
    trainer.restore()
    return trainer
