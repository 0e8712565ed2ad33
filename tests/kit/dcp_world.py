"""Worlds of ``dcp_script.py``: started on the nodes of a LocalCluster, waited for, read."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from backstay.testing import LocalCluster
from backstay.testing.ports import free_port

SCRIPT = Path(__file__).with_name("dcp_script.py")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
_numbers = itertools.count()


class World:
    """One start of all ranks. ``do``: what each rank does; ``by_rank`` replaces it for some."""

    def __init__(
        self, cluster: LocalCluster, directory: Path, do: list[list[Any]], *, ranks: int, run_id: str = "dcp",
        by_rank: dict[int, list[list[Any]]] | None = None, nodes: list[int] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        number, port = next(_numbers), free_port()
        self.logs = [directory / f"world-{number}-rank-{rank}.log" for rank in range(ranks)]
        live = nodes or [node.index for node in cluster.nodes if not node.is_destroyed]
        self.processes: list[subprocess.Popen[bytes]] = []
        for rank in range(ranks):
            body = {
                "rank": rank, "world_size": ranks, "port": port, "run_id": run_id, "log": str(self.logs[rank]),
                "do": (by_rank or {}).get(rank, do), **options,
            }  # fmt: skip
            argv = [sys.executable, str(SCRIPT), json.dumps(body)]
            self.processes.append(cluster.run_on_node(live[rank % len(live)], argv, ENVIRONMENT))

    def lines(self, rank: int, event: str = "") -> list[dict[str, Any]]:
        text = self.logs[rank].read_text() if self.logs[rank].exists() else ""
        found = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [line for line in found if not event or line["event"] == event]

    def join(self, timeout_s: float = 150.0) -> World:
        """Wait for all ranks to end well."""
        codes = [process.wait(timeout_s) for process in self.processes]
        problems = [line for rank in range(len(self.logs)) for line in self.lines(rank, "failed")]
        assert codes == [0] * len(codes), f"{codes}: {problems}"
        return self

    def all(self, event: str, key: str) -> list[list[Any]]:
        """A fact of every line of that event, by rank."""
        return [[line[key] for line in self.lines(rank, event)] for rank in range(len(self.logs))]
