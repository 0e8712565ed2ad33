"""SIGKILL of a real trainer at each of its fault points: the next world restores a step whose bytes were whole.

One run walks through all of them, so that each recovery starts from the history the one before left.
"""

from __future__ import annotations

from pathlib import Path

from backstay.testing.fixtures import LocalClusterFactory as NewCluster
from tests.cluster.test_kill_points import TRAINER_POINTS
from tests.kit.training import Training


def test_a_trainer_killed_at_any_of_its_points_comes_back_to_bytes_that_were_whole(
    new_cluster: NewCluster, tmp_path: Path
) -> None:
    cluster = new_cluster(2, 1, lease_s=1.0)
    training = Training(cluster, tmp_path, pause_s=0.03)
    training.start(_fault(0))
    assert {line["outcome"] for line in training.wait_restored(1)} == {"NONE"}
    for index, point in enumerate(TRAINER_POINTS):
        survivor, victim = training.processes
        cluster.wait_until(lambda victim=victim: victim.poll() is not None, 90, f"rank 1 to die at {point}")  # type: ignore[misc]
        assert victim.returncode == -9, f"something else than {point} ended rank 1: {cluster.evidence()}"
        assert survivor.wait(90) != 0, "a rank cannot go on without the other"

        training.start(_fault(index + 1))
        restored = training.wait_restored(index + 2)
        steps = {line["step"] for line in restored}
        assert len(steps) == 1, f"{point}: ranks restored different steps: {restored}"
        assert _step(index) - 4 <= max(steps) <= _step(index), f"{point} at step {_step(index)}: {restored}"
        for rank, line in enumerate(restored):
            written = dict(training.steps(rank))
            assert line["digest"] == written[line["step"]], f"{point}: rank {rank} restored other bytes: {line}"
    training.stop()


def _step(index: int) -> int:
    return 10 * (index + 1)


def _fault(index: int) -> str:
    return f"{TRAINER_POINTS[index]},step={_step(index)}:kill" if index < len(TRAINER_POINTS) else ""
