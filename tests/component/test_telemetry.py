"""Logs, metrics and the HTTP server, with real sockets."""

from __future__ import annotations

import io
import json
import logging
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from backstay.errors import ConfigError, UnavailableError
from backstayd.telemetry import http, logs
from backstayd.telemetry.health import Health
from backstayd.telemetry.metrics import NodeMetrics
from backstayd.telemetry.routes import Reply, Route, daemon_routes, in_turns
from tests.kit.wording import refuses, says


def _get(address: str, path: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def _routes(metrics: NodeMetrics) -> dict[str, Route]:
    return {
        **daemon_routes(Health(lease_s=10), metrics.registry, lambda: {"format": 1, "role": "node"}),
        "/page": lambda query: Reply(body=b"<p>", content_type="text/html", headers={"Content-Security-Policy": query}),
    }


@pytest.fixture
def metrics() -> NodeMetrics:
    return NodeMetrics(version="0.1.0")


@pytest.fixture
def server(metrics: NodeMetrics) -> Iterator[http.HttpServer]:
    running = http.start_http("127.0.0.1:0", _routes(metrics))
    yield running
    running.close()


def test_each_path_of_the_table_answers_and_others_name_what_there_is(server: http.HttpServer) -> None:
    assert _get(server.address, "/healthz") == (200, b"ok\n")
    status, body = _get(server.address, "/status.json?pretty")
    assert (status, json.loads(body)) == (200, {"format": 1, "role": "node"})
    assert _get(server.address, "/metrics")[0] == 200
    status, body = _get(server.address, "/")
    assert status == 404
    assert all(path in body for path in (b"/healthz", b"/livez", b"/metrics", b"/page", b"/readyz", b"/status.json"))


def test_a_route_may_send_headers_and_is_told_the_query(server: http.HttpServer) -> None:
    with urllib.request.urlopen(f"http://{server.address}/page?default-src", timeout=10) as response:
        assert response.headers["Content-Security-Policy"] == "default-src"
        assert response.headers["Content-Type"] == "text/html"


def test_head_is_answered_without_a_body(server: http.HttpServer) -> None:
    request = urllib.request.Request(f"http://{server.address}/healthz", method="HEAD")
    with urllib.request.urlopen(request, timeout=10) as response:
        assert (response.status, response.headers["Content-Length"], response.read()) == (200, "3", b"")


def test_a_probe_says_what_is_wrong_and_that_it_is_over() -> None:
    now = [100.0]
    health = Health(lease_s=3.0, monotonic_s=lambda: now[0])
    server = http.start_http(
        "127.0.0.1:0",
        daemon_routes(health, CollectorRegistry(), dict),
    )
    try:
        assert _get(server.address, "/readyz") == (503, b"starting\n")
        health.beat("the event loop")
        health.set_ready(lambda: "ready: all is served")
        now[0] += 10.0
        assert _get(server.address, "/readyz") == (200, b"ready: all is served\n")
        assert _get(server.address, "/livez") == (200, b"alive: the event loop 10.0 s ago\n")
        now[0] += 0.5
        status, sentence = _get(server.address, "/livez")
        assert status == 503
        assert says("loop_hangs", sentence.decode(), loop="the event loop", seconds="10.5", bound="10")
        health.beat("the event loop")
        assert _get(server.address, "/livez")[0] == 200
        health.watch("socket", lambda: "closed")
        assert _get(server.address, "/livez") == (503, b"socket: closed\n")
    finally:
        server.close()


def test_a_daemon_with_a_long_lease_may_be_silent_for_three_of_them() -> None:
    assert Health(lease_s=60.0).bound_s == 180.0


def test_a_counted_corruption_is_seen_by_a_scraper(server: http.HttpServer, metrics: NodeMetrics) -> None:
    metrics.corrupt.labels(where="parity").inc(2)
    body = _get(server.address, "/metrics")[1].decode()
    samples = [sample for family in text_string_to_metric_families(body) for sample in family.samples]
    found = {s.labels["where"]: s.value for s in samples if s.name == "backstay_corrupt_total"}
    assert found == {"shard": 0, "parity": 2, "in_flight": 0}


def test_a_costly_document_is_made_for_one_watcher_at_a_time() -> None:
    lock, most, done = threading.Lock(), 0, threading.Barrier(5, timeout=20)
    makers: list[int] = []

    def document() -> dict[str, Any]:
        nonlocal most
        with lock:
            makers.append(1)
            most = max(most, len(makers))
        threading.Event().wait(0.01)
        with lock:
            makers.pop()
        return {}

    make = in_turns(document)

    def watch() -> None:
        make()
        done.wait()

    threads = [threading.Thread(target=watch) for _ in range(4)]
    for thread in threads:
        thread.start()
    done.wait()
    for thread in threads:
        thread.join(10)
    assert most == 1


def test_a_document_that_fails_is_an_error_and_the_server_goes_on() -> None:
    answers: list[dict[str, Any] | Exception] = [ValueError("broken"), UnavailableError("busy"), {"format": 1}]

    def document() -> dict[str, Any]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    server = http.start_http("127.0.0.1:0", daemon_routes(Health(lease_s=10), CollectorRegistry(), document))
    try:
        assert _get(server.address, "/status.json") == (500, b"ValueError\n")
        assert _get(server.address, "/status.json") == (503, b"busy\n")
        assert _get(server.address, "/status.json") == (200, b'{"format": 1}\n')
    finally:
        server.close()


def test_a_port_in_use_is_a_configuration_error_that_names_it(server: http.HttpServer) -> None:
    with refuses(ConfigError, "bind_failed", server.address):
        http.start_http(server.address, {})


def test_an_address_that_is_not_here_is_a_configuration_error() -> None:
    with refuses(ConfigError, "bind_failed", "192.0", "2.1", 80):
        http.start_http("192.0.2.1:80", {})


def test_connections_that_say_nothing_are_bounded_and_do_not_stop_the_server(server: http.HttpServer) -> None:
    host, port = server.address.rsplit(":", 1)
    before = threading.active_count()
    idle = [socket.create_connection((host, int(port)), timeout=5) for _ in range(2 * http.MAX_CONNECTIONS)]
    try:
        # The server closes what is over its limit: reading from one of those connections ends at once.
        assert sum(_is_closed(connection) for connection in idle) >= http.MAX_CONNECTIONS
        assert threading.active_count() - before <= http.MAX_CONNECTIONS
    finally:
        for connection in idle:
            connection.close()
    assert _get_when_free(server.address) == (200, b"ok\n")


def test_a_host_that_holds_connections_open_does_not_shut_out_another(server: http.HttpServer) -> None:
    host, _, port = server.address.rpartition(":")
    idle = [socket.create_connection((host, int(port)), timeout=5) for _ in range(2 * http.MAX_CONNECTIONS)]
    try:
        assert sum(_is_closed(connection) for connection in idle) >= http.MAX_CONNECTIONS
        probe = HTTPConnection(host, int(port), timeout=10, source_address=("127.0.0.2", 0))
        probe.request("GET", "/healthz")
        assert probe.getresponse().read() == b"ok\n"
        probe.close()
    finally:
        for connection in idle:
            connection.close()


def test_many_hosts_that_hold_all_connections_do_not_make_a_probe_fail(server: http.HttpServer) -> None:
    host, _, port = server.address.rpartition(":")
    held = [
        socket.create_connection((host, int(port)), timeout=5, source_address=(f"127.0.0.{10 + index % 3}", 0))
        for index in range(3 * http.MAX_PER_HOST)
    ]
    try:
        for _ in range(3):
            probe = HTTPConnection(host, int(port), timeout=10, source_address=("127.0.0.2", 0))
            probe.request("GET", "/healthz")
            assert probe.getresponse().read() == b"ok\n"
            probe.close()
    finally:
        for connection in held:
            connection.close()


def test_a_watcher_that_says_a_byte_now_and_then_is_cut_all_the_same(
    server: http.HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "EXCHANGE_TIMEOUT_S", 0.5)
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as slow:
        slow.sendall(b"GET /healthz HTTP/1.0\r\nX: ")
        slow.settimeout(0.05)
        give_up_s = time.monotonic() + 20
        while not _says_no_more(slow, b"x"):
            assert time.monotonic() < give_up_s, "a byte each 50 ms kept the connection for 20 s"
    assert _get(server.address, "/healthz") == (200, b"ok\n")


def _says_no_more(connection: socket.socket, more: bytes) -> bool:
    """Whether the other side has ended the connection; else it gets ``more``."""
    try:
        connection.sendall(more)
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except (ConnectionResetError, BrokenPipeError):
        return True


def _is_closed(connection: socket.socket) -> bool:
    connection.settimeout(0.2)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True


def _get_when_free(address: str) -> tuple[int, bytes]:
    """Ask again until a place is free: the server needs a moment to notice that the idle ones left."""
    pause = threading.Event()
    for _ in range(100):
        try:
            return _get(address, "/healthz")
        except (urllib.error.URLError, ConnectionError):
            pause.wait(0.05)
    raise AssertionError("the server did not answer within 5 s of its places coming free")


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_text_log_line_has_time_level_component_logger_and_extra_values(stream: io.StringIO) -> None:
    logs.configure(level="info", form="text", component="node n1", stream=stream)
    logging.getLogger("backstayd.x").info("kept %s", "step 7", extra={"run": "default/gpt"})
    logging.getLogger("backstayd.x").debug("not shown")
    line = stream.getvalue()
    assert line.endswith(" INFO node n1 backstayd.x: kept step 7 run=default/gpt\n")
    assert line[10] == "T"


def test_what_others_say_cannot_pass_for_a_text_log_line(stream: io.StringIO) -> None:
    logs.configure(level="info", form="text", component="node n1", stream=stream)
    forged = "\n2026-11-21T03:42:45.123Z INFO node n1 backstayd.x: all is well\x1b[2J"
    try:
        raise ValueError(forged)
    except ValueError:
        logging.getLogger("backstayd.x").exception("distrusted: %s", forged, extra={"run": forged})
    lines = stream.getvalue().removesuffix("\n").split("\n")
    assert all(line.startswith("  ") for line in lines[1:]), "only a record begins at the margin"
    assert lines[0].count("all is well") == 2
    assert all(line.isprintable() for line in lines)


def test_a_json_log_line_is_one_object_even_with_an_exception(stream: io.StringIO) -> None:
    logs.configure(level="debug", form="json", component="coordinator", stream=stream)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("backstayd.x").exception("failed")
    (line,) = stream.getvalue().splitlines()
    record = json.loads(line)
    assert (record["level"], record["message"], record["component"]) == ("error", "failed", "coordinator")
    assert "ValueError: two" in record["exception"]
