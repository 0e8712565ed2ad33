"""A rank whose shard holds row blocks of large tensors, as FSDP2 cuts them, and that can come back as a rank of another world.

Times the reading alone: from the first chunk that is asked for to the last byte verified in its tensor.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch

from backstay.errors import IntegrityError
from backstay.format import json_records
from backstay.format.manifest import CHUNK_BYTES
from backstay.format.shard import TensorSpec, plan_layout
from backstay.protocol import framing, messages
from backstay.protocol.connection import DaemonConnection
from backstay.restore.snapshot import OpenedSnapshot, ReadTarget
from bench.contract import PublisherSettings
from bench.light_rank import Publisher, serve

DEADLINE_S = 300.0
TENSOR_COUNT = 8
COLUMNS = 4096


class Resharder(Publisher):
    """A publisher of row blocks; ``do_reshard`` reads what a rank of a smaller world holds."""

    def __init__(self, settings: PublisherSettings) -> None:
        super().__init__(settings)
        self.rows = self._row_count()
        offset, count = rows_of(self.rows, settings.rank, settings.world_size)
        specs = [
            TensorSpec(f"model.weight.{index}", "torch.uint8", (count, COLUMNS), (offset, 0), (self.rows, COLUMNS))
            for index in range(TENSOR_COUNT)
        ]
        self.layout = plan_layout(specs)
        self.content = bytearray(os.urandom(CHUNK_BYTES) * (self.layout.size_bytes // CHUNK_BYTES + 1))
        self.content[: self.layout.header_bytes] = self.layout.header

    def do_reshard(self, world_size: int, world_id: str) -> dict[str, Any]:
        """Come back as this rank of a world of ``world_size`` and read its rows."""
        one = self.settings
        connection = DaemonConnection(one.socket, timeout_s=10.0)
        try:
            attach = messages.Attach(
                run=one.run, world_id=world_id, rank=one.rank, world_size=world_size, layout="rows of another world"
            )
            connection.attach(attach, deadline_s=10.0)
            request = messages.Restore(world_size=world_size, deadline_s=DEADLINE_S)
            offer, fds = connection.restore(request, lambda _: None)
            framing.close_fds(list(fds))
            if not isinstance(offer, messages.Offer):
                raise IntegrityError(f"another world size was answered with {type(offer).__name__}")
            return self._read(connection, offer, world_size)
        finally:
            connection.close()

    def _read(self, connection: DaemonConnection, offer: messages.Offer, world_size: int) -> dict[str, Any]:
        offset, count = rows_of(self.rows, self.settings.rank, world_size)
        targets = [
            ReadTarget(
                name=f"model.weight.{index}",
                tensor=torch.zeros((count, COLUMNS), dtype=torch.uint8),
                offsets=(offset, 0),
            )
            for index in range(TENSOR_COUNT)
        ]
        deadline = time.monotonic() + DEADLINE_S
        with OpenedSnapshot.from_offer(
            connection, offer, run=self.settings.run, deadline=deadline, on_progress=lambda _: None
        ) as opened:
            plan = opened.plan(targets)
            begin = time.monotonic()
            opened.run_plan(plan)
            end = time.monotonic()
            answer = {"begin": begin, "end": end, "needed": opened.needed_bytes, "moved": opened.fetched_bytes}
        request = messages.Restore(world_size=world_size, deadline_s=DEADLINE_S, staged=offer.decision_id)
        restored, fds = connection.restore(request, lambda _: None)
        framing.close_fds(list(fds))
        return answer | {"step": restored.step}

    def _row_count(self) -> int:
        """Rows of each tensor: about the asked size per rank, and a multiple of what worlds of 3 and 4 divide by."""
        rows = self.settings.size_bytes * self.settings.world_size // (TENSOR_COUNT * COLUMNS)
        return max(12, rows // 12 * 12)


def rows_of(rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """First row and number of rows of a rank, as ``torch.chunk`` cuts."""
    size = -(-rows // world_size)
    begin = min(rank * size, rows)
    return begin, min(size, rows - begin)


if __name__ == "__main__":
    sys.exit(serve(Resharder(json_records.loads(PublisherSettings, sys.argv[1]))))
