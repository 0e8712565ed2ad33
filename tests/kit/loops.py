"""Training loops of several ranks on one node of a cluster, read by the JSON lines they print."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backstay.testing import LocalCluster
from backstay.testing.ports import free_port


@dataclass(frozen=True, slots=True)
class Loop:
    """``processes`` by rank; their output goes to ``<name>-<rank>.log``."""

    cluster: LocalCluster
    name: str
    processes: list[subprocess.Popen[bytes]]

    def lines(self, rank: int) -> list[dict[str, Any]]:
        """Every whole JSON line that the rank printed."""
        path = self.cluster.keeper.log_dir / f"{self.name}-{rank}.log"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line.startswith("{")]

    def digests(self, rank: int) -> dict[int, str]:
        """Digest of the state after each step."""
        return {line["step"]: line["digest"] for line in self.lines(rank) if line["event"] == "step"}

    def loaded(self, rank: int) -> int:
        """The step it began from."""
        return next(int(line["step"]) for line in self.lines(rank) if line["event"] == "loaded")

    def wait_ended(self) -> list[int | None]:
        """Wait until every rank has ended; their exit statuses."""
        self.cluster.wait_until(lambda: all(p.poll() is not None for p in self.processes), 240, f"{self.name} to end")
        return [process.returncode for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def start_loop(cluster: LocalCluster, script: Path, name: str, *, ranks: int = 2, node: int = 0, **env: str) -> Loop:
    """Start ``script`` on a node once for each rank, with the environment that torchrun would give."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    shared |= {"LOCAL_WORLD_SIZE": str(ranks), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        argv = [sys.executable, str(script)]
        processes.append(cluster.run_on_node(node, argv, shared | own | env, name=f"{name}-{rank}"))
    return Loop(cluster, name, processes)
