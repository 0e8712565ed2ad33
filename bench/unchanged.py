"""What a snapshot costs when nearly nothing changed: the same amount of state, all of it trained and 99 % of it frozen.

One node and one rank for either, one after the other: both at once would not fit where one does. Knows nothing of how
unchanged tensors are found.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from backstay.testing.cluster import LocalCluster
from bench.arguments import Settings
from bench.driver import World, start_trainers
from bench.measure import Collection, MeasurementError

FROZEN = 0.99
_SCALE = 8  # times --size: a commit has a few milliseconds that do not depend on its bytes, and shards have gigabytes
_WARM_SAVES = 5  # plan, map both slots, the byte checks that follow an attach, and a slot each of what does not change
_SAVES = 5


def measure_frozen(settings: Settings, scratch: Path, found: Collection) -> None:
    """Capture, digest and commit of either state; each round with trainers of its own."""
    size = _SCALE * settings.size_bytes
    with LocalCluster(1, parity=0, keep_logs=settings.keep_logs) as cluster:
        for index in range(settings.rounds):
            costs = {}
            for name, frozen in (("full", 0.0), ("frozen", FROZEN)):
                run_id = f"bench-{name}-{index}"
                with start_trainers(
                    cluster, run_id=run_id, size_bytes=size, scratch=scratch / run_id, frozen=frozen
                ) as world:
                    costs[name] = _measure(name, world, found)
            for key in ("seconds", "cpu", "bytes"):
                stolen = costs["full"]["stolen"] + costs["frozen"]["stolen"]
                ratio = costs["frozen"][key] / costs["full"][key]
                found.add("frozen_cost" if key == "seconds" else f"frozen_{key}", ratio, unit="ratio", stolen_s=stolen)


def _measure(name: str, world: World, found: Collection) -> dict[str, float]:
    """Costs of a save per byte: the best of times (bursts of other work are most of a few milliseconds), the median of CPU."""
    world.ask("attach")
    for _ in range(_WARM_SAVES):
        world.ask("save", method="backstay")
    saves: list[dict[str, Any]] = []
    for _ in range(_SAVES):
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
