"""Durable copies: their speed compared with ``cp`` to the same disk, a restore compared with ``dcp.load``, and step time.

The disk is that of the directory in TMPDIR (else /var/tmp). Both sides of a ratio read from and write to it, and flush their
writes. Must not use the product's own timings: copies are timed by the coordinator's timeline and by the file system.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from backstay.testing.cluster import LocalCluster
from backstay.testing.wait import wait_until
from bench.arguments import Settings
from bench.driver import World, start_trainers
from bench.measure import Collection, MeasurementError, stolen_cpu_s, stopwatch
from bench.training import waiting_step_s

RUN_ID = "bench-persist"
RUN = f"default/{RUN_ID}"
_SCALE = 2  # times --size: 1 GiB by default
_WARM_SAVES = 3
_DEADLINE_S = 600.0
_POLL_S = 0.01
_PAIRS = 2  # phases of each kind per round, alternating
_PHASE_STEPS = 6  # enough for a copy to be in progress in each of them


def measure_persisting(settings: Settings, scratch: Path, found: Collection) -> None:
    """Copies and restores of one rank on one node, then steps of several."""
    with _disk() as disk:
        _measure_copies(settings, disk, found)
    with _disk() as disk:
        _measure_steps(settings, scratch, disk, found)


@contextmanager
def _disk() -> Iterator[Path]:
    """A directory on a disk, removed afterwards."""
    parent = os.environ.get("TMPDIR", "/var/tmp")
    path = Path(tempfile.mkdtemp(prefix=f"backstay-bench-{os.getpid()}-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _cluster(settings: Settings, disk: Path, *, nodes: int, every_steps: int, parity: int | str) -> LocalCluster:
    (disk / "storage").mkdir(exist_ok=True)
    chosen = {"persist_url": f"file://{disk}/storage", "persist_every_s": 0, "persist_every_steps": every_steps}
    chosen["persist_keep_last"] = 1
    return LocalCluster(nodes, parity=parity, settings=chosen, keep_logs=settings.keep_logs)


def _measure_copies(settings: Settings, disk: Path, found: Collection) -> None:
    with _cluster(settings, disk, nodes=1, every_steps=1, parity=0) as cluster:
        trainers = {"run_id": RUN_ID, "size_bytes": _SCALE * settings.size_bytes, "scratch": disk}
        with start_trainers(cluster, **trainers) as world:  # type: ignore[arg-type]
            world.ask("attach")
            for _ in range(_WARM_SAVES):
                _persist(cluster, world)
            for _ in range(settings.rounds):
                _copy_round(cluster, world, disk, found)
            world.ask("save", method="dcp_save")
            world.kill()
        _wait_copied(cluster)
        for _ in range(settings.rounds):
            _restore_round(cluster, trainers, found)


def _persist(cluster: LocalCluster, world: World) -> tuple[int, float]:
    """Take a snapshot and wait for its durable copy; its step, and the seconds between the coordinator's events."""
    save = world.ask("save", method="backstay")[0]
    if not save["is_taken"]:
        raise MeasurementError(
            f"a snapshot of the persist measurement was skipped: {save['why_not']}", reason="skipped"
        )
    return _wait_copied(cluster)


def _wait_copied(cluster: LocalCluster) -> tuple[int, float]:
    """Wait until the newest snapshot in memory is on the disk."""

    def is_copied() -> bool:
        status = cluster.run_status(RUN)
        return bool(status["storage"]["step"] >= status["complete_step"] > 0)

    wait_until(is_copied, deadline_s=_DEADLINE_S, why="the copy to be whole", evidence=cluster.evidence, poll_s=_POLL_S)
    events = [event for event in cluster.status()["timeline"] if event["run"] == RUN]
    begun = max(event["time_unix_s"] for event in events if event["kind"] == "persisting")
    ended = max(event["time_unix_s"] for event in events if event["kind"] == "persisted")
    return cluster.run_status(RUN)["storage"]["step"], ended - begun


def _copy_round(cluster: LocalCluster, world: World, disk: Path, found: Collection) -> None:
    """``cp`` of the shard from tmpfs, flushed, and the product's copy of the next one."""
    stolen = stolen_cpu_s()
    shard = max(cluster.nodes[0].memory_dir.glob(f"{RUN}/attempt-*/step-*/*.safetensors"))  # the newest
    size = shard.stat().st_size
    target = disk / "copied.safetensors"
    with stopwatch() as watch:
        subprocess.run(["/bin/cp", str(shard), str(target)], check=True)
        subprocess.run(["/bin/sync", str(target)], check=True)
    target.unlink()
    _, seconds = _persist(cluster, world)
    stolen = stolen_cpu_s() - stolen
    found.add("cp", size / watch.seconds, unit="bytes/s", stolen_s=stolen)
    found.add("persist", size / seconds, unit="bytes/s", stolen_s=stolen)
    found.add("persist_vs_cp", watch.seconds / seconds, unit="ratio", stolen_s=stolen)


def _restore_round(cluster: LocalCluster, trainers: dict[str, object], found: Collection) -> None:
    """The node and its memory are gone: ``dcp.load``, and the whole restore(), each of a new trainer on a new node."""
    cluster.destroy_node(0)
    cluster.replace_node(0)
    cluster.wait_live()
    with start_trainers(cluster, **trainers) as world:  # type: ignore[arg-type]
        load = world.ask("load")[0]
        world.kill()
    with start_trainers(cluster, **trainers) as world:  # type: ignore[arg-type]
        restore = world.ask("attach")[0]
        if restore["outcome"] != "EXACT" or restore["step"] == 0:
            raise MeasurementError(f"restore from the disk was {restore}", reason="not_exact")
        world.kill()
    stolen = load["stolen_s"] + restore["stolen_s"]
    found.add("dcp_load_from_disk", load["seconds"], unit="s", stolen_s=load["stolen_s"])
    found.add("persisted_restore", restore["total_s"], unit="s", stolen_s=restore["stolen_s"])
    found.add("persisted_restore_vs_dcp_load", load["seconds"] / restore["total_s"], unit="ratio", stolen_s=stolen)


def _measure_steps(settings: Settings, scratch: Path, disk: Path, found: Collection) -> None:
    """Steps that only wait, each with a snapshot: in a cluster that copies all the time, and in one that does not.

    A step is long enough for protection to keep up where nothing is copied: shorter ones would measure the wait for a slot.
    """
    sizes = {"run_id": RUN_ID, "size_bytes": settings.size_bytes, "scratch": scratch}
    with (
        _cluster(settings, disk, nodes=settings.ranks, every_steps=1, parity="auto") as copying,
        LocalCluster(settings.ranks, parity="auto", keep_logs=settings.keep_logs) as plain,
        start_trainers(copying, **sizes) as with_copies,  # type: ignore[arg-type]
        start_trainers(plain, **sizes) as without,  # type: ignore[arg-type]
    ):
        worlds = {"with": with_copies, "without": without}
        for world in worlds.values():
            world.ask("attach")
        step = {"kind": "waiting", "method": "backstay", "waiting_s": waiting_step_s(plain, without, RUN)}
        with_copies.ask("steps", count=_WARM_SAVES, **step)
        _settle(copying)
        for index in range(_PAIRS * settings.rounds):
            seconds, stolen = {}, stolen_cpu_s()
            for name in ("with", "without") if index % 2 else ("without", "with"):
                seconds[name] = _phase(worlds[name], step, name, found)
                _settle(copying)
            ratio = seconds["with"] / seconds["without"]
            found.add("step_overhead_persisting", ratio, unit="ratio", stolen_s=stolen_cpu_s() - stolen)
        found.note("step_overhead_persisting", waiting_step_s=step["waiting_s"], steps_per_phase=_PHASE_STEPS)
        for world in worlds.values():
            world.ask("finish")


def _phase(world: World, step: dict[str, Any], name: str, found: Collection) -> float:
    """Mean step of a short phase without its slowest one; a step lasts as long as on its slowest rank."""
    answers = world.ask("steps", count=_PHASE_STEPS, **step)
    steps = [max(ranks) for ranks in zip(*(answer["step_s"] for answer in answers), strict=True)]
    mean = statistics.fmean(sorted(steps)[:-1])
    found.add(f"persisting_step_{name}", mean, unit="s")
    found.add(f"persisting_snapshots_per_step_{name}", answers[0]["taken"] / (_PHASE_STEPS + 1), unit="ratio")
    return mean


def _settle(cluster: LocalCluster) -> None:
    """Return when no copy is under way: the other cluster's steps are measured without it."""
    deadline = time.monotonic() + _DEADLINE_S
    wait_until(
        lambda: cluster.run_status(RUN)["storage"]["upload"] is None,
        deadline_s=deadline - time.monotonic(),
        why="the copies to end",
        evidence=cluster.evidence,
        poll_s=_POLL_S,
    )
