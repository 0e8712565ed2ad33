"""Idle cost: CPU and memory of a node that holds a protected run while nobody trains, and of its coordinator.

Reads /proc of the daemons and their children; the arena is not counted, its pages are shared memory.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

from backstay.testing.cluster import LocalCluster
from backstay.testing.daemons import COORDINATOR, DAEMON_ROLE
from bench.arguments import Settings
from bench.driver import attach, publish, start_light_ranks
from bench.measure import Collection, stolen_cpu_s

RUN: Final = "default/bench-rest"
_STEPS: Final = 3
_DEADLINE_S: Final = 120.0
_NODES: Final = 2


def measure_rest(settings: Settings, scratch: Path, found: Collection) -> None:
    """Rounds of ``rest_s`` seconds; the default lease, so the default number of heartbeats."""
    with LocalCluster(
        nodes=_NODES, parity=1, group_size=_NODES, root=scratch / "rest", keep_logs=settings.keep_logs
    ) as cluster:
        hold_a_run(cluster, size_bytes=settings.size_bytes)
        node, coordinator = cluster.nodes[0].name, COORDINATOR
        for _ in range(settings.rounds):
            stolen = stolen_cpu_s()
            before = {name: _cpu_s(cluster, name) for name in (node, coordinator)}
            begin = time.monotonic()
            time.sleep(settings.rest_s)
            seconds = time.monotonic() - begin
            stolen = stolen_cpu_s() - stolen
            for name, key in ((node, "rest"), (coordinator, "rest_coordinator")):
                share = (_cpu_s(cluster, name) - before[name]) / seconds
                found.add(f"{key}_cores", share, unit="cores", stolen_s=stolen)
                found.add(f"{key}_mib", memory_bytes(cluster, name) / 1024**2, unit="MiB", stolen_s=stolen)


def hold_a_run(cluster: LocalCluster, *, size_bytes: int) -> None:
    """Protect a run with one rank per node, then stop its trainers."""
    with start_light_ranks(cluster, run=RUN, size_bytes=size_bytes) as world:
        attach(world)
        for step in range(1, _STEPS + 1):
            publish(world, step)
            cluster.wait_until(
                lambda step=step: cluster.run_status(RUN)["protected_step"] >= step,  # type: ignore[misc]
                _DEADLINE_S,
                f"step {step} to be protected",
            )
    cluster.wait_until(
        lambda: not cluster.node_status(0)["runs"][0]["sessions"], _DEADLINE_S, "the trainers to be gone"
    )


def memory_bytes(cluster: LocalCluster, name: str) -> int:
    """Memory of a daemon and its coders: proportional set size without shared memory (which the arena is)."""
    total = 0
    for pid in cluster.keeper.pids(node=name, role=DAEMON_ROLE):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        sizes = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        total += sizes["Pss"] - sizes.get("Pss_Shmem", 0)
    return total


def _cpu_s(cluster: LocalCluster, name: str) -> float:
    """CPU seconds of a daemon's living threads and those of its coders, to the nanosecond."""
    total_ns = 0
    for pid in cluster.keeper.pids(node=name, role=DAEMON_ROLE):
        for schedule in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            total_ns += int(schedule.read_text().split()[0])
    return total_ns / 1e9
