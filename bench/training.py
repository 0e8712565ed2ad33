"""What snapshots cost a trainer: how long they block, how much they slow steps, how fast state is committed and loaded.

Two clusters: one node and one rank for a single trainer, and one rank per node, protected, for steps. Backstay, the
alternatives and the baselines alternate within each round.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backstay.testing.cluster import LocalCluster
from bench.arguments import Settings
from bench.driver import World, burner, start_trainers
from bench.measure import Collection, MeasurementError, stopwatch

PEERS = ("dcp_save", "dcp_async_save")
RUN_ID = "bench"
RUN = f"default/{RUN_ID}"
_WARM_SAVES = 4  # plan, map both slots, and the byte checks that follow an attach
FROZEN_SHARE = 0.99
_FROZEN_SCALE = (
    8  # times --size: a commit has a few milliseconds that do not depend on its bytes, and shards have gigabytes
)
_FROZEN_WARM_SAVES = (
    5  # plan, map both slots, the byte checks that follow an attach, and a slot each of what does not change
)
_FROZEN_SAVES = 5
_PROTECT_DEADLINE_S = 300.0
_SHORTEST_WAIT_S = 0.3
_WAIT_PER_PROTECT = 1.5  # margin within which protection keeps up with steps


def measure_solo(settings: Settings, scratch: Path, found: Collection) -> None:
    """Commit with and without a spare core, local restore, and the alternatives' save and load: one rank, one node."""
    with (
        LocalCluster(1, parity=0, keep_logs=settings.keep_logs) as cluster,
        start_trainers(cluster, run_id=RUN_ID, size_bytes=settings.size_bytes, scratch=scratch) as world,
    ):
        world.ask("attach")
        for _ in range(settings.rounds):
            for _ in range(_WARM_SAVES):
                world.ask("save", method="backstay")
            _save_beside_memcpy(world, found, "")
            with burner(max(os.sched_getaffinity(0))):
                _save_beside_memcpy(world, found, "_busy")
            _restore_beside_memcpy(world, found)
            if settings.has_peers:
                _peers_alone(world, found)
        world.ask("finish")


def _save_beside_memcpy(world: World, found: Collection, suffix: str) -> None:
    copy = world.ask("memcpy")[0]
    save = world.ask("save", method="backstay")[0]
    if not save["is_taken"]:
        raise MeasurementError(f"a snapshot of the commit measurement was skipped: {save['why_not']}", reason="skipped")
    found.add(f"memcpy{suffix}", world.size_bytes / copy["to_tmpfs_s"], unit="bytes/s", stolen_s=copy["stolen_s"])
    found.add(f"commit{suffix}", world.size_bytes / save["seconds"], unit="bytes/s", stolen_s=save["stolen_s"])
    stolen = copy["stolen_s"] + save["stolen_s"]
    found.add(f"commit_vs_memcpy{suffix}", copy["to_tmpfs_s"] / save["seconds"], unit="ratio", stolen_s=stolen)


def _restore_beside_memcpy(world: World, found: Collection) -> None:
    copy = world.ask("memcpy")[0]
    restore = world.ask("attach")[0]
    if restore["outcome"] != "EXACT":
        raise MeasurementError(f"restore was {restore['outcome']}, not EXACT", reason="not_exact")
    found.add("restore", world.size_bytes / restore["load_s"], unit="bytes/s", stolen_s=restore["stolen_s"])
    found.add("restore_call", restore["total_s"], unit="s", stolen_s=restore["stolen_s"])
    found.add("restore_vs_memcpy", copy["from_tmpfs_s"] / restore["load_s"], unit="ratio", stolen_s=restore["stolen_s"])


def _peers_alone(world: World, found: Collection) -> None:
    copy = world.ask("memcpy")[0]
    for method in PEERS:
        save = world.ask("save", method=method)[0]
        stolen = save["stolen_s"]
        found.add(f"{method}.commit", world.size_bytes / save["seconds"], unit="bytes/s", stolen_s=stolen)
        found.add(f"{method}.commit_vs_memcpy", copy["to_tmpfs_s"] / save["seconds"], unit="ratio", stolen_s=stolen)
    load = world.ask("load")[0]
    found.add("dcp_load.restore", world.size_bytes / load["seconds"], unit="bytes/s", stolen_s=load["stolen_s"])
    found.add(
        "dcp_load.restore_vs_memcpy", copy["from_tmpfs_s"] / load["seconds"], unit="ratio", stolen_s=load["stolen_s"]
    )
    for method in PEERS:
        world.ask("remove", method=method)


def measure_frozen(settings: Settings, scratch: Path, found: Collection) -> None:
    """Capture, digest and commit of as much state, all of it trained and 99 % of it frozen; each round with own trainers.

    One node and one rank for either, one after the other: both at once would not fit where one does.
    """
    size = _FROZEN_SCALE * settings.size_bytes
    with LocalCluster(1, parity=0, keep_logs=settings.keep_logs) as cluster:
        for index in range(settings.rounds):
            costs = {}
            for name, frozen in (("full", 0.0), ("frozen", FROZEN_SHARE)):
                run_id = f"bench-{name}-{index}"
                with start_trainers(
                    cluster, run_id=run_id, size_bytes=size, scratch=scratch / run_id, frozen=frozen
                ) as world:
                    costs[name] = _frozen_costs(name, world, found)
            for key in ("seconds", "cpu", "bytes"):
                stolen = costs["full"]["stolen"] + costs["frozen"]["stolen"]
                ratio = costs["frozen"][key] / costs["full"][key]
                found.add("frozen_cost" if key == "seconds" else f"frozen_{key}", ratio, unit="ratio", stolen_s=stolen)


def _frozen_costs(name: str, world: World, found: Collection) -> dict[str, float]:
    """Costs of a save per byte: the best of times (bursts of other work are most of a few milliseconds), the median of CPU."""
    world.ask("attach")
    for _ in range(_FROZEN_WARM_SAVES):
        world.ask("save", method="backstay")
    saves: list[dict[str, Any]] = []
    for _ in range(_FROZEN_SAVES):
        save = world.ask("save", method="backstay")[0]
        if not save["is_taken"]:
            raise MeasurementError(f"a snapshot of the {name} state was skipped: {save['why_not']}", reason="skipped")
        saves.append(save)
    world.ask("finish")
    stolen = sum(save["stolen_s"] for save in saves)
    seconds = min(save["seconds"] for save in saves)
    cpu = statistics.median(save["cpu_s"] for save in saves)
    found.add(f"commit_{name}", seconds, unit="s", stolen_s=stolen)
    found.add(f"commit_cpu_{name}", cpu, unit="s", stolen_s=stolen)
    moved = max(save["hashed_bytes"] for save in saves)
    size = world.size_bytes
    return {"seconds": seconds / size, "cpu": cpu / size, "bytes": moved / size, "stolen": stolen}


def measure_steps(settings: Settings, scratch: Path, found: Collection) -> None:
    """Step time with a save every step over step time without, for steps that wait and steps that compute."""
    with (
        LocalCluster(settings.ranks, parity="auto", keep_logs=settings.keep_logs) as cluster,
        start_trainers(cluster, run_id=RUN_ID, size_bytes=settings.size_bytes, scratch=scratch) as world,
    ):
        world.ask("attach")
        waiting_s = waiting_step_s(cluster, world)
        world.ask("calibrate", seconds=settings.cpu_step_s)
        methods = ("none", "backstay", *(PEERS if settings.has_peers else ()))
        for index in range(settings.rounds):
            turn = index % len(methods)
            for kind in ("waiting", "cpu"):
                _Round(settings, cluster, world, found, kind, waiting_s).run(methods[turn:] + methods[:turn])
        found.note("step_overhead_waiting", waiting_step_s=waiting_s, ranks=settings.ranks)
        found.note("step_overhead_cpu", ranks=settings.ranks)
        world.ask("finish")


def waiting_step_s(cluster: LocalCluster, world: World, run: str = RUN) -> float:
    """A step duration with which protection keeps up, measured by protecting a few snapshots."""
    seconds = 0.0
    for _ in range(_WARM_SAVES):
        with stopwatch() as watch:
            step = world.ask("steps", count=0, kind="waiting", method="backstay")[0]["step"]
            wait_protected(cluster, step, run)
        seconds = watch.seconds
    return max(_SHORTEST_WAIT_S, _WAIT_PER_PROTECT * seconds)


@dataclass(slots=True)
class _Round:
    """One turn of every method with one kind of step."""

    settings: Settings
    cluster: LocalCluster
    world: World
    found: Collection
    kind: str
    waiting_s: float
    mean_s: dict[str, float] = field(default_factory=dict)
    stolen_s: dict[str, float] = field(default_factory=dict)

    def run(self, methods: Sequence[str]) -> None:
        for method in methods:
            self._steps(method)
        for method in methods:
            if method != "none":
                ratio = self.mean_s[method] / self.mean_s["none"]
                stolen = self.stolen_s[method] + self.stolen_s["none"]
                self.found.add(f"{_prefix(method)}step_overhead_{self.kind}", ratio, unit="ratio", stolen_s=stolen)

    def _steps(self, method: str) -> None:
        answers = self.world.ask(
            "steps", count=self.settings.steps, kind=self.kind, method=method, waiting_s=self.waiting_s
        )
        mean = self.mean_s[method] = max(statistics.fmean(answer["step_s"]) for answer in answers)
        stolen = self.stolen_s[method] = answers[0]["stolen_s"]
        name = f"step_{self.kind}_alone" if method == "none" else f"{_prefix(method)}step_{self.kind}"
        self.found.add(name, mean, unit="s", stolen_s=stolen)
        if method == "none":
            return
        if self.kind == "waiting":
            for seconds in (one for answer in answers for one in answer["block_s"]):
                self.found.add(f"{_prefix(method)}block_ms", 1000 * seconds, unit="ms", stolen_s=0.0)
        if method == "backstay":
            taken = statistics.fmean(answer["taken"] for answer in answers) / (self.settings.steps + 1)
            self.found.add(f"snapshots_per_step_{self.kind}", taken, unit="ratio")
            wait_quiet(self.cluster)
        else:
            held = max(answer["held_bytes"] for answer in self.world.ask("remove", method=method))
            self.found.add(f"{_prefix(method)}memory_vs_state", held / self.world.size_bytes, unit="ratio")


def _prefix(method: str) -> str:
    return "" if method in ("none", "backstay") else f"{method}."


def wait_quiet(cluster: LocalCluster, run: str = RUN) -> None:
    """Return when every complete snapshot is protected, so that their traffic does not disturb the next measurement."""

    def is_quiet() -> bool:
        status = cluster.run_status(run)
        return bool(status["protected_step"]) and status["protected_step"] >= status["complete_step"]

    cluster.wait_until(is_quiet, deadline_s=_PROTECT_DEADLINE_S, why=f"all snapshots of {run} to be protected")


def wait_protected(cluster: LocalCluster, step: int, run: str = RUN) -> None:
    """Return when the snapshot of ``step`` or a newer one is protected."""
    cluster.wait_until(
        lambda: cluster.run_status(run)["protected_step"] >= step,
        deadline_s=_PROTECT_DEADLINE_S,
        why=f"step {step} of {run} to be protected",
    )
