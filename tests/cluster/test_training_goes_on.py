"""A real torch training beside daemons that freeze and die: it never stops, comes back where it was, and ends bit for bit as a
run that never imported backstay.
"""

from __future__ import annotations

from pathlib import Path

from backstay.testing.fixtures import LocalClusterFactory as NewCluster
from tests.kit.training import Training


def test_training_survives_its_daemons_and_ends_as_if_nothing_had_happened(
    new_cluster: NewCluster, tmp_path: Path
) -> None:
    cluster = new_cluster(2, 1, lease_s=1.0)
    faulted = Training(cluster, tmp_path / "faulted", pause_s=0.03)
    faulted.start()
    faulted.wait_protected(5)

    cluster.freeze(0)
    faulted.wait_step(faulted.last_step() + 60)
    assert "T" in Path(f"/proc/{cluster.nodes[0].daemon.pid}/stat").read_text().split(")")[1], "it must still be frozen"  # type: ignore[union-attr]
    cluster.thaw(0)
    faulted.wait_protected(faulted.last_step() + 2)

    cluster.kill_daemon(1)
    faulted.wait_step(faulted.last_step() + 20)
    cluster.restart_daemon(1)
    faulted.wait_protected(faulted.last_step() + 2)

    survivor, victim = faulted.processes
    victim.kill()
    assert survivor.wait(90) != 0, "a rank cannot go on without the other"
    faulted.start()
    faulted.wait_restored(2)
    faulted.wait_step(faulted.last_step() + 10)
    faulted.stop()

    control = Training(None, tmp_path / "control", last_step=faulted.last_step(), pause_s=0.0)
    control.start()
    control.wait_ended(120)
    for rank in range(faulted.ranks):
        expected = dict(control.steps(rank))
        seen = faulted.steps(rank)
        assert len(seen) > 90
        assert [step for step, digest in seen if digest != expected[step]] == []
        first, second = faulted.lines(rank, "restored")
        assert (first["outcome"], first["step"]) == ("NONE", 0)
        assert second["outcome"] == "EXACT"
        assert second["digest"] == expected[second["step"]]
