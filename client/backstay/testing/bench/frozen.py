"""What a snapshot costs when nearly nothing changed: the same amount of state, all of it trained and 99 % of it frozen.

One node and one rank for each of the two, in turns. Knows nothing of how unchanged tensors are found.
"""

from __future__ import annotations

from pathlib import Path

from backstay.testing.bench.arguments import Settings
from backstay.testing.bench.driver import World, start_trainers
from backstay.testing.bench.measure import Collection, MeasurementError
from backstay.testing.cluster import LocalCluster

FROZEN = 0.99
_SCALE = 2  # times --size: a commit has a few milliseconds that do not depend on its bytes
_WARM_SAVES = 5  # plan, map both slots, the byte checks that follow an attach, and a slot each of what does not change


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
            _round(full, frozen, found)
        for world in (full, frozen):
            world.ask("finish")


def _round(full: World, frozen: World, found: Collection) -> None:
    """Best of three of each: a burst of stolen CPU is most of a commit of milliseconds."""
    seconds, stolen, moved = {}, 0.0, {}
    for name, world in (("full", full), ("frozen", frozen)):
        saves = [world.ask("save", method="backstay")[0] for _ in range(3)]
        for save in saves:
            if not save["is_taken"]:
                raise MeasurementError(
                    f"a snapshot of the {name} state was skipped: {save['why_not']}", reason="skipped"
                )
        stolen += sum(save["stolen_s"] for save in saves)
        seconds[name] = min(save["seconds"] for save in saves) / world.size_bytes
        moved[name] = max(save["hashed_bytes"] for save in saves) / world.size_bytes
        found.add(f"commit_{name}", min(save["seconds"] for save in saves), unit="s", stolen_s=stolen)
    found.add("frozen_cost", seconds["frozen"] / seconds["full"], unit="ratio", stolen_s=stolen)
    found.add("frozen_bytes", moved["frozen"] / moved["full"], unit="ratio", stolen_s=stolen)
