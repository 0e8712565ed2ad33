"""The operator's command against real daemons, with a trainer that speaks the local protocol itself and needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backstay import __version__, ids
from backstay.protocol import messages
from backstay.testing import LocalCluster
from backstayd import cli
from tests.kit.trainer import PlainTrainer
from tests.kit.wording import says

CLUSTER = {"nodes": 2, "parity": 1, "lease_s": 1.0}
RUN = "default/operated"
DEADLINE_S = 30.0


@pytest.fixture(scope="module")
def trainer(cluster: LocalCluster) -> Iterator[PlainTrainer]:
    """The only rank of its run."""
    found = PlainTrainer(cluster.nodes[0].socket, run=RUN, tensor="model.w")
    found.attach()
    yield found
    found.close()


def _json(capsys: pytest.CaptureFixture[str], cluster: LocalCluster, *argv: str) -> Any:
    capsys.readouterr()
    assert cli.main([*argv, "--json", "--coordinator", cluster.coordinator_address]) == 0
    return json.loads(capsys.readouterr().out)


def _text(capsys: pytest.CaptureFixture[str], cluster: LocalCluster, *argv: str) -> str:
    capsys.readouterr()
    assert cli.main([*argv, "--coordinator", cluster.coordinator_address]) == 0
    return capsys.readouterr().out


def test_an_unknown_run_is_exit_66_and_one_line(cluster: LocalCluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "nobody", "--coordinator", cluster.coordinator_address]) == 66
    assert "nobody" in capsys.readouterr().err
    assert cli.main(["forget", "default/nobody", "--coordinator", cluster.coordinator_address]) == 66


def test_a_run_is_seen_from_attach_to_protected_and_until_it_is_forgotten(
    cluster: LocalCluster, trainer: PlainTrainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    restored, _ = trainer.restore(deadline_s=DEADLINE_S)
    assert (restored.outcome, restored.step) == ("NONE", 0)
    digest = trainer.snapshot(1).manifest.digest

    def protected() -> dict[str, Any] | None:
        (run,) = [run for run in _json(capsys, cluster, "status")["runs"] if run["run"] == RUN]
        return run if run["protected_step"] == 1 else None

    run = cluster.wait_until(protected, DEADLINE_S, "step 1 to be protected")
    assert run["redundancy"] == "PROTECTED(1)"
    (listed,) = _json(capsys, cluster, "snapshots", "operated")
    (snapshot,) = [item for item in listed["snapshots"] if item["step"] == 1]
    assert snapshot["state"] == "protected"
    assert snapshot["snapshot_id"] == ids.snapshot_id(
        key=ids.SnapshotKey(restored.attempt, 1), world_size=1, shard_digests=[digest]
    )
    text = _text(capsys, cluster, "status")
    assert "PROTECTED(1)" in text
    assert "node-0" in text
    assert says("explained", _text(capsys, cluster, "explain", RUN), outcome="EXACT", step=1)

    for command in (["distrust", "operated", "1", "--reason", "tried"], ["trust", "operated"]):
        assert RUN in _text(capsys, cluster, *command), "a run_id that only one job has will do everywhere"
    cluster.wait_until(lambda: not cluster.run_status(RUN)["distrusted"], DEADLINE_S, "step 1 to be trusted again")
    directory, at = str(tmp_path / "model"), ["--socket", str(cluster.nodes[0].socket)]
    assert cli.main(["export", "operated", "--to", directory, *at]) == 0
    assert says("exported", capsys.readouterr().out, run=RUN, step=1, count=1)

    argv = ["forget", RUN, "--coordinator", cluster.coordinator_address]
    assert cli.main(argv) == 64, "a run with a living trainer is not taken from under it"
    trainer.call(messages.Finish(keep=True))
    cluster.wait_until(
        lambda: not _json(capsys, cluster, "status")["runs"][0]["sessions"], DEADLINE_S, "the trainer to be detached"
    )
    assert RUN in _text(capsys, cluster, "forget", "operated")
    cluster.wait_until(lambda: not _json(capsys, cluster, "status")["runs"], DEADLINE_S, "the run to be forgotten")
    for index in range(2):
        cluster.wait_until(
            lambda index=index: not [name for name in cluster.files(index) if "operated" in name],  # type: ignore[misc]
            DEADLINE_S,
            f"the files of the run to be gone from node {index}",
        )


def test_doctor_finds_daemon_and_coordinator(cluster: LocalCluster, capsys: pytest.CaptureFixture[str]) -> None:
    node = cluster.nodes[1]
    argv = ["doctor", "--json", "--coordinator", cluster.coordinator_address, "--socket", str(node.socket)]
    cli.main([*argv, "--memory-dir", str(node.memory_dir), "--collective-timeout-s", "1800"])
    found = {item["subject"]: item for item in json.loads(capsys.readouterr().out)["findings"]}
    for subject in ("daemon socket", "daemon's coordinator", "coordinator", "clock", "versions of the nodes", "codec"):
        assert found[subject]["level"] == "OK", found[subject]
    assert f"node {node.name}" in found["daemon socket"]["detail"]
    assert __version__ in found["daemon socket"]["detail"]


def test_a_node_is_drained_until_it_is_used_again(cluster: LocalCluster, capsys: pytest.CaptureFixture[str]) -> None:
    found = _json(capsys, cluster, "drain", "node-1", "--wait", "--timeout-s", "30")
    assert (found["node"], found["draining"]) == ("node-1", "safe")
    assert says("node_is_safe", _text(capsys, cluster, "status"))
    cluster.wait_until(lambda: cluster.node_status(1)["is_draining"], DEADLINE_S, "the node to remember it")
    cluster.restart_daemon(1)
    assert cluster.node_status(1)["is_draining"], "the next daemon over its memory drains, too"
    cluster.wait_until(
        lambda: says("node_is_safe", _text(capsys, cluster, "status")), DEADLINE_S, "it to be heard of again"
    )
    assert says("drained", _text(capsys, cluster, "drain", "node-1", "--wait", "--timeout-s", "30"), node="node-1")
    said = _text(capsys, cluster, "drain", "node-1", "--undo", "--wait", "--timeout-s", "30")
    assert says("not_draining", said, node="node-1")
    assert not cluster.node_status(1)["is_draining"]
    assert cli.main(["drain", "node-9", "--coordinator", cluster.coordinator_address]) == 64
    refusal = capsys.readouterr().err
    assert all(name in refusal for name in ("node-9", "node-0", "node-1"))
