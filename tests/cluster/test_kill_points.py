"""SIGKILL at every named point of a snapshot and of a recovery: a protected snapshot stays restorable, and the cluster heals.

One walk over ``backstay.faults.POINTS``; a point without a scenario fails the last test. The trainer's own points are walked
with real trainers in ``test_kill_trainer_points.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from backstay import faults
from backstay.testing import LocalCluster
from tests.cluster.test_kill_storage_points import FETCH_POINTS, UPLOAD_POINTS
from tests.kit.light_world import Ranks, light_world

RUN = "default/killed"
LEASE_S = 1.0
PARITY = 2  # with one, nothing is forwarded
TRAINER_POINTS = ("after_slot", "mid_copy", "before_commit", "after_commit")
# point -> where it is reached: key=value pairs, and who dies: the process alone or its whole group (a daemon with its coders)
SNAPSHOT_POINTS = {
    "before_publish": ("step=3", "kill"),
    "after_publish": ("step=3", "kill"),
    "mid_encode": ("step=3", "killgroup"),
    "mid_forward": ("step=3", "killgroup"),
    "mid_release": ("step=2", "kill"),
}
RECOVERY_POINTS = {"mid_rebuild": "killgroup", "mid_fetch": "killgroup", "decided": "kill", "recorded_on_some": "kill"}


@contextmanager
def _cluster(tmp_path: Path, fault: str, *, nodes: int = 4, is_of_coordinator: bool = False) -> Iterator[LocalCluster]:
    environment = {"BACKSTAY_FAULTS": fault}
    with LocalCluster(
        nodes,
        PARITY,
        lease_s=LEASE_S,
        env=None if is_of_coordinator else environment,
        coordinator_env=environment if is_of_coordinator else None,
        keep_logs=tmp_path / "logs",
    ) as cluster:
        yield cluster


def _revive(cluster: LocalCluster) -> None:
    """Restart whatever the fault killed, as systemd would."""
    coordinator = cluster.coordinator_process
    if coordinator is not None and coordinator.poll() is not None:
        cluster.restart_coordinator()
    for node in cluster.nodes:
        if not node.is_destroyed and node.daemon is not None and node.daemon.poll() is not None:
            cluster.restart_daemon(node.index)
    cluster.wait_live()


def _is_dead(cluster: LocalCluster) -> bool:
    processes = [cluster.coordinator_process, *(node.daemon for node in cluster.nodes if not node.is_destroyed)]
    return any(process is not None and process.poll() is not None for process in processes)


def _restore_exactly(cluster: LocalCluster, *, steps: tuple[int, ...]) -> None:
    """Restore in new worlds until one gets through (a daemon may die under the first); never a step on some ranks only."""
    for _ in range(3):
        with light_world(cluster, RUN) as world:
            answers = world.restore()
            got = {answer["step"] for answer in answers if "step" in answer}
            assert len(got) <= 1, f"ranks got different steps: {answers}"
            if all("step" in answer for answer in answers):
                step = int(got.pop())
                world.check_restored(answers, step, outcome="")
                assert step in steps, f"restored step {step}, not one of {steps}: {answers}"
                world.protect(step + 1)  # the cluster has healed
                return
        _revive(cluster)
    raise AssertionError(f"no world was restored: {answers}\n{cluster.evidence()}")


def _answers_of(world: Ranks) -> list[dict[str, Any]]:
    """The ranks' answers, up to the first error: a trainer that gets one dies, and its world with it."""
    waiting = list(world.ranks)
    answers: list[dict[str, Any]] = []
    while waiting and not any("error" in answer for answer in answers):
        for rank in list(waiting):
            if rank.has_answered(0.05):
                answers.append(rank.receive())
                waiting.remove(rank)
    return answers


@pytest.mark.parametrize("point", SNAPSHOT_POINTS)
def test_a_kill_at_this_point_of_a_snapshot_leaves_a_protected_one(point: str, tmp_path: Path) -> None:
    where, action = SNAPSHOT_POINTS[point]
    marker = tmp_path / "died"
    with _cluster(tmp_path, f"{point},{where},once={marker}:{action}") as cluster:
        with light_world(cluster, RUN) as world:
            world.start_fresh()
            world.protect(1, 2)
            world.ask_all("publish", step=3)
            cluster.wait_until(marker.exists, 60, f"point {point} to be reached")
            cluster.wait_until(lambda: _is_dead(cluster), 20, f"a process to die at {point}")
            world.kill()
        _revive(cluster)
        _restore_exactly(cluster, steps=(2, 3))


@pytest.mark.parametrize("point", RECOVERY_POINTS)
def test_a_kill_at_this_point_of_a_recovery_does_not_change_what_is_restored(point: str, tmp_path: Path) -> None:
    marker = tmp_path / "died"
    fault = f"{point},once={marker}:{RECOVERY_POINTS[point]}"
    is_of_coordinator = RECOVERY_POINTS[point] == "kill"
    if is_of_coordinator:
        fault = f"{point},nth=2,once={marker}:kill"  # the first decision is that the run is new
    with _cluster(tmp_path, fault, is_of_coordinator=is_of_coordinator) as cluster:
        with light_world(cluster, RUN) as world:
            world.start_fresh()
            world.protect(1, 2)
            world.kill()
        places = [0, 1, 2, 3]
        if point == "mid_fetch":
            places = [1, 0, 2, 3]  # ranks 0 and 1 land on each other's node: their shards are fetched
        else:
            cluster.destroy_node(1)
            cluster.replace_node(1)
        with light_world(cluster, RUN, nodes=places) as world:
            if not _attach(world, cluster, marker):
                _restore_exactly(cluster, steps=(2,))
                return
            for rank in world.ranks:
                rank.send("restore")
            cluster.wait_until(marker.exists, 60, f"point {point} to be reached")
            cluster.wait_until(lambda: _is_dead(cluster), 20, f"a process to die at {point}")
            _revive(cluster)
            answers = _answers_of(world)
            got = {answer["step"] for answer in answers if "step" in answer}
            assert got <= {2}, answers
            if len(answers) == len(world.ranks) and all("step" in answer for answer in answers):
                answers.sort(key=lambda answer: str(answer["shards"])[:4])
                world.check_restored(answers, 2, outcome="")
            world.kill()
        _restore_exactly(cluster, steps=(2,))


def _attach(world: Ranks, cluster: LocalCluster, marker: Path) -> bool:
    """False if the fault came first: on a slow machine the daemons repair by themselves before the world is there."""
    try:
        world.attach()
    except AssertionError:
        if not marker.exists():
            raise
        world.kill()
        _revive(cluster)
        return False
    return True


def test_every_fault_point_has_a_scenario() -> None:
    storage_points = {*UPLOAD_POINTS, *FETCH_POINTS}
    elsewhere = {"pulse"}  # tests/cluster/test_health.py
    assert set(faults.POINTS) == {*TRAINER_POINTS, *SNAPSHOT_POINTS, *RECOVERY_POINTS, *storage_points, *elsewhere}
