"""Mutants at a live coordinator and a live node, an honest trainer beside: it goes on, nothing dies, nothing is traced.

``BACKSTAY_MUTANTS=500`` sends so many at each door; by default a few.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc
import psutil

from backstay.protocol import framing
from backstay.testing import LocalCluster
from backstayd.addresses import split_address
from backstayd.transport import convert
from backstayd.v1 import coordinator_pb2, coordinator_pb2_grpc
from tests.kit import parsers
from tests.kit.mutations import Mutator
from tests.kit.trainer import PlainTrainer

COUNT = int(os.environ.get("BACKSTAY_MUTANTS", "25"))
RUN = "job/honest"
ROOM_BYTES = 200 << 20  # that one daemon may come to hold more


def send_frame(path: Path, mutator: Mutator, *, is_attached: bool) -> None:
    """One mutant at the local socket, from somebody unknown or from a trainer of a run of its own."""
    stranger = PlainTrainer(path, run="job/stranger", world_id="s")
    stranger.socket.settimeout(0.2)
    with suppress(Exception):  # whatever it is answered: the daemon is what is looked at
        if is_attached:
            stranger.attach()
        payload = parsers.PARSERS[0].mutant(mutator)
        stranger.socket.sendall(struct.pack(">I", len(payload)) + payload)
        framing.receive_frame(stranger.socket)
    stranger.close()


def send_report(address: str, mutator: Mutator, *, is_delta: bool) -> None:
    """One mutant of a report, of a node that says it is another; or of a change of one."""
    sound = convert.to_message(parsers.a_report(), coordinator_pb2.NodeReport)
    requests = [coordinator_pb2.SyncRequest(report=mutator.message(sound))]  # type: ignore[arg-type]
    if is_delta:
        change = coordinator_pb2.SyncRequest()
        with suppress(Exception):
            change.ParseFromString(parsers.delta_mutant(mutator))
        requests = [coordinator_pb2.SyncRequest(report=sound), change]
    requests[0].report.node.name = "stranger"
    with grpc.insecure_channel(address) as channel:
        call = coordinator_pb2_grpc.CoordinatorServiceStub(channel).Sync(iter(requests), timeout=5)
        with suppress(grpc.RpcError, StopIteration):
            for _ in requests:
                next(call)
        call.cancel()


def send_bulk(address: str, mutator: Mutator) -> None:
    _, payload = parsers.bulk_mutant(mutator)
    with socket.create_connection(split_address(address), timeout=5) as one, suppress(OSError):
        one.sendall(payload)
        one.shutdown(socket.SHUT_WR)
        one.recv(100)


def daemons_of(cluster: LocalCluster) -> dict[int, int]:
    """Resident bytes of everything the test started, by pid; trainers are none of it."""
    return {child.pid: child.memory_info().rss for child in psutil.Process().children(recursive=True)}


def test_an_honest_job_goes_on_beside_mutants_at_every_door() -> None:
    with ExitStack() as stack:
        cluster = stack.enter_context(LocalCluster(nodes=1, parity=0, lease_s=1.0))
        path = cluster.nodes[0].socket
        (node,) = cluster.status()["nodes"]
        trainer = PlainTrainer(path, run=RUN, payload_bytes=50_000)
        stack.callback(trainer.close)
        trainer.attach()
        assert trainer.restore()[0].outcome == "NONE"
        trainer.snapshot(1, wait_s=20)
        before, step = daemons_of(cluster), 1
        for number in range(COUNT):
            mutator = Mutator(("live", number))
            send_frame(path, mutator, is_attached=number % 2 == 0)
            send_report(cluster.coordinator_address, mutator, is_delta=number % 4 == 0)
            send_bulk(node["bulk_address"], mutator)
            if number % 5 == 0:
                step += 1
                trainer.snapshot(step, wait_s=20)
        step += 1
        trainer.snapshot(step, wait_s=20)
        cluster.wait_until(lambda: cluster.run_status(RUN)["protected_step"] == step, 60, "the honest job is protected")
        after = daemons_of(cluster)
        assert before.keys() <= after.keys(), "a process died"
        assert max(after[pid] - size for pid, size in before.items()) < ROOM_BYTES
        logs = "".join(log.read_text(errors="replace") for log in cluster.keeper.log_dir.glob("*.log"))
        assert "Traceback" not in logs, logs[logs.index("Traceback") :][:4000]
        assert len(logs.splitlines()) < 200 + 10 * COUNT
        daemon = cluster.nodes[0].daemon
        assert daemon is not None
        assert daemon.poll() is None
