"""Thousands of handshakes at the coordinator's TLS port, a renewed certificate among them: it goes on, and a job beside it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from backstay.testing.fixtures import LocalClusterFactory as NewCluster
from tests.kit.handshakes import KINDS, storm
from tests.kit.light_world import light_world
from tests.kit.wording import count_of, says

pytest.importorskip("cryptography")

COUNT = int(os.environ.get("BACKSTAY_HANDSHAKES", "2100"))
RUN = "default/stormed"


def test_a_storm_of_handshakes_neither_kills_the_coordinator_nor_stops_a_job(new_cluster: NewCluster) -> None:
    cluster = new_cluster(2, 1, lease_s=3.0, tls=True)
    assert cluster.certificates is not None
    assert cluster.coordinator_process is not None
    host, _, port = cluster.coordinator_address.rpartition(":")
    pid = cluster.coordinator_process.pid
    with light_world(cluster, RUN) as world, ThreadPoolExecutor(1) as side:
        world.start_fresh()
        ended = side.submit(storm, (host, int(port)), cluster.certificates.directory / "operator", COUNT)
        step = 0
        while not ended.done():
            step += 1
            world.protect(step)
            if step == 2:
                cluster.certificates.make(*(node.name for node in cluster.nodes), has_others=True)
        outcomes = ended.result()
        world.protect(step + 1)
    assert sum(outcomes.values()) == COUNT
    valid = COUNT * KINDS.count("valid") // len(KINDS)
    assert outcomes["valid: shaken"] >= valid * 0.9, outcomes  # a pair can be read while it is being renewed
    assert cluster.coordinator_process.pid == pid
    assert cluster.coordinator_process.poll() is None
    log = (cluster.keeper.log_dir / "coordinator.log").read_text()
    assert says("certificate_renewed", log), "it was renewed among them"
    assert "Traceback" not in log
    assert count_of("handshakes_ended", log) <= 3, "one line a minute, however many"
    nodes = {event["message"] for event in cluster.status()["timeline"] if event["kind"] == "node_lost"}
    assert not nodes
