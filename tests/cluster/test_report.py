"""`backstay report` about a real training that loses a trainer, a coordinator and a node: what it says is what happened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backstay.testing import LocalCluster
from backstay.testing.fixtures import LocalClusterFactory
from backstay.testing.ports import free_port

SCRIPT = Path(__file__).parents[1] / "kit" / "trainer_script.py"
RUN_ID = "reported"
RUN = f"default/{RUN_ID}"
RANKS = 2
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


class Job:
    """The training, which is started again after each loss."""

    def __init__(self, cluster: LocalCluster, directory: Path) -> None:
        self.cluster, self.directory = cluster, directory
        self.trainers: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        port = free_port()
        for rank in range(RANKS):
            options = {
                "rank": rank, "world_size": RANKS, "port": port, "run_id": RUN_ID, "is_attached": True,
                "log": str(self.log(rank)), "stop": str(self.directory / "stop"), "last_step": 100_000, "pause_s": 0.05,
            }  # fmt: skip
            command = [sys.executable, str(SCRIPT), json.dumps(options)]
            self.trainers.append(self.cluster.run_on_node(rank, command, ENVIRONMENT))

    def log(self, rank: int) -> Path:
        return self.directory / f"rank-{rank}.log"

    def end(self) -> None:
        """The world ends, as a launcher would end it; what it did is in its log."""
        for trainer in self.trainers:
            trainer.kill()
            trainer.wait(30)
        self.trainers.clear()

    def events(self, event: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.log(0).read_text().splitlines() if line.endswith("}")]
        return [line for line in lines if line["event"] == event]

    def wait_beyond(self, steps: int) -> None:
        """Until a step that much further than now is protected."""
        first = self.cluster.run_status(RUN)["protected_step"]
        why = f"{steps} more steps to be protected"
        self.cluster.wait_until(lambda: self.cluster.run_status(RUN)["protected_step"] >= first + steps, 90, why)


def report(cluster: LocalCluster, *arguments: str) -> str:
    command = [sys.executable, "-m", "backstayd.cli", "report", "--coordinator", cluster.coordinator_address]
    environment = cluster.operator_environment
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def ledger(cluster: LocalCluster) -> dict[str, Any]:
    (found,) = json.loads(report(cluster, RUN_ID, "--json"))["runs"]
    assert found["run"] == RUN
    return dict(found["ledger"])


def test_the_ledger_of_a_real_run_tells_what_happened_to_it(
    local_cluster_factory: LocalClusterFactory, tmp_path: Path
) -> None:
    stored = tmp_path / "stored"
    stored.mkdir()
    settings = {"persist_url": stored.as_uri(), "persist_every_steps": 5}
    cluster = local_cluster_factory(3, 1, lease_s=1.0, settings=settings)
    job = Job(cluster, tmp_path)
    job.start()
    cluster.wait_until(lambda: cluster.run_status(RUN)["protected_step"] >= 12, 90, "step 12 to be protected")
    first = ledger(cluster)
    assert first["is_whole"]
    assert first["interruptions"] == []
    assert first["blocked_s"] > 0, "trainers say what snapshots cost them"

    job.trainers[1].kill()  # and with it the world
    cluster.wait_until(lambda: ledger(cluster)["is_interrupted"], 30, "the dead trainer to be in the ledger")
    job.end()
    job.start()
    job.wait_beyond(8)

    before = ledger(cluster)
    cluster.kill_coordinator()
    cluster.restart_coordinator()
    cluster.wait_until(lambda: cluster.status()["is_settled"], 60, "the new coordinator to settle")
    cluster.wait_until(lambda: cluster.run_status(RUN)["ledger"], 60, "the new coordinator to know the ledger")
    after = ledger(cluster)
    assert after["began_unix_s"] == before["began_unix_s"]
    assert after["steps_lost"] == before["steps_lost"]
    assert after["down_s"] == pytest.approx(before["down_s"], abs=1.0)
    job.wait_beyond(3)

    cluster.destroy_node(1)
    cluster.replace_node(1)
    cluster.wait_until(lambda: ledger(cluster)["is_interrupted"], 30, "the lost node to be in the ledger")
    job.end()
    job.start()
    cluster.wait_until(
        lambda: not ledger(cluster)["is_interrupted"], 60, "the run to go on"
    )  # rebuilding protects steps too
    job.wait_beyond(5)

    compare(ledger(cluster), job)
    text = report(cluster, RUN)
    assert "trainer_died" in text
    assert "node_lost" in text
    assert "goodput 0." in text
    assert "Restored from durable storage alone" in text
    (tmp_path / "stop").touch()
    job.end()


def compare(found: dict[str, Any], job: Job) -> None:
    """Against the trainer's own log."""
    causes = [entry["cause"] for entry in found["interruptions"]]
    assert causes == ["trainer_died", "node_lost"]
    sources = [entry["source"] for entry in found["interruptions"]]
    assert sources[0] == "memory"
    assert sources[1] in ("rebuild", "peer"), "what was lost was rebuilt: for the restore, or before it"
    restored = [line["step"] for line in job.events("restored")]
    assert [entry["base_step"] for entry in found["interruptions"]] == restored[1:]
    done: list[int] = []  # the newest step of each life that was interrupted
    for line in (json.loads(text) for text in job.log(0).read_text().splitlines() if text.endswith("}")):
        if line["event"] == "restored":
            done.append(line["step"])
        elif line["event"] == "step":
            done[-1] = line["step"]
    for entry, newest in zip(found["interruptions"], done, strict=False):
        assert entry["base_step"] <= entry["newest_step"] <= newest + 1
        assert newest - entry["newest_step"] <= 2
        assert entry["steps_lost"] == entry["newest_step"] - entry["base_step"]
        assert entry["steps_lost_from_storage"] >= entry["steps_lost"]
        assert entry["down_s"] >= entry["restart_s"] > 0
        assert entry["first_step"] > entry["base_step"]
    assert 0 < found["goodput"] < 1
    assert found["productive_s"] <= found["elapsed_s"] - sum(e["seconds_lost"] for e in found["interruptions"]) + 1e-6
