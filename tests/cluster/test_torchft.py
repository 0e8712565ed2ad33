"""backstay.torchft by torchft's own transport test, and under a real lighthouse and managers, on real daemons."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import TestCase

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from backstay.errors import UnavailableError, UsageError
from backstay.testing import LocalCluster
from tests.kit.documented import write_example
from tests.kit.loops import Loop, start_loop
from tests.kit.wording import refuses

pytest.importorskip("torchft")

CLUSTER = {"nodes": 2, "parity": 1, "lease_s": 1.0}
SECONDS = timedelta(seconds=20)


def transport(cluster: LocalCluster, node: int, replica: str, run_id: str = "run") -> Any:
    from backstay.torchft import BackstayTransport

    return BackstayTransport(run_id=run_id, replica=replica, rank=0, socket=str(cluster.nodes[node].socket))


def test_torchfts_own_transport_test_passes(cluster: LocalCluster) -> None:
    from torchft.checkpointing.transport_test import run_multi_recovery_test

    run_multi_recovery_test(
        TestCase(), lambda rank, _: transport(cluster, rank % 2, f"own-{rank}"), torch.device("cpu")
    )


def test_a_state_crosses_nodes_and_later_changes_do_not(cluster: LocalCluster) -> None:
    sender, receiver = transport(cluster, 0, "crossing"), transport(cluster, 1, "other")
    state = {"user": {"w": torch.randn(300, 1000), "lr": 0.1}, "torchft": {"step": 7, "batches_committed": 14}}
    expected = state["user"]["w"].clone()
    sender.send_checkpoint([1], 7, state, SECONDS)
    sender.disallow_checkpoint()
    state["user"]["w"].zero_()
    found = receiver.recv_checkpoint(0, sender.metadata(), 7, SECONDS)
    assert torch.equal(found["user"]["w"], expected)
    assert found["torchft"] == {"step": 7, "batches_committed": 14}
    assert found["user"]["lr"] == 0.1
    sender.send_checkpoint([], 8, state, SECONDS)
    with refuses(UnavailableError, "deadline", "step 8", "rank 0"):
        receiver.recv_checkpoint(0, sender.metadata(), 8, timedelta(milliseconds=100))
    sender.send_checkpoint([1], 3, {"w": torch.ones(2)}, SECONDS)
    found = receiver.recv_checkpoint(0, sender.metadata(), 3, SECONDS)
    assert torch.equal(found["w"], torch.ones(2)), "a step before the last one is another history"
    for each in (sender, receiver):
        each.shutdown()


def test_a_receiver_that_asks_first_waits(cluster: LocalCluster) -> None:
    sender, receiver = transport(cluster, 0, "late"), transport(cluster, 1, "early")
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(receiver.recv_checkpoint(0, sender.metadata(), 5, SECONDS)))
    thread.start()
    sender.send_checkpoint([1], 5, {"w": torch.ones(3)}, SECONDS)
    thread.join(30)
    assert torch.equal(found[0]["w"], torch.ones(3))
    sender.shutdown()
    receiver.shutdown()


def test_the_state_of_a_model_that_fsdp2_shards_is_loaded_by_one_cut_alike(cluster: LocalCluster) -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
        torch.manual_seed(1)
        models = [fully_shard(nn.Linear(8, 8), mesh=mesh) for _ in range(2)]
        sender, receiver = transport(cluster, 0, "sharded"), transport(cluster, 1, "sharded-2")
        sender.send_checkpoint([1], 1, models[0].state_dict(), SECONDS)
        models[1].load_state_dict(receiver.recv_checkpoint(0, sender.metadata(), 1, SECONDS))
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(a.to_local(), b.to_local())
        sender.shutdown()
        receiver.shutdown()
    finally:
        dist.destroy_process_group()


def test_what_was_sent_is_freed_at_the_end(cluster: LocalCluster) -> None:
    sender = transport(cluster, 0, "freed")
    sender.send_checkpoint([1], 1, {"w": torch.ones(100_000)}, SECONDS)
    assert any("run-freed-0/" in name for name in cluster.files(0))
    sender.shutdown()
    cluster.wait_until(
        lambda: not any("run-freed-0/" in f and "rank-" in f for node in (0, 1) for f in cluster.files(node)),
        30,
        "what was sent to be freed",
    )


def test_misuse_is_refused_by_name(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REPLICA_GROUP_ID", raising=False)
    with refuses(UsageError, "bad_name", "REPLICA_GROUP_ID"):
        transport(cluster, 0, "")
    with refuses(UsageError, "bad_name", "replica/1"):
        transport(cluster, 0, "replica/1")
    both = transport(cluster, 0, "misuse")
    with refuses(UsageError, "other_transport", "http://node-1:3000/checkpoint/"):
        both.recv_checkpoint(0, "http://node-1:3000/checkpoint/", 1, SECONDS)
    with refuses(UsageError, "unsupported_state", "state.user.hook"):
        both.send_checkpoint([1], 1, {"user": {"hook": threading.Lock()}}, SECONDS)


class Replicas:
    """A lighthouse, and replicas of the documented program, each with the store that torchrun would give it."""

    def __init__(self, cluster: LocalCluster, script: Path) -> None:
        from torchft.coordination import LighthouseServer

        self.lighthouse = LighthouseServer(bind="[::]:0", min_replicas=1, join_timeout_ms=1000)
        self._cluster, self._script = cluster, script
        self._stores: list[dist.TCPStore] = []

    def start(self, replica: int, name: str, **env: str) -> Loop:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._stores.append(store)
        return start_loop(
            self._cluster, self._script, name, node=replica, ranks=1, MASTER_PORT=str(store.port), RUN_ID="lives",
            TORCHFT_LIGHTHOUSE=self.lighthouse.address(), REPLICA_GROUP_ID=str(replica), **env,
        )  # fmt: skip

    def close(self) -> None:
        self.lighthouse.shutdown()
        self._stores.clear()


def _joined(loop: Loop) -> list[int]:
    """Steps that the replica made together with the other one."""
    return [line["step"] for line in loop.lines(0) if line["event"] == "step" and line["replicas"] == 2]


def test_a_replica_that_was_killed_takes_its_state_from_the_healthy_one(cluster: LocalCluster, tmp_path: Path) -> None:
    script = write_example("integrations/torchft.md", "ft_replica.py", tmp_path)
    replicas = Replicas(cluster, script)
    env = {"STEPS": "1000000", "PAUSE_S": "0.05"}
    loops = []
    try:
        healthy = replicas.start(0, "healthy", **env)
        loops.append(healthy)
        cluster.wait_until(lambda: len(healthy.digests(0)) >= 3, 90, "the first replica to train alone")
        killed = replicas.start(1, "killed", **env)
        loops.append(killed)
        cluster.wait_until(lambda: len(_joined(killed)) >= 3, 90, "the second replica to join")
        killed.kill()
        again = replicas.start(1, "again", **env)
        loops.append(again)
        cluster.wait_until(
            lambda: len(healthy.digests(0).keys() & set(_joined(again))) >= 3, 90, "both to tell of its coming back"
        )
    finally:
        for loop in loops:
            loop.kill()
        replicas.close()
    expected = healthy.digests(0)
    for loop in (killed, again):
        found = loop.digests(0)
        common = found.keys() & expected.keys()
        assert len(common) >= 3
        assert min(found) > 1, "it did not begin at the first step"
        assert {step: found[step] for step in common} == {step: expected[step] for step in common}
    assert min(again.digests(0)) > max(_joined(killed))
