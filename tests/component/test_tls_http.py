"""What watchers see over TLS, and what a daemon says of the end of its certificate."""

from __future__ import annotations

import datetime as dt
import http.client
import logging
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("cryptography")

from prometheus_client.exposition import generate_latest

from backstayd.security import credentials as credentials_module
from backstayd.security.authority import Authority
from backstayd.security.credentials import Credentials, ExpiryWatch, TlsFiles
from backstayd.security.identity import Identity, Role
from backstayd.telemetry.http import start_http
from backstayd.telemetry.metrics import NodeMetrics
from backstayd.telemetry.routes import text_reply
from tests.kit.certificates import TestAuthority, node_uri

NODE = Identity(trust_domain="backstay", role=Role.NODE, name="n1")


@pytest.fixture(autouse=True)
def look_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials_module, "CHECK_S", 0.0)


@pytest.fixture
def issued(tmp_path: Path) -> Credentials:
    """A node's certificate that is also for the address it serves watchers at, as --host makes it."""
    made = Authority(tmp_path / "ca").issue(
        NODE, tmp_path / "n1", lifetime=dt.timedelta(days=30), hosts=["127.0.0.1", "localhost"]
    )
    return Credentials(
        TlsFiles(cert=made.cert, key=made.key, ca=made.ca), trust_domain="backstay", role=Role.NODE, name="n1"
    )


@pytest.fixture
def address(issued: Credentials) -> Iterator[tuple[str, int]]:
    server = start_http("127.0.0.1:0", {"/hello": lambda query: text_reply("hello")}, credentials=issued)
    host, _, port = server.address.rpartition(":")
    yield host, int(port)
    server.close()


def get(address: tuple[str, int], context: ssl.SSLContext, path: str = "/hello") -> tuple[int, bytes]:
    connection = http.client.HTTPSConnection(*address, context=context, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_a_watcher_that_trusts_the_authority_needs_no_certificate(
    address: tuple[str, int], issued: Credentials, tmp_path: Path
) -> None:
    trusting = ssl.create_default_context(cafile=str(issued.files.ca))
    assert get(address, trusting) == (200, b"hello\n")
    with pytest.raises(ssl.SSLCertVerificationError):
        get(address, ssl.create_default_context())
    Authority(tmp_path / "ca").issue(NODE, tmp_path / "n1", lifetime=dt.timedelta(days=60), hosts=["127.0.0.1"])
    assert get(address, trusting) == (200, b"hello\n")
    assert issued.current().number == 2, "renewed while it served"


def test_plain_http_to_it_is_told_to_speak_tls(address: tuple[str, int]) -> None:
    connection = http.client.HTTPConnection(*address, timeout=10)
    connection.request("GET", "/hello")
    response = connection.getresponse()
    assert (response.status, response.read()) == (400, b"this port speaks TLS; use https://\n")
    connection.close()


def test_a_watcher_that_says_nothing_is_cut(address: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backstayd.telemetry.http.REQUEST_TIMEOUT_S", 0.2)
    with socket.create_connection(address, timeout=10) as sock:
        assert sock.recv(1) == b""


def test_the_end_of_a_certificate_is_exported_and_follows_a_renewal(tmp_path: Path) -> None:
    authority = TestAuthority(tmp_path)
    held = authority.node()
    metrics = NodeMetrics(version="1")
    watch = ExpiryWatch(held, metrics.set_expiry)
    watch.look()

    def end(certificate: str) -> float | None:
        return metrics.registry.get_sample_value(
            "backstay_certificate_expiry_timestamp_seconds", {"certificate": certificate}
        )

    first = end("own")
    assert first == held.current().not_after_unix_s
    assert end("authority") == authority.cert.not_valid_after_utc.timestamp()
    authority.make([node_uri("n1")], ends=dt.timedelta(days=9), into=held.files)
    watch.look()
    assert end("own") == held.current().not_after_unix_s != first
    assert b"backstay_certificate_expiry_timestamp_seconds" in generate_latest(metrics.registry)


def test_without_tls_no_end_is_exported() -> None:
    exported: list[str] = []
    ExpiryWatch(None, lambda certificate, unix_s: exported.append(certificate)).look()
    assert not exported


def test_the_end_is_warned_of_from_a_week_before_and_an_error_once_it_came(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = TestAuthority(tmp_path)
    held = authority.node(ends=dt.timedelta(days=20))
    watch = ExpiryWatch(held, lambda certificate, unix_s: None)
    watch.look()
    assert not caplog.records
    authority.make([node_uri("n1")], ends=dt.timedelta(days=3), into=held.files)
    watch.look()
    watch.look()
    assert [record.levelno for record in caplog.records] == [logging.WARNING], "said once an hour"
    assert "of spiffe://backstay/backstay/node/n1 the certificate ends at 20" in caplog.text
    monkeypatch.setattr(credentials_module, "AGAIN_S", 0.0)
    watch.look()
    assert len(caplog.records) == 2
    caplog.clear()
    expired = ExpiryWatch(authority.node(ends=-dt.timedelta(hours=1)), lambda certificate, unix_s: None)
    expired.look()
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "no restart is needed" in caplog.text
