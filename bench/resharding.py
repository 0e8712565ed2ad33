"""Four ranks' state read by a world of three, straight from memory: bytes moved, and how fast, beside one raw TCP stream."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from backstay.ids import new_incarnation
from backstay.testing.cluster import LocalCluster
from backstay.testing.wait import wait_until
from bench.arguments import Settings
from bench.baselines import RawTcp
from bench.driver import start_publishers
from bench.measure import Collection, MeasurementError, stolen_cpu_s

RUN: Final = "default/bench-reshard"
FROM_RANKS: Final = 4
TO_RANKS: Final = 3
_LARGEST_TCP_BYTES: Final = 512 * 1024**2
_DEADLINE_S: Final = 300.0


def measure_resharding(settings: Settings, scratch: Path, found: Collection) -> None:
    """One cluster per round: a world of four commits and is protected, dies, and comes back as three."""
    size = min(settings.protect_size_bytes, _LARGEST_TCP_BYTES)
    with RawTcp(scratch / "raw-tcp-reshard", size) as tcp:
        for _ in range(settings.rounds):
            with LocalCluster(FROM_RANKS, 1, FROM_RANKS, keep_logs=settings.keep_logs) as cluster:
                _round(settings, cluster, tcp, found)


def _round(settings: Settings, cluster: LocalCluster, tcp: RawTcp, found: Collection) -> None:
    module = "bench.light_reshard_rank"
    world = start_publishers(
        cluster, run=RUN, world_id=new_incarnation(), size_bytes=settings.protect_size_bytes, module=module
    )
    try:
        world.ask("attach")
        if any("skipped" in answer for answer in world.ask("publish", step=1)):
            raise MeasurementError("the first step was skipped", reason="skipped")
        _wait(cluster)
    finally:
        world.kill()
    stolen = stolen_cpu_s()
    tcp_rate = tcp.size_bytes / tcp.receive().seconds
    again = start_publishers(
        cluster, run=RUN, world_id="", size_bytes=settings.protect_size_bytes, module=module, ranks=TO_RANKS
    )
    with again:
        answers = again.ask("reshard", world_size=TO_RANKS, world_id=new_incarnation())
    stolen = stolen_cpu_s() - stolen
    needed = sum(answer["needed"] for answer in answers)
    seconds = max(answer["end"] for answer in answers) - min(answer["begin"] for answer in answers)
    found.add("reshard", needed / seconds, unit="bytes/s", stolen_s=stolen)
    found.add("reshard_vs_tcp", needed / seconds / tcp_rate, unit="ratio", stolen_s=stolen)
    found.add("reshard_moved_vs_needed", sum(a["moved"] for a in answers) / needed, unit="ratio", stolen_s=stolen)


def _wait(cluster: LocalCluster) -> None:
    wait_until(
        lambda: cluster.run_status(RUN)["protected_step"] >= 1,
        deadline_s=_DEADLINE_S,
        why="step 1 to be protected",
        evidence=cluster.evidence,
    )
