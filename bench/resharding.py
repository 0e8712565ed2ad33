"""Four ranks' state read by a world of three, straight from memory: bytes moved, and how fast, beside one raw TCP stream.

The reading alone is timed: from the first chunk that is asked for to the last byte verified in its tensor. As a program it is
such a rank.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, Final

import torch

from backstay.errors import IntegrityError
from backstay.format.shard import Layout, TensorSpec, plan_layout
from backstay.ids import new_incarnation
from backstay.protocol import framing, messages
from backstay.protocol.connection import DaemonConnection
from backstay.restore.snapshot import OpenedSnapshot, ReadTarget
from backstay.testing.cluster import LocalCluster
from backstay.testing.command_process import serve_commands
from backstay.testing.light_rank import LightRank
from bench.arguments import Settings
from bench.baselines import RawTcp
from bench.driver import attach, publish, start_light_ranks
from bench.measure import Collection, stolen_cpu_s

RUN: Final = "default/bench-reshard"
FROM_RANKS: Final = 4
TO_RANKS: Final = 3
TENSOR_COUNT: Final = 8
COLUMNS: Final = 4096
_LARGEST_TCP_BYTES: Final = 512 * 1024**2
_DEADLINE_S: Final = 300.0


def measure_resharding(settings: Settings, scratch: Path, found: Collection) -> None:
    """One cluster per round: a world of four commits and is protected, dies, and comes back as three."""
    size = min(settings.protect_size_bytes, _LARGEST_TCP_BYTES)
    with RawTcp(scratch / "raw-tcp-reshard", size) as tcp:
        for _ in range(settings.rounds):
            with LocalCluster(FROM_RANKS, 1, FROM_RANKS, keep_logs=settings.keep_logs) as cluster:
                _round(cluster, tcp, found, size_bytes=settings.protect_size_bytes)


def _round(cluster: LocalCluster, tcp: RawTcp, found: Collection, *, size_bytes: int) -> None:
    world = start_light_ranks(cluster, run=RUN, size_bytes=size_bytes, module="bench.resharding")
    try:
        attach(world)
        publish(world, 1)
        cluster.wait_until(
            lambda: cluster.run_status(RUN)["protected_step"] >= 1, _DEADLINE_S, "step 1 to be protected"
        )
    finally:
        world.kill()
    stolen = stolen_cpu_s()
    tcp_rate = tcp.size_bytes / tcp.receive().seconds
    with start_light_ranks(cluster, run=RUN, size_bytes=size_bytes, module="bench.resharding", count=TO_RANKS) as again:
        answers = again.ask("reshard", world_size=TO_RANKS, world_id=new_incarnation())
    stolen = stolen_cpu_s() - stolen
    needed = sum(answer["needed"] for answer in answers)
    seconds = max(answer["end"] for answer in answers) - min(answer["begin"] for answer in answers)
    found.add("reshard", needed / seconds, unit="bytes/s", stolen_s=stolen)
    found.add("reshard_vs_tcp", needed / seconds / tcp_rate, unit="ratio", stolen_s=stolen)
    found.add("reshard_moved_vs_needed", sum(a["moved"] for a in answers) / needed, unit="ratio", stolen_s=stolen)


class ReshardingRank(LightRank):
    """A rank that holds row blocks of large tensors, as FSDP2 cuts them, and can come back as a rank of a smaller world."""

    def _layout(self, size_bytes: int) -> Layout:
        # About the asked size per rank, and a multiple of what worlds of 3 and 4 divide by.
        rows = size_bytes * self.world_size // (TENSOR_COUNT * COLUMNS)
        self.rows = max(12, rows // 12 * 12)
        offset, count = rows_of(self.rows, self.rank, self.world_size)
        return plan_layout(
            [
                TensorSpec(f"model.weight.{index}", "torch.uint8", (count, COLUMNS), (offset, 0), (self.rows, COLUMNS))
                for index in range(TENSOR_COUNT)
            ]
        )

    def do_reshard(self, world_size: int, world_id: str) -> dict[str, Any]:
        """Come back as this rank of a world of ``world_size`` and read its rows."""
        connection = DaemonConnection(self.socket_path, timeout_s=10.0)
        try:
            message = messages.Attach(
                run=self.run, world_id=world_id, rank=self.rank, world_size=world_size, layout="rows of another world"
            )
            connection.attach(message, deadline_s=10.0)
            request = messages.Restore(world_size=world_size, deadline_s=_DEADLINE_S)
            offer, fds = connection.restore(request, lambda _: None)
            framing.close_fds(list(fds))
            if not isinstance(offer, messages.Offer):
                raise IntegrityError(f"another world size was answered with {type(offer).__name__}")
            return self._read(connection, offer, world_size)
        finally:
            connection.close()

    def _read(self, connection: DaemonConnection, offer: messages.Offer, world_size: int) -> dict[str, Any]:
        offset, count = rows_of(self.rows, self.rank, world_size)
        targets = [
            ReadTarget(
                name=f"model.weight.{index}",
                tensor=torch.zeros((count, COLUMNS), dtype=torch.uint8),
                offsets=(offset, 0),
            )
            for index in range(TENSOR_COUNT)
        ]
        deadline = time.monotonic() + _DEADLINE_S
        with OpenedSnapshot.from_offer(
            connection, offer, run=self.run, deadline=deadline, on_progress=lambda _: None
        ) as opened:
            plan = opened.plan(targets)
            begin = time.monotonic()
            opened.run_plan(plan)
            end = time.monotonic()
            answer = {"begin": begin, "end": end, "needed": opened.needed_bytes, "moved": opened.fetched_bytes}
        request = messages.Restore(world_size=world_size, deadline_s=_DEADLINE_S, staged=offer.decision_id)
        restored, fds = connection.restore(request, lambda _: None)
        framing.close_fds(list(fds))
        return answer | {"step": restored.step}


def rows_of(rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """First row and number of rows of a rank, as ``torch.chunk`` cuts."""
    size = -(-rows // world_size)
    begin = min(rank * size, rows)
    return begin, min(size, rows - begin)


if __name__ == "__main__":
    path, run, rank, world_size, size_bytes = sys.argv[1:]
    serve_commands(ReshardingRank(path, run, int(rank), int(world_size), int(size_bytes)), sys.stdout)
