"""A rolling restart of a LocalCluster under a running job, and sampling of the job's redundancy meanwhile.

Uses what operators use: `backstay drain`, SIGTERM, the status document. Must not look into the daemons.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from backstay.errors import UnavailableError
from backstay.testing.cluster import LocalCluster

SAMPLE_S: Final = 0.05
COMMAND_DEADLINE_S: Final = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The coordinator's status at one moment. ``possible``: the spares that the nodes present then could provide."""

    at_s: float
    protected_step: int
    spares: int
    possible: int
    away: tuple[str, ...]  # lost nodes


@dataclass(slots=True)
class RedundancyWatch:
    """Samples the status of one run. Skips samples while the coordinator is unreachable or has just started."""

    cluster: LocalCluster
    run: str
    parity: int
    samples: list[Sample] = field(default_factory=list)

    def sample(self) -> None:
        """Take a sample if there is an answer."""
        try:
            status = self.cluster.status()
        except UnavailableError:
            return
        run = next((entry for entry in status["runs"] if entry["run"] == self.run), None)
        if not status["is_settled"] or run is None or run["reason"] in ("not evaluated yet", "forgetting"):
            return
        self.samples.append(_sample(run, status["nodes"], self.parity))

    def complaints(self) -> list[str]:
        """Regressions and avoidable losses of redundancy since the first protected snapshot, as sentences."""
        found = []
        first = next((i for i, s in enumerate(self.samples) if s.protected_step and s.spares >= s.possible), 0)
        for before, after in zip(self.samples[first:], self.samples[first + 1 :], strict=False):
            if after.protected_step < before.protected_step:
                found.append(f"protected went back from step {before.protected_step} to {after.protected_step}")
            if after.spares < after.possible:
                found.append(f"{after.spares} spares at step {after.protected_step}, {after.possible} were possible")
        return list(dict.fromkeys(found))


def _sample(run: dict[str, Any], nodes: list[dict[str, Any]], parity: int) -> Sample:
    away = tuple(node["name"] for node in nodes if node["state"] == "lost")
    possible = max(0, min(parity, len(nodes) - len(away) - 1))
    return Sample(
        at_s=time.monotonic(),
        protected_step=run["protected_step"],
        spares=run["spares"],
        possible=possible,
        away=away,
    )


@contextmanager
def watched(cluster: LocalCluster, run: str, *, parity: int) -> Iterator[RedundancyWatch]:
    """Samples are taken in a thread while the block runs."""
    watch = RedundancyWatch(cluster, run, parity)
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(SAMPLE_S):
            watch.sample()

    thread = threading.Thread(target=look, name="redundancy-watch", daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        is_over.set()
        thread.join()


def drain(cluster: LocalCluster, index: int, *, undo: bool = False) -> str:
    """Run `backstay drain NODE --wait`, or cancel the drain; returns the command's output.

    Raises:
        UnavailableError: it failed.
    """
    argv = [sys.executable, "-m", "backstayd.cli", "drain", cluster.nodes[index].name, "--wait"]
    argv += ["--timeout-s", f"{COMMAND_DEADLINE_S:g}", "--coordinator", cluster.coordinator_address]
    argv += ["--undo"] if undo else []
    done = subprocess.run(
        argv,
        env=cluster.operator_environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * COMMAND_DEADLINE_S,
    )
    if done.returncode:
        raise UnavailableError(f"{' '.join(argv[2:])} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout.strip()


def upgrade_daemon(cluster: LocalCluster, index: int) -> None:
    """Do what an upgrade does to a node: drain it, stop the daemon with SIGTERM, restart it, cancel the drain."""
    drain(cluster, index)
    status = cluster.stop_daemon(index)
    if status:
        raise UnavailableError(f"the daemon of {cluster.nodes[index].name} ended with status {status} on SIGTERM")
    cluster.restart_daemon(index)
    cluster.wait_live()
    drain(cluster, index, undo=True)
