"""Ranks that never call: restore() ends at its deadline and names them, snapshots name them to those who do call."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from backstay.testing import LocalCluster
from backstay.testing.fixtures import LocalClusterFactory as NewCluster
from backstay.testing.ports import free_port
from tests.kit.light_world import light_world
from tests.kit.wording import says

SCRIPT = Path(__file__).parents[1] / "kit" / "absent_rank.py"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
RANKS = 4
RUN = "default/quiet"


def _world(cluster: LocalCluster, out: Path, absent: int) -> list[subprocess.Popen[bytes]]:
    out.mkdir()
    port = free_port()
    options = {"world_size": RANKS, "absent": absent, "port": port, "deadline_s": 8.0, "out": str(out)}
    return [
        cluster.run_on_node(rank % 2, [sys.executable, str(SCRIPT), json.dumps(options | {"rank": rank})], ENVIRONMENT)
        for rank in range(RANKS)
    ]


def _ended(processes: list[subprocess.Popen[bytes]], out: Path, absent: int) -> list[dict[str, Any]]:
    """What restore() said on the ranks that called it; they have ended, and the other one has not."""
    present = [rank for rank in range(RANKS) if rank != absent]
    assert [processes[rank].wait(120) for rank in present] == [3] * len(present)
    assert processes[absent].poll() is None, "it is alive: nobody had to wait for its death"
    processes[absent].kill()
    processes[absent].wait(20)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in present]


def test_restore_ends_at_its_deadline_and_names_the_rank_that_never_called_it(
    new_cluster: NewCluster, tmp_path: Path
) -> None:
    cluster = new_cluster(2, 1, lease_s=1.0)
    for found in _ended(_world(cluster, tmp_path / "one", absent=1), tmp_path / "one", absent=1):
        assert (found["error"], found["reason"]) == ("UnavailableError", "deadline"), found
        assert f"rank 1 of {RANKS}" in found["message"]
    for found in _ended(_world(cluster, tmp_path / "zero", absent=0), tmp_path / "zero", absent=0):
        assert (found["error"], found["reason"]) == ("UnavailableError", "deadline"), found
        assert "rank 0" in found["message"]


def test_a_rank_that_takes_no_snapshots_is_named_to_the_others_and_in_the_status(new_cluster: NewCluster) -> None:
    cluster = new_cluster(2, 1, lease_s=1.0)
    with light_world(cluster, RUN) as world:
        world.start_fresh()
        only, quiet = world.ranks
        notice, step, deadline = "", 0, time.monotonic() + 60
        while not notice:
            assert time.monotonic() < deadline, "nobody said who is missing"
            step += 1
            answer = only.ask("publish", step=step, wait_s=1.0)
            notice = answer["notice"]
        assert says("no_snapshot_taken", notice, ranks=f"rank 1 on {cluster.nodes[1].name} has")
        status = cluster.run_status(RUN)
        assert status["missing_ranks"] == [1]
        assert status["verdict"]["word"] == "behind"
        assert notice in status["verdict"]["reason"]
        while notice:  # it calls snapshot() too now
            assert time.monotonic() < deadline, "it is named for ever"
            step += 1
            quiet.ask("publish", step=step, wait_s=1.0)
            notice = only.ask("publish", step=step, wait_s=1.0)["notice"]
