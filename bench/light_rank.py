"""A rank that commits shards of random bytes over the local protocol: what the daemons see of a trainer, without torch.

Used where only the daemons' work is timed (protect, rebuild): it starts in a moment and needs one shard of memory. Takes
commands like the trainer, one JSON line each.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import sys
from typing import Any

from backstay.format import json_records
from backstay.format.digest import Digester
from backstay.format.manifest import CHUNK_BYTES
from backstay.format.shard import TensorSpec, build_manifest, plan_layout
from backstay.protocol import framing, messages
from bench.contract import PublisherSettings
from bench.measure import MeasurementError

ANSWER_DEADLINE_S = 300.0
_TENSOR_COUNT = 16


class Publisher:
    """One session with the node's daemon; every method ``do_*`` is a command."""

    def __init__(self, settings: PublisherSettings) -> None:
        self.settings = settings
        length = max(64, settings.size_bytes // _TENSOR_COUNT // 64 * 64)
        specs = [
            TensorSpec.whole(f"rank-{settings.rank:05d}.noise.{index}", "torch.uint8", (length,))
            for index in range(_TENSOR_COUNT)
        ]
        self.layout = plan_layout(specs)
        self.content = bytearray(os.urandom(CHUNK_BYTES) * (self.layout.size_bytes // CHUNK_BYTES + 1))
        self.content[: self.layout.header_bytes] = self.layout.header
        self.slots: dict[str, mmap.mmap] = {}
        self.attempt = 0
        self._message_id = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(ANSWER_DEADLINE_S)
        self._socket.connect(settings.socket)

    def do_hello(self) -> dict[str, Any]:
        return {"size_bytes": self.layout.size_bytes}

    def do_attach(self) -> dict[str, Any]:
        """Attach and wait for the world's decision."""
        one = self.settings
        attach = messages.Attach(run=one.run, world_id=one.world_id, rank=one.rank, world_size=one.world_size)
        self._ask(attach, messages.Attached)
        restored, fds = self._ask(messages.Restore(world_size=one.world_size), messages.Restored)
        for fd in fds:
            os.close(fd)
        self.attempt = restored.attempt
        return {"outcome": restored.outcome, "step": restored.step, "attempt": restored.attempt}

    def do_publish(self, step: int) -> dict[str, Any]:
        """Reserve a slot, fill it, commit it; ``{"skipped": reason}`` if the daemon gives no slot."""
        one = self.settings
        reserve = messages.Reserve(
            step=step, size_bytes=self.layout.size_bytes, wait_s=one.wait_s, known_slots=tuple(self.slots)
        )
        answer, fds = self._ask(reserve, messages.Reserved | messages.Skipped)
        if isinstance(answer, messages.Skipped):
            return {"skipped": answer.reason}
        for fd in fds:
            self.slots[answer.slot_id] = mmap.mmap(fd, self.layout.size_bytes)
            os.close(fd)
        chunk_crcs, tensor_crcs = self._fill(self.slots[answer.slot_id], step)
        manifest = build_manifest(
            self.layout,
            run=one.run,
            attempt=self.attempt,
            step=step,
            rank=one.rank,
            world_size=one.world_size,
            world_id=one.world_id,
            chunk_crcs=chunk_crcs,
            tensor_crcs=tensor_crcs,
        )
        commit = messages.Commit(step=step, slot_id=answer.slot_id, manifest=json_records.to_json(manifest))
        committed, _ = self._ask(commit, messages.Committed)
        return {"digest": committed.digest}

    def _fill(self, slot: mmap.mmap, step: int) -> tuple[str, dict[str, int]]:
        """Other bytes in every chunk at every step, so that nothing can pass for what was there before."""
        size = self.layout.size_bytes
        for begin in range(CHUNK_BYTES, size - 16, CHUNK_BYTES):
            self.content[begin : begin + 16] = (step << 64 | begin).to_bytes(16, "little")
        view = memoryview(self.content)[:size]
        slot[:size] = view
        digester = Digester(self.layout)
        digester.update_span(view)
        return digester.finish()

    def _ask(self, message: Any, expected: Any) -> tuple[Any, list[int]]:
        self._message_id += 1
        framing.send_frame(self._socket, message, message_id=self._message_id)
        while True:
            answer, message_id, fds = framing.receive_frame(self._socket)
            if message_id != self._message_id or isinstance(answer, messages.Progress):
                continue
            if not isinstance(answer, expected):
                raise MeasurementError(f"{type(message).__name__} was answered {answer}", reason="daemon_refused")
            return answer, fds


def serve(publisher: Publisher) -> int:
    """Serve commands from standard input until it ends."""
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(publisher, "do_" + command.pop("do"))(**command)
        except Exception as error:  # noqa: BLE001  the boundary to the driver: it raises this as a MeasurementError
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(serve(Publisher(json_records.loads(PublisherSettings, sys.argv[1]))))
