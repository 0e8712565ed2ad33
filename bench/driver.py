"""The driver's hands: processes that take commands, and the burner that keeps a core busy.

Every process started here dies with :meth:`World.close` and, should the driver die, with its standard input.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from backstay.format import json_records
from backstay.testing.cluster import LocalCluster, process_environment
from backstay.testing.node import WORK_ROLE
from backstay.testing.ports import free_port
from bench.contract import PublisherSettings, TrainerSettings
from bench.measure import MeasurementError

COMMAND_DEADLINE_S = 600.0
_BURN = (
    "import os, sys, threading\n"
    "threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()\n"
    "while True:\n    sum(range(10000))\n"
)


class CommandProcess:
    """``python -m MODULE SETTINGS``: one JSON line in, one JSON line out."""

    def __init__(
        self, module: str, settings: TrainerSettings | PublisherSettings, environment: Mapping[str, str], log: Path
    ) -> None:
        self.name = f"{module.rpartition('.')[2]} {settings.rank}"
        self._log = log
        self._pending = b""
        with log.open("ab") as log_file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, json_records.dumps(settings).decode()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log_file,
                env=dict(environment),
                start_new_session=True,
            )

    def send(self, do: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended(do) from None

    def receive(self, do: str, deadline_s: float = COMMAND_DEADLINE_S) -> dict[str, Any]:
        """The answer to the command sent last; raises MeasurementError if it failed, died or took too long."""
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        end = time.monotonic() + deadline_s
        while b"\n" not in self._pending:
            ready, _, _ = select.select([fd], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise MeasurementError(f"{self.name} did not answer {do!r} within {deadline_s:.0f} s", reason="slow")
            received = os.read(fd, 65536)
            if not received:
                raise self._ended(do)
            self._pending += received
        line, _, self._pending = self._pending.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise MeasurementError(f"{self.name} could not {do}: {answer['error']}", reason="command_failed")
        return answer

    def close(self) -> None:
        """End the process: it leaves when its standard input ends, and is killed if it does not."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(timeout=20)

    def _ended(self, do: str) -> MeasurementError:
        code = self._process.wait(timeout=20)
        tail = " | ".join(self._log.read_text(errors="replace").splitlines()[-5:])
        return MeasurementError(f"{self.name} ended with status {code} at {do!r}: {tail}", reason="process_died")


class World:
    """The ranks of one job, one on each of the cluster's nodes: a command goes to all, answers come back in rank order."""

    def __init__(self, processes: Sequence[CommandProcess]) -> None:
        self._processes = list(processes)
        try:
            self.size_bytes = max(answer["size_bytes"] for answer in self.ask("hello"))
        except BaseException:
            self.kill()
            raise

    def ask(self, do: str, **arguments: Any) -> list[dict[str, Any]]:
        for process in self._processes:
            process.send(do, **arguments)
        return [process.receive(do) for process in self._processes]

    def close(self) -> None:
        for process in self._processes:
            process.close()

    def kill(self) -> None:
        """SIGKILL all ranks, as a failing job does."""
        for process in self._processes:
            process.kill()
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_details: object) -> None:
        self.close()


def start_trainers(cluster: LocalCluster, *, run_id: str, size_bytes: int, scratch: Path, frozen: float = 0.0) -> World:
    """A gloo world with one trainer on each node; ``frozen`` is the part of the parameters that is not trained."""
    port = free_port()
    module = "bench.trainer"
    processes = []
    for rank, node in enumerate(cluster.nodes):
        settings = TrainerSettings(
            rank=rank,
            world_size=len(cluster.nodes),
            port=port,
            socket=str(node.socket),
            run_id=run_id,
            size_bytes=size_bytes,
            scratch=str(scratch),
            frozen=frozen,
        )
        processes.append(
            CommandProcess(module, settings, _environment(cluster, node.name), _log(cluster, f"{run_id}-{rank}"))
        )
    return World(processes)


def start_publishers(
    cluster: LocalCluster,
    *,
    run: str,
    world_id: str,
    size_bytes: int,
    module: str = "bench.light_rank",
    ranks: int = 0,
) -> World:
    """A world of publishers, one on each node, or on the first ``ranks`` nodes (of the same world size)."""
    processes = []
    for rank, node in enumerate(cluster.nodes[: ranks or None]):
        settings = PublisherSettings(
            rank=rank,
            world_size=len(cluster.nodes),
            world_id=world_id,
            socket=str(node.socket),
            run=run,
            size_bytes=size_bytes,
        )
        processes.append(
            CommandProcess(module, settings, _environment(cluster, node.name), _log(cluster, f"publisher-{rank}"))
        )
    return World(processes)


@contextmanager
def burner(core: int) -> Iterator[None]:
    """Keep one core busy with pure computation while the block runs."""
    process = subprocess.Popen([sys.executable, "-c", _BURN], stdin=subprocess.PIPE)
    try:
        os.sched_setaffinity(process.pid, {core})
        yield
    finally:
        process.kill()
        process.wait(timeout=20)
        assert process.stdin is not None
        process.stdin.close()


def _environment(cluster: LocalCluster, node: str) -> dict[str, str]:
    """Marked as the node's work, so that the cluster kills what is left of it."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return process_environment() | cluster.keeper.marks(node=node, role=WORK_ROLE) | threads


def _log(cluster: LocalCluster, name: str) -> Path:
    return cluster.keeper.log_dir / f"{name}.log"
