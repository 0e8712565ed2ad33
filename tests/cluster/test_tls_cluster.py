"""A cluster whose daemons show certificates: the same promises, and certificates renewed while it works."""

from __future__ import annotations

import os

import pytest

from backstay.testing import LocalCluster
from tests.kit.command import backstay
from tests.kit.light_world import light_world, wait_protected
from tests.kit.wording import says

pytest.importorskip("cryptography")

CLUSTER = {"nodes": 4, "parity": 1, "lease_s": 1.5, "tls": True}
BIG = 24 * 1024 * 1024


def serial_numbers(cluster: LocalCluster) -> dict[str, bytes]:
    assert cluster.certificates is not None
    return {str(path): path.read_bytes() for path in cluster.certificates.directory.rglob("tls.crt")}


def test_certificates_are_renewed_while_bytes_move_and_a_lost_node_is_rebuilt_bit_for_bit(
    cluster: LocalCluster,
) -> None:
    assert cluster.certificates is not None
    run = "default/renewed"
    with light_world(cluster, run, size_bytes=BIG) as world:
        world.start_fresh()
        before = serial_numbers(cluster)
        for step in range(1, 5):
            world.publish(step)  # protection of it begins at once
            cluster.certificates.make(*(node.name for node in cluster.nodes), has_others=True)
            wait_protected(cluster, run, step)
        after = serial_numbers(cluster)
        assert before.keys() == after.keys()
        assert not set(before.values()) & set(after.values())
        cluster.wait_until(
            lambda: all(says("certificate_renewed", log_of(cluster, node.name)) for node in cluster.nodes),
            deadline_s=20,
            why="every node to take up its new certificate",
        )
        world.kill()
    assert not says("coder_ended", [log_of(cluster, node.name) for node in cluster.nodes])
    cluster.destroy_node(3)
    cluster.replace_node(3)  # it gets a certificate of its own
    with light_world(cluster, run, size_bytes=BIG) as again:
        again.restore_exactly(4)
    lost = log_of(cluster, "coordinator").count("node_lost")
    assert lost == 1, "only the node that was destroyed was ever missed"


def log_of(cluster: LocalCluster, name: str) -> str:
    return (cluster.keeper.log_dir / f"{name}.log").read_text()


def test_an_operator_with_a_certificate_sees_and_steers(cluster: LocalCluster) -> None:
    shown = backstay(cluster, "status")
    assert shown.returncode == 0, shown.stderr
    assert "node-0" in shown.stdout
    unknown = backstay(cluster, "forget", "default/nobody")
    assert unknown.returncode == 66, "the call was let through; there is no such run"


def test_plaintext_to_a_coordinator_of_tls_is_told_what_is_missing(cluster: LocalCluster) -> None:
    plain = {"BACKSTAY_INSECURE": "true", "BACKSTAY_TLS_CERT": "", "BACKSTAY_TLS_KEY": "", "BACKSTAY_TLS_CA": ""}
    refused = backstay(cluster, "status", **plain)
    assert refused.returncode == 78
    assert all(name in refused.stderr for name in ("TLS", "tls_cert", "tls_key", "tls_ca"))


def test_a_nodes_certificate_is_no_operators(cluster: LocalCluster) -> None:
    assert cluster.certificates is not None
    node = cluster.certificates.of_node(cluster.nodes[0].name)
    stolen = {name.replace("BACKSTAYD_NODE_", "BACKSTAY_"): value for name, value in node.items()}
    refused = backstay(cluster, "forget", "default/renewed", **stolen)
    assert refused.returncode == 78
    assert f"spiffe://backstay/backstay/node/{cluster.nodes[0].name}" in refused.stderr


def test_an_expired_certificate_of_an_operator_is_named_before_anybody_is_called(cluster: LocalCluster) -> None:
    assert cluster.certificates is not None
    directory = cluster.root / "certificates" / "operator"
    try:
        argv = ["certs", "--ca-dir", str(cluster.certificates.directory), "--operator", "--days", "0.00001"]
        assert backstay(cluster, *argv).returncode == 0
        cluster.wait_until(
            lambda: backstay(cluster, "status").returncode == 78, deadline_s=20, why="a second of validity to pass"
        )
        refused = backstay(cluster, "status")
        identity = "spiffe://backstay/backstay/operator"
        assert says("certificate_expired", refused.stderr, file=directory / "tls.crt", identity=identity)
        assert "--ca-dir" in refused.stderr
    finally:
        cluster.certificates.make(has_others=True)
    assert os.path.exists(directory)
