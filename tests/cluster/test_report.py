"""`backstay report` about a real training that loses a trainer, a coordinator and a node: what it says is what happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from backstay.testing import LocalCluster
from backstay.testing.fixtures import LocalClusterFactory as NewCluster
from tests.kit.command import printed
from tests.kit.training import Training
from tests.kit.wording import says

RUN_ID = "reported"
RUN = f"default/{RUN_ID}"


def ledger(cluster: LocalCluster) -> dict[str, Any]:
    (found,) = json.loads(printed(cluster, "report", RUN_ID, "--json"))["runs"]
    assert found["run"] == RUN
    return dict(found["ledger"])


def test_the_ledger_of_a_real_run_tells_what_happened_to_it(new_cluster: NewCluster, tmp_path: Path) -> None:
    stored = tmp_path / "stored"
    stored.mkdir()
    settings = {"persist_url": stored.as_uri(), "persist_every_steps": 5}
    cluster = new_cluster(3, 1, lease_s=1.0, settings=settings)
    job = Training(cluster, tmp_path, run_id=RUN_ID)
    job.start()
    job.wait_protected(12)
    first = ledger(cluster)
    assert first["is_whole"]
    assert first["interruptions"] == []
    assert first["blocked_s"] > 0, "trainers say what snapshots cost them"

    job.processes[1].kill()  # and with it the world
    cluster.wait_until(lambda: ledger(cluster)["is_interrupted"], 30, "the dead trainer to be in the ledger")
    job.kill()
    job.start()
    job.wait_protected(job.protected_step() + 8)

    before = ledger(cluster)
    cluster.kill_coordinator()
    cluster.restart_coordinator()
    cluster.wait_until(lambda: cluster.status()["is_settled"], 60, "the new coordinator to settle")
    cluster.wait_until(lambda: cluster.run_status(RUN)["ledger"], 60, "the new coordinator to know the ledger")
    after = ledger(cluster)
    assert after["began_unix_s"] == before["began_unix_s"]
    assert after["steps_lost"] == before["steps_lost"]
    assert after["down_s"] == pytest.approx(before["down_s"], abs=1.0)
    job.wait_protected(job.protected_step() + 3)

    cluster.destroy_node(1)
    cluster.replace_node(1)
    cluster.wait_until(lambda: ledger(cluster)["is_interrupted"], 30, "the lost node to be in the ledger")
    job.kill()
    job.start()
    cluster.wait_until(
        lambda: not ledger(cluster)["is_interrupted"], 60, "the run to go on"
    )  # rebuilding protects steps too
    job.wait_protected(job.protected_step() + 5)

    compare(ledger(cluster), job)
    text = printed(cluster, "report", RUN)
    assert "trainer_died" in text
    assert "node_lost" in text
    assert "goodput 0." in text
    assert says("without_memory", text)
    job.kill()


def compare(found: dict[str, Any], job: Training) -> None:
    """Against the trainer's own log."""
    causes = [entry["cause"] for entry in found["interruptions"]]
    assert causes == ["trainer_died", "node_lost"]
    sources = [entry["source"] for entry in found["interruptions"]]
    assert sources[0] == "memory"
    assert sources[1] in ("rebuild", "peer"), "what was lost was rebuilt: for the restore, or before it"
    restored = [line["step"] for line in job.lines(0, "restored")]
    assert [entry["base_step"] for entry in found["interruptions"]] == restored[1:]
    done: list[int] = []  # the newest step of each life that was interrupted
    for line in job.lines(0, "restored", "step"):
        if line["event"] == "restored":
            done.append(line["step"])
        else:
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
