"""An operator's day: four nodes, two coordinators, etcd and Prometheus on machines of their own, TLS everywhere, one run.

A machine is pulled and another takes its place; then the leader is killed. One site and one story, told by what an operator
looks at: alerts, the page, the commands.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from backstay.testing.wait import wait_until
from tests.kit.machines import Machine, network, why_not
from tests.kit.site import Site, missing
from tests.kit.wording import says

pytest.importorskip("cryptography")
pytestmark = pytest.mark.skipif(bool(missing() or why_not()), reason=missing() or why_not())

RUN = "default/operated"
NODES = 4
PARITY = 3  # all that four nodes can give; three nodes cannot, so a lost one is felt until another is there


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with network(tmp_path) as net:
        yield Site(net, tmp_path, nodes=NODES, coordinators=2, parity=PARITY)


def protected(site: Site) -> int:
    return int(site.run_status(RUN)["protected_step"])


def is_protected_past(site: Site, step: int, *, spares: int = PARITY) -> bool:
    found = site.run_status(RUN)
    return int(found["protected_step"]) > step and found["spares"] == spares


def digests(site: Site, rank: int) -> dict[int, str]:
    return {line["step"]: line["digest"] for line in site.lines(rank) if line["event"] == "step"}


def test_a_pulled_node_is_alerted_seen_and_replaced_and_a_killed_leader_followed(site: Site) -> None:
    site.wait(lambda: list(site.states().values()) == ["live"] * NODES, "four nodes to be live")
    trainers = site.train(RUN.partition("/")[2], site.nodes)
    site.wait(lambda: is_protected_past(site, 5), "five steps to be protected as wanted")
    watcher = site.prometheus
    watcher.wait(lambda: watcher.value("training_job:backstay_spares:min") == PARITY, "Prometheus to see the spares")
    watcher.wait(lambda: watcher.value("sum(up)") == NODES + 2, "every daemon to be scraped over TLS")
    assert protection_alerts(site) == set()
    assert_commands_work(site)

    before = protected(site)
    pulled = pull_a_node(site)
    watcher.wait(lambda: watcher.firing() >= {"DegradedRedundancy", "DaemonDown"}, "the alerts of a lost node to fire")
    assert_page_shows_the_loss(site, pulled)

    known = [digests(site, rank) for rank in range(NODES)]
    for trainer in trainers:
        trainer.kill()
        trainer.wait(20)
    replace(site, pulled)
    trainers = site.train(RUN.partition("/")[2], site.nodes)
    site.wait(lambda: is_restored(site), "every rank to restore")
    assert_restored_bytes(site, known, at_least=before)
    site.wait(lambda: is_protected_past(site, protected_at_restore(site)), "the run to be protected as wanted again")
    watcher.wait(lambda: protection_alerts(site) == set() and "DaemonDown" not in watcher.firing(), "the alerts to end")
    assert causes(site) == ["node_lost"]

    follow_a_killed_leader(site)
    assert [trainer.poll() for trainer in trainers] == [None] * NODES, "training never noticed"
    (site.directory / "stop").touch()
    assert [trainer.wait(60) for trainer in trainers] == [0] * NODES


def protection_alerts(site: Site) -> set[str]:
    """Alerts about what a run survives; TrainerBlocked depends on the machine's speed."""
    return site.prometheus.firing() & {"NotProtected", "OneFailureFromLoss", "DegradedRedundancy", "NoCoordinator"}


def assert_commands_work(site: Site) -> None:
    """With certificates, told of both coordinators, of which one does not lead."""
    status = site.backstay("status")
    assert status.returncode == 0, status.stderr
    assert f"{NODES} live" in status.stdout
    assert says("explained", site.backstay("explain", RUN).stdout, outcome="EXACT")
    doctor = site.backstay("doctor", on=site.nodes[0])
    assert "0 FAIL" in doctor.stdout, doctor.stdout
    drained = site.backstay("drain", site.nodes[3].name, "--wait", "--timeout-s", "30")
    assert drained.returncode == 0, drained.stderr
    assert says("drained", drained.stdout, node=site.nodes[3].name)
    assert site.backstay("drain", site.nodes[3].name, "--undo", "--wait").returncode == 0
    site.wait(lambda: is_protected_past(site, protected_at_restore(site)), "the drained node to be used again")


def pull_a_node(site: Site) -> Machine:
    pulled = site.nodes[3]
    assert pulled.held() != []
    pulled.pull()
    assert pulled.pids() == []
    assert pulled.held() == []
    return pulled


def assert_page_shows_the_loss(site: Site, pulled: Machine) -> None:
    leader = site.leader()
    assert "<title>backstay</title>" in site.page(leader, "/")
    shown = json.loads(site.page(leader, "/status.json"))
    assert {entry["name"]: entry["state"] for entry in shown["nodes"]}[pulled.name] == "lost"
    verdict = site.run_status(RUN)["verdict"]
    assert verdict["survives"] == PARITY - 1
    assert pulled.name in verdict["reason"]
    assert any(event["kind"] == "node_lost" and pulled.name in json.dumps(event) for event in shown["timeline"])


def replace(site: Site, pulled: Machine) -> None:
    """Another machine, another name; Prometheus is told."""
    site.nodes[site.nodes.index(pulled)] = site.add_node()
    site.aim()
    site.wait(lambda: site.states().get(site.nodes[3].name) == "live", "the replacement to be live")


def restored(site: Site, rank: int) -> list[dict[str, object]]:
    return [line for line in site.lines(rank) if line["event"] == "restored"]


def is_restored(site: Site) -> bool:
    return all(len(restored(site, rank)) == 2 for rank in range(NODES))


def protected_at_restore(site: Site) -> int:
    return int(str(restored(site, 0)[-1]["step"]))


def assert_restored_bytes(site: Site, known: list[dict[int, str]], *, at_least: int) -> None:
    """Every rank, that of the pulled machine too, has what it had at that step."""
    for rank in range(NODES):
        found = restored(site, rank)[-1]
        step = int(str(found["step"]))
        assert step >= at_least, found
        assert found["digest"] == known[rank][step], f"rank {rank}"


def causes(site: Site) -> list[str]:
    """Why the run was interrupted, each time, by `backstay report`."""
    (run,) = json.loads(site.backstay("report", RUN, "--json").stdout)["runs"]
    return [interruption["cause"] for interruption in run["ledger"]["interruptions"]]


def follow_a_killed_leader(site: Site) -> None:
    old = site.leader()
    before, attempt = protected(site), site.run_status(RUN)["attempt"]
    old.kill(role="daemon")
    other = next(machine for machine in site.coordinators if machine is not old)
    site.wait(lambda: site.leader() is other, "the standby to lead")
    site.wait(lambda: is_protected_past(site, before), "new steps to be protected under the new leader")
    assert site.run_status(RUN)["attempt"] == attempt
    assert f"{other.address}:7070 leads" in site.backstay("status").stdout
    wait_until(lambda: protection_alerts(site) == set(), deadline_s=30, why="no alert about the run")
