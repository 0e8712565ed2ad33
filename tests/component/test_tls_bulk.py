"""Bytes between nodes over TLS: who is refused and what either side says, and certificates renewed under a transfer."""

from __future__ import annotations

import contextlib
import datetime as dt
import random
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("cryptography")

from backstay.errors import BackstayError, IntegrityError, UnavailableError
from backstay.format import json_records
from backstay.format.manifest import CHUNK_BYTES, Manifest
from backstay.testing.wait import wait_until
from backstayd.coder import bulk_server
from backstayd.coder.bulk_server import BulkServer
from backstayd.coder.jobs import CoderEvent
from backstayd.security import credentials as credentials_module
from backstayd.security.credentials import Credentials
from backstayd.store.paths import FragmentRef, RunPaths, ShardRef
from backstayd.store.staging import prepare_staging
from backstayd.transport.bulk.client import BulkClient
from backstayd.transport.bulk.wire import BulkReply, BulkRequest, Timeouts
from tests.component.coder_nodes import KEY, RUN, listening_socket, publish_shard
from tests.kit.certificates import TestAuthority, node_credentials, node_uri
from tests.kit.wording import refuses

CHUNKS = 96
DATA = random.Random(1).randbytes(CHUNKS * CHUNK_BYTES)
FAST = Timeouts(connect_s=2.0, constant_s=2.0)
PAST = -dt.timedelta(hours=1)


class Served:
    """A served directory with one published shard."""

    def __init__(self, directory: Path, credentials: Credentials | None) -> None:
        self.paths = RunPaths(directory, RUN)
        self.manifest: Manifest = publish_shard(self.paths, 0, DATA, world_size=1)
        self.events: list[CoderEvent] = []
        self._listen = listening_socket()
        self.address = f"127.0.0.1:{self._listen.getsockname()[1]}"
        self._server = BulkServer(
            self._listen,
            memory_dir=directory,
            incarnation="aa",
            on_event=self.events.append,
            timeouts=FAST,
            credentials=credentials,
        )
        self._thread = threading.Thread(target=self._server.serve)
        self._thread.start()

    @property
    def ref(self) -> ShardRef:
        return ShardRef(run=RUN, key=KEY, rank=0, world_size=1, digest=self.manifest.digest)

    def client(self, credentials: Credentials | None) -> BulkClient:
        return BulkClient(self.address, timeouts=FAST, credentials=credentials)

    def read(self, credentials: Credentials | None, *, count: int = 1) -> bytes:
        client = self.client(credentials)
        try:
            view = memoryview(bytearray(count * CHUNK_BYTES))
            client.read(self.ref, first_chunk=0, view=view, chunk_count=count)
            return bytes(view)
        finally:
            client.close()

    def refusal(self, credentials: Credentials | None) -> BackstayError:
        with pytest.raises(BackstayError) as caught:
            self.read(credentials)
        return caught.value

    def close(self) -> None:
        self._server.close()
        self._thread.join(5)
        self._listen.close()


@pytest.fixture(autouse=True)
def look_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials_module, "CHECK_S", 0.0)


@pytest.fixture
def authority(tmp_path: Path) -> TestAuthority:
    return TestAuthority(tmp_path / "ca")


@pytest.fixture
def served(authority: TestAuthority, tmpfs_dir: Path) -> Iterator[Served]:
    made = Served(tmpfs_dir, authority.node("server"))
    yield made
    made.close()


@pytest.fixture
def plain(tmpfs_dir: Path) -> Iterator[Served]:
    made = Served(tmpfs_dir, None)
    yield made
    made.close()


def test_a_shard_is_read_and_written_as_without_tls(served: Served, authority: TestAuthority) -> None:
    node = authority.node("client")
    assert served.read(node, count=CHUNKS) == DATA
    client = served.client(node)
    staging = ShardRef(run=RUN, key=KEY, rank=0, world_size=1, digest=served.manifest.digest)
    prepare_staging(served.paths, served.manifest, digest=served.manifest.digest, incarnation="aa")
    assert client.is_staged(staging)
    client.begin_put_shard(staging, first_chunk=0, chunk_count=2, stripe=-1)
    for chunk in range(2):
        client.put_chunk(0, [memoryview(DATA)[chunk * CHUNK_BYTES : (chunk + 1) * CHUNK_BYTES]])
    client.end_put()
    unknown = ShardRef(run=RUN, key=KEY, rank=0, world_size=1, digest="ab" * 32)
    with pytest.raises(IntegrityError):
        client.read(unknown, first_chunk=0, view=memoryview(bytearray(CHUNK_BYTES)), chunk_count=1)
    client.close()


def test_operators_and_coordinators_may_not_read_what_runs_hold(
    served: Served, authority: TestAuthority, caplog: pytest.LogCaptureFixture
) -> None:
    for other in (authority.operator(), authority.coordinator()):
        role = other.role.value
        error = served.refusal(other)
        assert isinstance(error, UnavailableError), "the daemon tries again"
        wait_logged(caplog, f"its role is {role}, but only node may")
        assert served.address in str(error)


def test_a_peer_of_another_authority_is_refused_on_both_sides(
    served: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = TestAuthority(tmp_path / "other", name="other CA").node("client")
    error = served.refusal(stranger)
    assert error.reason == "peer_other_ca"
    assert "tls_ca" in str(error)
    wait_logged(caplog, "rejects our certificate (spiffe://backstay/backstay/node/server)")


def test_a_peer_that_trusts_us_and_is_not_trusted_is_told_so(
    served: Served, authority: TestAuthority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = TestAuthority(tmp_path / "other", name="other CA")
    files = other.make([node_uri("n1")])
    files.ca.write_bytes(other.pem + authority.pem)
    error = served.refusal(node_credentials(files))
    assert error.reason == "we_other_ca"
    assert "tls_ca" in str(error)
    wait_logged(caplog, "its certificate was rejected")


def test_expired_certificates_are_refused_and_named_on_both_sides(
    served: Served, authority: TestAuthority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    error = served.refusal(authority.node("client", ends=PAST))
    assert error.reason == "we_expired"
    assert "spiffe://backstay/backstay/node/client" in str(error)
    wait_logged(caplog, "its certificate was rejected: certificate has expired; renew it there")


def test_a_server_whose_certificate_expired_is_refused(
    authority: TestAuthority, tmpfs_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = Served(tmpfs_dir, authority.node("server", ends=PAST))
    try:
        error = made.refusal(authority.node("client"))
        assert error.reason == "peer_expired"
    finally:
        made.close()


def test_plaintext_to_a_node_of_tls_is_told_in_plaintext(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    error = served.refusal(None)
    assert error.reason == "tls_required"
    assert all(setting in str(error) for setting in ("tls_cert", "tls_key", "tls_ca"))
    wait_logged(caplog, "127.0.0.1 speaks plaintext, but TLS is required here")


def test_tls_to_a_node_of_plaintext_is_refused_on_both_sides(
    plain: Served, authority: TestAuthority, caplog: pytest.LogCaptureFixture
) -> None:
    error = plain.refusal(authority.node("client"))
    assert "does it speak TLS" in str(error)
    wait_logged(caplog, "127.0.0.1 speaks TLS, and here plaintext is spoken (insecure)")


def test_a_certificate_whose_names_are_no_text_is_refused_and_takes_no_place(
    served: Served, authority: TestAuthority, caplog: pytest.LogCaptureFixture
) -> None:
    files = authority.make([node_uri("x")], is_text=False)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(files.ca)
    context.load_cert_chain(files.cert, files.key)
    host, _, port = served.address.rpartition(":")
    for _ in range(bulk_server.MAX_CONNECTIONS + 1):
        with (
            socket.create_connection((host, int(port)), timeout=10) as sock,
            context.wrap_socket(sock) as wrapped,
            contextlib.suppress(OSError),
        ):
            assert b"names cannot be read" in wrapped.recv(4096)
    assert served.read(authority.node("client"), count=1) == DATA[:CHUNK_BYTES]
    assert "names cannot be read" in caplog.text


def test_no_session_is_resumed_so_that_each_connection_has_its_certificate_looked_at(
    served: Served, authority: TestAuthority
) -> None:
    context = authority.node("client").current().client_context
    host, _, port = served.address.rpartition(":")
    request = json_records.dumps(BulkRequest(op="get_plan", run=RUN, plan_id="ab" * 16))
    with socket.create_connection((host, int(port)), timeout=10) as sock, context.wrap_socket(sock) as wrapped:
        wrapped.sendall(struct.pack(">I", len(request)) + request)
        assert wrapped.recv(4), "an answer, before which a server sends its tickets"
        assert wrapped.session is None or not wrapped.session.has_ticket


def test_a_client_that_never_ends_its_handshake_is_cut(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", int(served.address.rpartition(":")[2])), timeout=10) as sock:
        sock.sendall(b"\x16\x03\x01")
        assert sock.recv(1) == b"", "cut after the time for connecting"


def test_a_server_of_plaintext_that_answers_is_explained(authority: TestAuthority) -> None:
    """An old peer, or another program."""
    with listening_socket() as listen:

        def answer() -> None:
            sock, _ = listen.accept()
            with sock:
                sock.recv(1)
                payload = json_records.dumps(BulkReply())
                sock.sendall(struct.pack(">I", len(payload)) + payload)
                sock.recv(65536)

        listen.setblocking(True)
        thread = threading.Thread(target=answer)
        thread.start()
        client = BulkClient(f"127.0.0.1:{listen.getsockname()[1]}", timeouts=FAST, credentials=authority.node())
        with refuses(UnavailableError, "plaintext") as caught:
            client.get_plan(FragmentRef(run=RUN, key=KEY, plan_id="ab" * 16))
        assert caught.value.reason == "plaintext"
        thread.join(5)


def test_a_certificate_renewed_under_a_transfer_drops_nothing_and_new_connections_show_it(
    authority: TestAuthority, tmpfs_dir: Path
) -> None:
    server_credentials, node = authority.node("server"), authority.node("client")
    served = Served(tmpfs_dir, server_credentials)
    try:
        client = served.client(node)
        client.request(served.ref, first_chunk=0, chunk_count=CHUNKS)
        reply = client.begin_answer()
        view = memoryview(bytearray(reply.payload_bytes))
        client.receive_into(view[:CHUNK_BYTES])  # the rest is under way, more than buffers hold
        authority.make([node_uri("server")], into=server_credentials.files)
        authority.make([node_uri("client")], into=node.files)
        assert shown_by(served, node) == server_credentials.files.cert.read_bytes()
        client.receive_into(view[CHUNK_BYTES:])
        assert bytes(view) == DATA
        again = memoryview(bytearray(CHUNK_BYTES))
        client.read(served.ref, first_chunk=1, view=again, chunk_count=1)
        assert bytes(again) == DATA[CHUNK_BYTES : 2 * CHUNK_BYTES], "the old connection goes on"
        client.close()
        assert server_credentials.current().number == 2
    finally:
        served.close()


def test_renewal_under_another_authority_works_when_both_are_trusted_meanwhile(
    authority: TestAuthority, tmp_path: Path, tmpfs_dir: Path
) -> None:
    new = TestAuthority(tmp_path / "new", name="new CA")
    server, client = authority.node("server"), authority.node("client")
    served = Served(tmpfs_dir, server)
    try:
        for held in (server, client):
            held.files.ca.write_bytes(authority.pem + new.pem)
        assert served.read(client) == DATA[:CHUNK_BYTES]
        for name, held in (("server", server), ("client", client)):
            made = new.make([node_uri(name)])
            for path, source in ((held.files.cert, made.cert), (held.files.key, made.key)):
                path.write_bytes(source.read_bytes())
            assert served.read(client) == DATA[:CHUNK_BYTES]
        for held in (server, client):
            held.files.ca.write_bytes(new.pem)
            assert served.read(client) == DATA[:CHUNK_BYTES]
        assert served.refusal(authority.node("withdrawn")).reason == "peer_other_ca"
    finally:
        served.close()


def wait_logged(caplog: pytest.LogCaptureFixture, text: str) -> None:
    """The server writes in threads of its own."""
    wait_until(lambda: text in caplog.text, deadline_s=10, why=f"{text!r} to be logged; there is {caplog.text!r}")


def shown_by(served: Served, node: Credentials) -> bytes:
    """The certificate that the server shows to a new connection, as PEM."""
    import ssl

    host, _, port = served.address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=5) as sock,
        node.current().client_context.wrap_socket(sock) as wrapped,
    ):
        der = wrapped.getpeercert(binary_form=True)
        assert wrapped.version() == "TLSv1.3"
    assert der is not None
    return ssl.DER_cert_to_PEM_cert(der).encode()
