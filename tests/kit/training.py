"""Worlds of ``trainer_script.py``: real torch ranks on the nodes of a cluster, started, waited for, read by what they log."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from backstay.testing import LocalCluster
from backstay.testing.cluster import process_environment
from backstay.testing.ports import free_port

SCRIPT = Path(__file__).with_name("trainer_script.py")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


class Training:
    """One run, with rank r on node r; a world that is started again appends to the same logs.

    Args:
        cluster: None trains without backstay: the control run.
        directory: Where the logs go; made if it is not there.
        options: Of the script, for all ranks; a list has one for each.
    """

    def __init__(
        self, cluster: LocalCluster | None, directory: Path, *, ranks: int = 2, run_id: str = "trained", **options: Any
    ) -> None:
        directory.mkdir(exist_ok=True)
        self._cluster, self._directory = cluster, directory
        self.ranks, self.run = ranks, f"default/{run_id}"
        self._options = {
            "world_size": ranks, "run_id": run_id, "stop": str(directory / "stop"), "last_step": 100_000, "pause_s": 0.05,
            "is_attached": cluster is not None, **options,
        }  # fmt: skip
        self.processes: list[subprocess.Popen[bytes]] = []

    @property
    def cluster(self) -> LocalCluster:
        assert self._cluster is not None
        return self._cluster

    def start(self, fault: str = "") -> None:
        """Start a world. ``fault``: BACKSTAY_FAULTS of its last rank."""
        port, self.processes = free_port(), []
        for rank in range(self.ranks):
            own = {name: value[rank] if isinstance(value, list) else value for name, value in self._options.items()}
            own |= {"rank": rank, "port": port, "log": str(self._log(rank))}
            argv = [sys.executable, str(SCRIPT), json.dumps(own)]
            environment = ENVIRONMENT | {"BACKSTAY_FAULTS": fault if rank == self.ranks - 1 else ""}
            if self._cluster is None:
                process = subprocess.Popen(argv, env=process_environment() | environment)
            else:
                process = self._cluster.run_on_node(rank, argv, environment)
            self.processes.append(process)

    def stop(self) -> None:
        """Every rank ends after the step it is at, without an error."""
        (self._directory / "stop").touch()
        self.wait_ended(60)

    def wait_ended(self, deadline_s: float) -> None:
        ended = [process.wait(deadline_s) for process in self.processes]
        assert ended == [0] * self.ranks, self._cluster and self._cluster.evidence()

    def kill(self) -> None:
        """End the world as a launcher would when one of its ranks died."""
        for process in self.processes:
            process.kill()
            process.wait(30)

    def _log(self, rank: int) -> Path:
        return self._directory / f"rank-{rank}.log"

    def lines(self, rank: int, *events: str) -> list[dict[str, Any]]:
        """What the rank logged of these events, in all of its worlds."""
        text = self._log(rank).read_text() if self._log(rank).exists() else ""
        whole = text[: text.rfind("\n") + 1].splitlines()
        return [line for line in map(json.loads, whole) if line["event"] in events]

    def steps(self, rank: int) -> list[tuple[int, str]]:
        """Each step that the rank made, and the digest of its state after it."""
        return [(line["step"], line["digest"]) for line in self.lines(rank, "step")]

    def last_step(self) -> int:
        """The newest step that every rank logged."""
        return min(max((step for step, _ in self.steps(rank)), default=0) for rank in range(self.ranks))

    def wait_step(self, step: int) -> None:
        self.cluster.wait_until(lambda: self.last_step() >= step, 90, f"every rank to reach step {step}")

    def protected_step(self) -> int:
        return int(self.cluster.run_status(self.run)["protected_step"])

    def wait_protected(self, step: int) -> int:
        """Wait until ``step`` or a later one is protected, and return that."""

        def reached() -> int:
            protected = self.protected_step()
            return protected if protected >= step else 0

        return self.cluster.wait_until(reached, 120, f"step {step} of {self.run} to be protected")

    def wait_restored(self, count: int) -> list[dict[str, Any]]:
        """Wait for every rank's ``count``-th restore, and return what they logged of it."""
        ranks = range(self.ranks)
        self.cluster.wait_until(
            lambda: all(len(self.lines(rank, "restored")) >= count for rank in ranks), 120, f"restore {count}"
        )
        return [self.lines(rank, "restored")[count - 1] for rank in ranks]
