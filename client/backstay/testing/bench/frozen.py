"""What a snapshot costs when nearly nothing changed: the same amount of state, all of it trained and 99 % of it frozen.

One node and one rank for each of the two, saving in turns. Knows nothing of how unchanged tensors are found.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from backstay.testing.bench.arguments import Settings
from backstay.testing.bench.driver import World, start_trainers
from backstay.testing.bench.measure import Collection, MeasurementError
from backstay.testing.cluster import LocalCluster

FROZEN = 0.99
_SCALE = 4  # times --size: a commit has a few milliseconds that do not depend on its bytes
_WARM_SAVES = 5  # plan, map both slots, the byte checks that follow an attach, and a slot each of what does not change
_PAIRS = 5


def measure_frozen(settings: Settings, scratch: Path, found: Collection) -> None:
    """Capture, digest and commit of either state."""
    size = _SCALE * settings.size_bytes
    with (
        LocalCluster(1, parity=0, keep_logs=settings.keep_logs) as cluster,
        start_trainers(cluster, run_id="bench-full", size_bytes=size, scratch=scratch) as full,
        start_trainers(cluster, run_id="bench-frozen", size_bytes=size, scratch=scratch, frozen=FROZEN) as frozen,
    ):
        for world in (full, frozen):
            world.ask("attach")
            for _ in range(_WARM_SAVES):
                world.ask("save", method="backstay")
        for _ in range(settings.rounds):
            _round({"full": full, "frozen": frozen}, found)
        for world in (full, frozen):
            world.ask("finish")


def _round(worlds: dict[str, World], found: Collection) -> None:
    """Pairs of saves. Of times the best: a burst of other work is most of a commit of milliseconds. Of CPU the median."""
    saves: dict[str, list[dict[str, Any]]] = {name: [] for name in worlds}
    for _ in range(_PAIRS):
        for name, world in worlds.items():
            save = world.ask("save", method="backstay")[0]
            if not save["is_taken"]:
                raise MeasurementError(
                    f"a snapshot of the {name} state was skipped: {save['why_not']}", reason="skipped"
                )
            saves[name].append(save)
    stolen = sum(save["stolen_s"] for taken in saves.values() for save in taken)
    seconds, cpu, moved = {}, {}, {}
    for name, world in worlds.items():
        seconds[name] = min(save["seconds"] for save in saves[name])
        cpu[name] = statistics.median(save["cpu_s"] for save in saves[name])
        found.add(f"commit_{name}", seconds[name], unit="s", stolen_s=stolen)
        found.add(f"commit_cpu_{name}", cpu[name], unit="s", stolen_s=stolen)
        moved[name] = max(save["hashed_bytes"] for save in saves[name])
        for per_byte in (seconds, cpu, moved):
            per_byte[name] /= world.size_bytes
    for key, cost in (("frozen_cost", seconds), ("frozen_cpu", cpu), ("frozen_bytes", moved)):
        found.add(key, cost["frozen"] / cost["full"], unit="ratio", stolen_s=stolen)
