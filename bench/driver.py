"""Processes of a measurement: trainers and light ranks that take commands, and a burner that keeps a core busy.

Each ends with :meth:`World.close` and, should this process die, with its standard input.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from backstay.errors import UnavailableError
from backstay.format import json_records
from backstay.ids import new_incarnation
from backstay.testing.cluster import LocalCluster, process_environment
from backstay.testing.command_process import CommandProcess
from backstay.testing.daemons import WORK_ROLE
from backstay.testing.ports import free_port
from bench.measure import MeasurementError

COMMAND_DEADLINE_S = 600.0
SLOT_WAIT_S = 60.0
_BURN = (
    "import os, sys, threading\n"
    "threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()\n"
    "while True:\n    sum(range(10000))\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSettings:
    """One trainer process, ``bench.trainer``: a rank of a gloo world on this machine."""

    rank: int
    world_size: int
    port: int
    socket: str
    run_id: str
    size_bytes: int
    scratch: str  # a directory on tmpfs, for baselines and peers
    max_wait_s: float = 60.0
    frozen: float = 0.0  # fraction of the parameters that is not trained


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
        """The answers of all ranks; MeasurementError if one failed, died or took too long."""
        try:
            for process in self._processes:
                process.send(do, **arguments)
            answers = [process.receive(deadline_s=COMMAND_DEADLINE_S) for process in self._processes]
        except UnavailableError as error:
            raise MeasurementError(f"{do!r}: {error}", reason=error.reason) from error
        for process, answer in zip(self._processes, answers, strict=True):
            if "error" in answer:
                message = f"{process.name} could not {do}: {answer['error']}: {answer['message']}"
                raise MeasurementError(message, reason="command_failed")
        return answers

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
    """A gloo world with one trainer on each node; ``frozen`` is the fraction of the parameters that is not trained."""
    port = free_port()
    arguments = []
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
        arguments.append([json_records.dumps(settings).decode()])
    return _start(cluster, "bench.trainer", arguments)


def start_light_ranks(
    cluster: LocalCluster, *, run: str, size_bytes: int, module: str = "backstay.testing.light_rank", count: int = 0
) -> World:
    """Ranks that only commit bytes, one on each node, or on the first ``count`` nodes (of the same world size).

    Used where only the daemons' work is timed.
    """
    world_size = len(cluster.nodes)
    arguments = [
        [str(node.socket), run, str(rank), str(world_size), str(size_bytes)] for rank, node in enumerate(cluster.nodes)
    ]
    return _start(cluster, module, arguments[: count or None])


def attach(world: World) -> int:
    """Attach light ranks as a new world and restore; the step they begin from."""
    world.ask("attach", world_id=new_incarnation())
    return max(int(answer["step"]) for answer in world.ask("restore"))


def publish(world: World, step: int) -> None:
    """Commit ``step`` on every light rank; MeasurementError if one got no slot."""
    for answer in world.ask("publish", step=step, wait_s=SLOT_WAIT_S):
        if "skipped" in answer:
            raise MeasurementError(f"step {step} was skipped: {answer['skipped']}", reason="skipped")


def _start(cluster: LocalCluster, module: str, arguments: Sequence[Sequence[str]]) -> World:
    name = module.rpartition(".")[2]
    return World(
        [
            CommandProcess(
                [sys.executable, "-m", module, *argv],
                name=f"{name} {rank}",
                environment=_environment(cluster, cluster.nodes[rank].name),
                log=cluster.keeper.log_dir / f"{name}-{rank}.log",
            )
            for rank, argv in enumerate(arguments)
        ]
    )


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
    """Marks the process as the node's work, so that the cluster kills it at the end."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return process_environment() | cluster.keeper.marks(node=node, role=WORK_ROLE) | threads
