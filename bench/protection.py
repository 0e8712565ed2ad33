"""Throughput of the daemons together: state protected per second, lost shards rebuilt per second, memory used.

A group of real daemons and ranks that only commit bytes, beside one raw TCP stream over the same loopback. The clock runs
from the last rank's commit until the coordinator's status reports the snapshot as protected.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from backstay.testing.cluster import LocalCluster
from backstay.testing.wait import wait_until
from bench.arguments import Settings
from bench.baselines import RawTcp
from bench.driver import World, attach, publish, start_light_ranks
from bench.measure import Collection, MeasurementError, stolen_cpu_s

RUN = "default/bench-protect"
_WARM_SNAPSHOTS = 3  # both slots of every rank and the connections of every coder
_DEADLINE_S = 600.0
_POLL_S = 0.02
_LARGEST_TCP_BYTES = 512 * 1024**2


class ProtectedGroup:
    """A cluster of ``protect_nodes`` daemons with a rank on each, and the snapshots it takes."""

    def __init__(self, settings: Settings, cluster: LocalCluster, tcp: RawTcp, found: Collection) -> None:
        self._settings = settings
        self._cluster = cluster
        self._tcp = tcp
        self._found = found
        self._step = 0
        self._world = self._new_world()

    def measure(self) -> None:
        try:
            for _ in range(_WARM_SNAPSHOTS):
                self._snapshot()
            for _ in range(self._settings.rounds):
                self._protect_round()
            for index in range(self._settings.rebuild_rounds):
                self._rebuild_round(index % self._settings.protect_nodes)
        finally:
            self._world.close()

    def _new_world(self) -> World:
        world = start_light_ranks(self._cluster, run=RUN, size_bytes=self._settings.protect_size_bytes)
        try:
            self._step = attach(world)
        except BaseException:
            world.kill()
            raise
        return world

    def _snapshot(self) -> float:
        """Commit the next step on every rank; seconds from the last commit until it is protected."""
        self._step += 1
        publish(self._world, self._step)
        begin = time.perf_counter()
        step = self._step
        self._wait(lambda: self._cluster.run_status(RUN)["protected_step"] >= step, f"step {step} to be protected")
        return time.perf_counter() - begin

    def _protect_round(self) -> None:
        stolen = stolen_cpu_s()
        tcp_rate = self._tcp.size_bytes / self._tcp.receive().seconds
        seconds = self._snapshot()
        rate = self._world.size_bytes * self._settings.protect_nodes / seconds
        stolen = stolen_cpu_s() - stolen
        self._found.add("tcp", tcp_rate, unit="bytes/s", stolen_s=stolen)
        self._found.add("protect", rate, unit="bytes/s", stolen_s=stolen)
        self._found.add("protect_vs_tcp", rate / tcp_rate, unit="ratio", stolen_s=stolen)
        state_bytes = self._world.size_bytes * self._settings.protect_nodes
        self._found.add("memory_vs_state", self._held_bytes() / state_bytes, unit="ratio")

    def _rebuild_round(self, index: int) -> None:
        """Destroy a node; time from the coordinator's order to rebuild until its shard is whole on a live node again."""
        stolen = stolen_cpu_s()
        tcp_rate = self._tcp.size_bytes / self._tcp.receive().seconds
        name = self._cluster.nodes[index].name
        destroyed = time.time()
        self._cluster.destroy_node(index)
        self._wait(lambda: self._state_of(name) == "lost", f"{name} to be declared lost")
        self._wait(self._has_every_shard, f"the shard of {name} to be rebuilt")
        rebuilt = time.time()
        self._wait(lambda: self._cluster.run_status(RUN)["protected_step"] >= self._step, "protection by the survivors")
        repaired = time.time()
        ordered = self._time_of_order(destroyed)  # before it, the coordinator waits a lease for a replacement
        stolen = stolen_cpu_s() - stolen
        rate = self._world.size_bytes / (rebuilt - ordered)
        self._found.add("rebuild", rate, unit="bytes/s", stolen_s=stolen)
        self._found.add("rebuild_vs_tcp", rate / tcp_rate, unit="ratio", stolen_s=stolen)
        self._found.add("repair_after_rebuild", repaired - rebuilt, unit="s", stolen_s=stolen)
        self._found.add("rebuild_from_loss", rebuilt - destroyed, unit="s", stolen_s=stolen)
        self._world.kill()
        self._cluster.replace_node(index)
        self._cluster.wait_live()
        self._world = self._new_world()
        for _ in range(_WARM_SNAPSHOTS):
            self._snapshot()

    def _time_of_order(self, after_unix_s: float) -> float:
        """When the coordinator ordered the rebuild, from its timeline."""
        for event in self._cluster.status()["timeline"]:
            if event["kind"] == "rebuild" and event["run"] == RUN and event["time_unix_s"] >= after_unix_s:
                return float(event["time_unix_s"])
        raise MeasurementError("the timeline has no rebuild after the loss of a node", reason="no_rebuild")

    def _state_of(self, name: str) -> str:
        states: dict[str, Any] = {node["name"]: node["state"] for node in self._cluster.status()["nodes"]}
        return str(states.get(name, "lost"))

    def _has_every_shard(self) -> bool:
        snapshots = self._cluster.run_status(RUN)["snapshots"]
        kept = [snapshot for snapshot in snapshots if snapshot["step"] == self._step]
        live = {node["name"] for node in self._cluster.status()["nodes"] if node["state"] == "live"}
        return bool(kept) and all(live.intersection(shard["nodes"]) for shard in kept[0]["shards"])

    def _held_bytes(self) -> int:
        return sum(held_bytes(node.memory_dir) for node in self._cluster.nodes)

    def _wait(self, condition: Any, why: str) -> None:
        wait_until(condition, deadline_s=_DEADLINE_S, why=why, evidence=self._cluster.evidence, poll_s=_POLL_S)


def measure_protection(settings: Settings, scratch: Path, found: Collection) -> None:
    """Protect, rebuild and memory of one group."""
    size = min(settings.protect_size_bytes, _LARGEST_TCP_BYTES)
    with (
        RawTcp(scratch / "raw-tcp", size) as tcp,
        LocalCluster(
            settings.protect_nodes, settings.parity, settings.protect_nodes, keep_logs=settings.keep_logs
        ) as cluster,
    ):
        ProtectedGroup(settings, cluster, tcp, found).measure()


def held_bytes(directory: Path) -> int:
    """Bytes of tmpfs that the files below ``directory`` occupy, each inode once."""
    blocks: dict[int, int] = {}
    for path in directory.rglob("*"):
        try:
            found = path.stat()
        except FileNotFoundError:
            continue  # renamed or removed between listing and stat
        if path.is_file():
            blocks[found.st_ino] = found.st_blocks * 512
    return sum(blocks.values())
