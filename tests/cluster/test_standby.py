"""Two coordinators and a real etcd: the leader is killed, frozen or cut off in the middle of a recovery, and etcd goes away.

Each time the standby finishes what was begun, what is restored is what was written, and the old leader is refused everywhere.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest

from backstay.testing import LocalCluster
from backstay.testing.daemons import LocalCoordinator
from backstayd.transport import errors
from backstayd.v1 import coordinator_pb2, coordinator_pb2_grpc, operator_pb2, operator_pb2_grpc
from tests.kit.cut_proxy import CutProxy
from tests.kit.etcd import Etcd, needs_etcd, running_etcd
from tests.kit.light_world import Ranks, light_world, wait_protected

pytestmark = needs_etcd
RUN = "default/standby"
LEASE_S = 1.0
ELECTION_LEASE_S = 1.5
TERM_GENERATIONS = 1_000_000_000


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    with running_etcd(tmp_path_factory.mktemp("etcd")) as running:
        yield running


def new_cluster(etcd: Etcd, tmp_path: Path, *, fault: str = "", tls: bool = False) -> LocalCluster:
    return LocalCluster(
        3,
        1,
        lease_s=LEASE_S,
        coordinators=2,
        election=etcd.url(tmp_path.name),
        settings={"election_lease_s": ELECTION_LEASE_S},
        coordinator_env={"BACKSTAY_FAULTS": fault} if fault else None,
        tls=tls,
        keep_logs=tmp_path / "logs",
    )


@contextmanager
def interrupted_recovery(cluster: LocalCluster, marker: Path) -> Iterator[Ranks]:
    """A world that was protected at step 2, lost a node, and whose successor is just being answered."""
    with light_world(cluster, RUN) as world:
        world.start_fresh()
        world.protect(1, 2)
        world.kill()
    cluster.destroy_node(1)
    cluster.replace_node(1)
    with light_world(cluster, RUN) as world:
        world.begin_restore()
        cluster.wait_until(marker.exists, 60, "the leader to reach its fault")
        yield world


def wait_leader(cluster: LocalCluster, index: int) -> None:
    wanted = cluster.coordinators[index]
    cluster.wait_until(wanted.is_leading, 30, f"{wanted.name} to lead")


def obeyed_incarnation(cluster: LocalCluster, index: int) -> str:
    return str(cluster.node_status(index)["generation"]["incarnation"])


def refusal(call: grpc.RpcError) -> tuple[str, str]:
    assert call.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
    told = dict(call.trailing_metadata())  # type: ignore[attr-defined]
    return told[errors.REASON_KEY], told.get(errors.LEADER_KEY, "")


def assert_refused(cluster: LocalCluster, old: LocalCoordinator, new: LocalCoordinator) -> None:
    """Neither an operator nor a node gets anything from ``old`` but who leads, and no node obeys it."""
    leader = new.status()["generation"]
    assert leader["number"] > 2 * TERM_GENERATIONS, "its generations are above all of the terms before"

    def knows() -> bool:
        told = old.status()["leader"]
        return not told["is_leader"] and told["address"] == new.address

    cluster.wait_until(knows, 30, f"{old.name} to know who leads")
    with grpc.insecure_channel(old.listen) as channel:
        operator = operator_pb2_grpc.OperatorServiceStub(channel)
        for method, request in (
            ("GetStatus", operator_pb2.GetStatusRequest()),
            ("Forget", operator_pb2.ForgetRequest(run=RUN)),
            ("Trust", operator_pb2.TrustRequest(run=RUN)),
            ("Distrust", operator_pb2.DistrustRequest(run=RUN, step=2, reason="late")),
            ("Locate", operator_pb2.LocateRequest(run=RUN, step=0)),
            ("Drain", operator_pb2.DrainRequest(node="node-0")),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                getattr(operator, method)(request, timeout=10)
            assert refusal(caught.value) == ("not_leader", new.address), method
        node = coordinator_pb2.NodeIdentity(name="node-9", incarnation="i", bulk_address="127.0.0.1:1", protocol=1)
        report = coordinator_pb2.SyncRequest(report=coordinator_pb2.NodeReport(node=node, sequence=1))
        with pytest.raises(grpc.RpcError) as caught:
            next(coordinator_pb2_grpc.CoordinatorServiceStub(channel).Sync(iter([report]), timeout=10))
        assert refusal(caught.value) == ("not_leader", new.address)
    for index in range(len(cluster.nodes)):
        assert obeyed_incarnation(cluster, index) == leader["incarnation"]


@pytest.mark.parametrize(("point", "action"), [("decided", "kill"), ("recorded_on_some", "stop")])
def test_a_leader_that_is_killed_or_frozen_in_a_recovery_is_followed_by_the_standby(
    point: str, action: str, etcd: Etcd, tmp_path: Path
) -> None:
    marker = tmp_path / "reached"
    fault = f"{point},nth=2,once={marker}:{action}"  # the first decision is that the run is new
    with new_cluster(etcd, tmp_path, fault=fault) as cluster, interrupted_recovery(cluster, marker) as world:
        old, new = cluster.coordinators
        wait_leader(cluster, 1)
        world.check_restored(world.answers(), 2)
        world.protect(3)
        if action == "kill":
            cluster.restart_coordinator(index=0)
        else:
            cluster.thaw(old.name)
        assert_refused(cluster, old, new)
        assert new.is_leading(), "the old one took nothing back"
        assert new.process is not None
        new.process.send_signal(signal.SIGTERM)
        assert new.process.wait(30) == 0
        wait_leader(cluster, 0)
        assert old.status()["leader"]["term"] == 3, "handed over"
        world.protect(4)


def test_a_leader_cut_off_from_etcd_or_from_the_nodes_in_a_recovery_is_followed(etcd: Etcd, tmp_path: Path) -> None:
    """Frozen at the fault only for as long as it takes to cut it off: it runs on, alone."""
    marker = tmp_path / "reached"
    with ExitStack() as stack:
        cluster = new_cluster(etcd, tmp_path, fault=f"recorded_on_some,nth=2,once={marker}:stop")
        old, new = cluster.coordinators
        to_nodes = stack.enter_context(CutProxy(old.listen))
        to_etcd = stack.enter_context(CutProxy(etcd.address))
        old.advertise, old.election = to_nodes.address, f"etcd://{to_etcd.address}/{tmp_path.name}"
        stack.enter_context(cluster)
        world = stack.enter_context(interrupted_recovery(cluster, marker))
        to_etcd.cut()
        cluster.thaw(old.name)
        wait_leader(cluster, 1)
        assert not old.is_leading(), "it ended before the other began"
        world.check_restored(world.answers(), 2)
        world.protect(3)
        to_etcd.mend()
        assert_refused(cluster, old, new)
        # And now the other way round: the leader holds its lease, but no node reaches it.
        cluster.kill_coordinator(1)
        wait_leader(cluster, 0)
        world.protect(4)
        cluster.start_coordinator(index=1)
        cluster.wait_until(new.status, 30, "the standby to answer")
        world.kill()
        to_nodes.cut()
        with light_world(cluster, RUN) as successor:
            successor.restore_exactly(4)  # asked while nobody but the cut-off leader leads
            assert new.is_leading()
            assert not old.is_leading()
            successor.protect(5)


def test_while_etcd_is_away_nobody_leads_nothing_is_lost_and_then_somebody_leads(tmp_path: Path) -> None:
    directory = tmp_path / "etcd"
    directory.mkdir()
    with (
        running_etcd(directory) as etcd,
        new_cluster(etcd, tmp_path, tls=True) as cluster,
        light_world(cluster, RUN) as world,
    ):
        world.start_fresh()
        world.protect(1)
        etcd.kill()
        cluster.wait_until(lambda: not any(c.is_leading() for c in cluster.coordinators), 30, "the leader to step down")
        world.publish(2)  # training and its snapshots go on
        held = [set(cluster.files(index)) for index in range(3)]
        states = [cluster.node_status(index)["coordinator"] for index in range(3)]
        assert all(not state["is_connected"] for state in states)
        etcd.start()
        cluster.wait_until(cluster.leader, 30, "a coordinator to lead again")
        wait_protected(cluster, RUN, 2)
        assert all(any("step-00000001" in name or "step-00000002" in name for name in files) for files in held)
        world.kill()
        with light_world(cluster, RUN) as successor:
            successor.restore_exactly(2)
