"""The README's training loop on real daemons: once never attached, once killed in an epoch and restarted.

As a program, ``python tests/kit/recipe_world.py OPTIONS`` with the arguments of :func:`run` as JSON prints its result, so that
another Python than the tests' can run it. Needs backstay and torch, and torchdata for the loader ``stateful``.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from backstay.testing import LocalCluster
from backstay.testing.ports import free_port

ROOT: Final = Path(__file__).parents[2]
SCRIPT: Final = ROOT / "tests" / "kit" / "recipe_rank.py"
RUN: Final = "default/gpt-7b-3"
HOLD: Final = 29  # of 60 steps, 20 in each epoch


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """By rank: its digest, and [step before, epoch, samples] of what it trained. ``protected_step``: at the kill."""

    control: list[dict[str, Any]]
    restarted: list[dict[str, Any]]
    protected_step: int


def block() -> str:
    """The code block of the README."""
    (found,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return str(found)


def run(*, ranks: int, nodes: int, parity: int, loader: str) -> Outcome:
    """Train ``ranks`` ranks, killed before step HOLD once a step of that epoch is protected on ``nodes`` nodes."""
    with (
        tempfile.TemporaryDirectory() as directory,
        LocalCluster(nodes, parity, lease_s=1.0) as cluster,
    ):
        recipe = Path(directory, "recipe.py")
        recipe.write_text(block())
        shared = {"recipe": str(recipe), "world_size": ranks, "loader": loader}
        control = _start(cluster, "control", {**shared, "hold": 0, "is_attached": False}, Path(directory))
        expected = _results(cluster, "control", control, Path(directory))
        first = _start(cluster, "first", {**shared, "hold": HOLD, "is_attached": True}, Path(directory))
        least = HOLD - 5
        cluster.wait_until(lambda: _protected(cluster, first) >= least, 120, f"step {least} to be protected")
        protected = _protected(cluster, first)
        for process in first:
            process.kill()
            process.wait()
        second = _start(cluster, "second", {**shared, "hold": 0, "is_attached": True}, Path(directory))
        return Outcome(
            control=expected,
            restarted=_results(cluster, "second", second, Path(directory)),
            protected_step=protected,
        )


def _start(cluster: LocalCluster, name: str, options: dict[str, Any], directory: Path) -> list[subprocess.Popen[bytes]]:
    port, ranks = free_port(), options["world_size"]
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = []
    for rank in range(ranks):
        own = {"rank": rank, "port": port, "out": _out(directory, name, rank)}
        argv = [sys.executable, str(SCRIPT), json.dumps(options | own)]
        node = rank * len(cluster.nodes) // ranks
        processes.append(cluster.run_on_node(node, argv, environment, name=f"{name}-{rank}"))
    return processes


def _out(directory: Path, name: str, rank: int) -> str:
    return str(directory / f"{name}-{rank}.json")


def _protected(cluster: LocalCluster, processes: list[subprocess.Popen[bytes]]) -> int:
    for process in processes:
        assert process.poll() is None, cluster.evidence()
    entries = [entry for entry in cluster.status()["runs"] if entry["run"] == RUN]
    return int(entries[0]["protected_step"] or 0) if entries else 0


def _results(
    cluster: LocalCluster, name: str, processes: list[subprocess.Popen[bytes]], directory: Path
) -> list[dict[str, Any]]:
    cluster.wait_until(lambda: all(p.poll() is not None for p in processes), 180, f"{name} to end")
    for process in processes:
        assert process.returncode == 0, cluster.evidence()
    return [json.loads(Path(_out(directory, name, rank)).read_text()) for rank in range(len(processes))]


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(run(**json.loads(sys.argv[1])))))
