"""The coordinator over TLS: roles and names from certificates, what is refused and how it is said, certificates renewed."""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

pytest.importorskip("cryptography")

from backstay.errors import BackstayError, ConfigError
from backstayd.core.messages.desired import NodeDesired
from backstayd.security import credentials as credentials_module
from backstayd.security import handshakes
from backstayd.security.certificate import read_pem
from backstayd.security.credentials import Credentials, TlsFiles
from backstayd.security.identity import Role
from backstayd.transport import link as link_module
from backstayd.transport.access import roles_of
from backstayd.transport.coordinator_service import CoordinatorServer
from backstayd.transport.link import CoordinatorLink
from backstayd.transport.operator import OperatorClient
from backstayd.v1 import coordinator_pb2, operator_pb2, operator_pb2_grpc
from tests.component.test_transport import LEASE_S, RecordingBackend, report_of, run, until
from tests.kit.certificates import COORDINATOR, OPERATOR, TestAuthority, node_credentials, node_uri
from tests.kit.wording import says

PAST = -dt.timedelta(hours=1)


@pytest.fixture(autouse=True)
def look_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials_module, "CHECK_S", 0.0)


@pytest.fixture
def authority(tmp_path: Path) -> TestAuthority:
    return TestAuthority(tmp_path / "ca")


@asynccontextmanager
async def serving(credentials: Credentials | None, **options: Any) -> AsyncIterator[tuple[str, RecordingBackend]]:
    backend = RecordingBackend()
    server = CoordinatorServer("127.0.0.1:0", backend, lease_s=LEASE_S, credentials=credentials, **options)
    try:
        yield await server.start(), backend
    finally:
        await server.close()


@asynccontextmanager
async def linked(
    address: str, credentials: Credentials | None, *, name: str = "n1", **options: Any
) -> AsyncIterator[tuple[CoordinatorLink, list[NodeDesired], list[bool]]]:
    desired: list[NodeDesired] = []
    states: list[bool] = []
    link = CoordinatorLink(
        address,
        report=lambda: report_of(name),
        on_desired=desired.append,
        on_state=states.append,
        lease_s=LEASE_S,
        credentials=credentials,
        **options,
    )
    link.start()
    try:
        yield link, desired, states
    finally:
        await link.close()


async def refused(address: str, credentials: Credentials | None, *, name: str = "n1") -> str:
    """What the node says of a coordinator that it cannot come to terms with."""
    async with linked(address, credentials, name=name) as (link, desired, _):
        await until(lambda: link.last_error, "the link to fail")
        assert not desired
        return link.last_error


def operate(address: str, credentials: Credentials | None, call: Callable[[OperatorClient], Any]) -> Any:
    with OperatorClient(address, timeout_s=5.0, credentials=credentials) as client:
        return call(client)


async def operator_error(
    address: str, credentials: Credentials | None, call: Callable[[OperatorClient], Any]
) -> BackstayError:
    with pytest.raises(BackstayError) as caught:
        await asyncio.to_thread(operate, address, credentials, call)
    return caught.value


def get_status(client: OperatorClient) -> Any:
    return client.get_status()


def forget(client: OperatorClient) -> Any:
    return client.forget("default/gpt")


def test_every_call_is_open_to_somebody_and_steering_to_operators_alone() -> None:
    reading = {"GetStatus", "Locate"}
    for file in (coordinator_pb2.DESCRIPTOR, operator_pb2.DESCRIPTOR):
        for service in file.services_by_name.values():
            for method in service.methods:
                roles = roles_of(f"/{service.full_name}/{method.name}")
                if service.name == "CoordinatorService":
                    assert roles == {Role.NODE}
                elif method.name in reading:
                    assert roles == {Role.OPERATOR, Role.COORDINATOR, Role.NODE}
                else:
                    assert roles == {Role.OPERATOR, Role.COORDINATOR}
    for unknown in ("/backstayd.v1.Other/Call", "/backstayd.v1.OperatorService", "", "/x/GetStatus/y"):
        assert roles_of(unknown) == frozenset()


def test_a_node_reports_and_an_operator_calls(authority: TestAuthority) -> None:
    async def scenario() -> None:
        async with (
            serving(authority.coordinator()) as (address, backend),
            linked(address, authority.node()) as (link, desired, _),
        ):
            await until(lambda: desired, "the first answer")
            assert link.is_connected
            assert backend.reports[0].node.name == "n1"
            for caller in (authority.operator(), authority.coordinator(), authority.node()):
                assert (await asyncio.to_thread(operate, address, caller, get_status))["format"] == 1
            await asyncio.to_thread(operate, address, authority.operator(), forget)

    run(scenario)


def test_wrong_roles_are_refused_on_both_sides(authority: TestAuthority, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with serving(authority.coordinator()) as (address, backend):
            text = await refused(address, authority.operator())
            assert "spiffe://backstay/backstay/operator may not call backstayd.v1.CoordinatorService/Sync" in text
            error = await operator_error(address, authority.node(), forget)
            assert isinstance(error, ConfigError)
            assert error.reason == "wrong_role"
            assert "node/n1 may not call backstayd.v1.OperatorService/Forget: its role is node" in str(error)
            assert backend.reports == []

    run(scenario)
    assert "refused: 127.0.0.1: spiffe://backstay/backstay/operator may not call" in caplog.text
    assert "refused: 127.0.0.1: spiffe://backstay/backstay/node/n1 may not call" in caplog.text


def test_a_node_may_not_report_under_another_ones_name(
    authority: TestAuthority, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with serving(authority.coordinator()) as (address, backend):
            text = await refused(address, authority.node("n2"), name="n1")
            assert "node 'n1' reports with the certificate of spiffe://backstay/backstay/node/n2" in text
            assert backend.reports == []
            assert backend.suspects == [], "n1 itself is not touched"

    run(scenario)
    assert "node 'n1' reports with the certificate of" in caplog.text


def test_several_identities_and_other_trust_domains_are_refused(authority: TestAuthority) -> None:
    async def scenario() -> None:
        files = authority.make(["spiffe://prod/backstay/node/n1"])
        stranger = Credentials(files, trust_domain="prod", role=Role.NODE, name="n1")
        async with serving(authority.coordinator()) as (address, backend):
            text = await refused(address, stranger)
            assert "trust domain 'backstay', not 'prod'" in text, "it looks for a coordinator of its own domain"
            greedy = authority.node()
            authority.make([node_uri("n1"), "spiffe://backstay/backstay/operator"], into=greedy.files)
            material = greedy.current()
            assert material.number == 1, "it is not even taken up"
            assert backend.reports == []

    run(scenario)


def test_an_expired_certificate_is_named_with_its_date_and_works_once_renewed(authority: TestAuthority) -> None:
    async def scenario() -> None:
        async with serving(authority.coordinator()) as (address, backend):
            expired = authority.node(ends=PAST)
            async with linked(address, expired) as (link, desired, _):
                await until(lambda: link.last_error, "the link to fail")
                assert "of spiffe://backstay/backstay/node/n1 expired at 20" in link.last_error
                assert "renew it" in link.last_error
                authority.make([node_uri("n1")], into=expired.files)
                await until(lambda: desired, "the renewed certificate to be used")
                assert backend.reports

    run(scenario)


def test_the_coordinator_says_how_many_connections_came_to_nothing(
    authority: TestAuthority, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(handshakes, "PATIENCE_S", 0.5)
    monkeypatch.setattr(handshakes, "AGAIN_S", 0.0)

    async def scenario() -> None:
        async with serving(authority.coordinator()) as (address, _):
            async with linked(address, authority.node()) as (_, desired, _):
                await until(lambda: len(desired) > 8, "answers for longer than the patience")
                assert "ended before a call" not in caplog.text, "who speaks is not counted"
            async with linked(address, authority.node(ends=PAST)):
                await until(lambda: "connections ended before a call" in caplog.text, "the coordinator to say so")

    run(scenario)


def test_a_coordinator_whose_certificate_expired_is_named_and_works_once_renewed(authority: TestAuthority) -> None:
    async def scenario() -> None:
        expired = authority.coordinator(ends=PAST)
        async with serving(expired) as (address, _):
            assert "its certificate was rejected: certificate has expired; renew it there" in await refused(
                address, authority.node()
            )
            error = await operator_error(address, authority.operator(), get_status)
            assert (type(error), error.reason) == (ConfigError, "peer_expired")
            authority.make(["spiffe://backstay/backstay/coordinator"], into=expired.files)
            async with linked(address, authority.node()) as (_, desired, _):
                await until(lambda: desired, "the renewed certificate to be shown")

    run(scenario)


def test_another_authority_is_named_on_whichever_side_it_is(authority: TestAuthority, tmp_path: Path) -> None:
    other = TestAuthority(tmp_path / "other", name="other CA")

    async def scenario() -> None:
        async with serving(authority.coordinator()) as (address, backend):
            assert "no authority in our tls_ca signed it" in await refused(address, other.node())
            files = other.make([node_uri("n1")])
            files.ca.write_bytes(other.pem + authority.pem)
            text = await refused(address, node_credentials(files))
            assert "after our certificate (spiffe://backstay/backstay/node/n1); does its tls_ca contain" in text
            error = await operator_error(address, other.operator(), get_status)
            assert (type(error), error.exit_code, error.reason) == (ConfigError, 78, "peer_other_ca")
            assert backend.reports == []

    run(scenario)


def test_a_node_that_is_taken_for_the_coordinator_is_not_believed(authority: TestAuthority) -> None:
    """Whoever holds a node's certificate and listens at the coordinator's address: the identity counts, not the address."""

    async def scenario() -> None:
        async with serving(authority.node("evil")) as (address, backend):
            text = await refused(address, authority.node())
            assert "spiffe://backstay/backstay/node/evil may not coordinate: its role is node" in text
            error = await operator_error(address, authority.operator(), forget)
            assert (type(error), error.reason) == (ConfigError, "wrong_role")
            assert backend.reports == []

    run(scenario)


def test_plaintext_and_tls_are_told_of_each_other(authority: TestAuthority) -> None:
    async def scenario() -> None:
        async with serving(authority.coordinator()) as (address, backend):
            assert "it speaks TLS, but this side is set to plaintext" in await refused(address, None)
            error = await operator_error(address, None, get_status)
            assert (type(error), error.reason) == (ConfigError, "tls_required")
            assert backend.reports == []
        async with serving(None) as (address, backend):
            assert "does not speak TLS" in await refused(address, authority.node())
            error = await operator_error(address, authority.operator(), get_status)
            assert isinstance(error, ConfigError)
            assert backend.reports == []

    run(scenario)


def test_older_versions_of_tls_are_not_spoken(authority: TestAuthority) -> None:
    async def scenario() -> None:
        async with serving(authority.coordinator()) as (address, _):
            host, _, port = address.rpartition(":")
            context = ssl.create_default_context(cadata=authority.pem.decode())
            files = authority.node().files
            context.load_cert_chain(files.cert, files.key)
            context.check_hostname = False
            context.set_alpn_protocols(["h2"])

            def shake(newest: ssl.TLSVersion) -> str | None:
                context.maximum_version = newest
                with (
                    socket.create_connection((host, int(port)), timeout=5) as sock,
                    context.wrap_socket(sock) as wrapped,
                ):
                    return wrapped.version()

            assert await asyncio.to_thread(shake, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asyncio.to_thread(shake, ssl.TLSVersion.TLSv1_2)

    run(scenario)


def test_a_renewed_certificate_replaces_the_connection_and_nothing_is_lost_or_suspected(
    authority: TestAuthority, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def scenario() -> None:
        node, coordinator = authority.node(), authority.coordinator()
        async with serving(coordinator) as (address, backend), linked(address, node) as (_, desired, states):
            await until(lambda: desired, "the first answer")
            authority.make(["spiffe://backstay/backstay/coordinator"], into=coordinator.files)
            authority.make([node_uri("n1")], into=node.files)
            await until(lambda: "was made anew" in caplog.text, "the connection to be replaced")
            seen = len(desired)
            await until(lambda: len(desired) > seen, "answers over the new connection")
            assert coordinator.current().number == 2
            assert states == [True], "never without a coordinator"
            assert backend.suspects == [], "never missed"

    run(scenario)


def test_a_renewed_certificate_that_the_coordinator_does_not_take_ends_nothing_that_stands(
    authority: TestAuthority, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renewed under another authority, of which the coordinator is told only afterwards."""
    monkeypatch.setattr(link_module, "RENEW_AGAIN_S", 0.1)
    other = TestAuthority(tmp_path / "other", name="other CA")

    async def scenario() -> None:
        node, coordinator = authority.node(), authority.coordinator()
        async with serving(coordinator) as (address, _), linked(address, node) as (_, desired, states):
            await until(lambda: desired, "the first answer")
            other.make([node_uri("n1")], into=node.files)
            await until(lambda: says("new_certificate_unusable", caplog.text), "the new one to be refused")
            seen = len(desired)
            await until(lambda: len(desired) > seen + 2, "answers over the connection that stands")
            authority.make([node_uri("n1")], into=node.files)
            caplog.set_level(logging.INFO)
            await until(lambda: "was made anew" in caplog.text, "the connection to be replaced")
            assert states == [True], "never without a coordinator"

    run(scenario)


def test_an_operators_client_uses_a_renewed_certificate_for_its_next_call(
    authority: TestAuthority, tmp_path: Path
) -> None:
    async def scenario() -> None:
        new = TestAuthority(tmp_path / "new", name="new CA")
        coordinator, operator = authority.coordinator(), authority.operator()
        for held in (coordinator, operator):
            held.files.ca.write_bytes(authority.pem + new.pem)
        async with serving(coordinator, max_age_s=0.5) as (address, _):
            with OperatorClient(address, timeout_s=5.0, credentials=operator) as client:
                assert (await asyncio.to_thread(client.get_status))["format"] == 1
                new.make(["spiffe://backstay/backstay/operator"], into=operator.files)
                operator.files.ca.write_bytes(authority.pem + new.pem)
                coordinator.files.ca.write_bytes(new.pem)
                new.make(["spiffe://backstay/backstay/coordinator"], into=coordinator.files)
                assert (await asyncio.to_thread(client.get_status))["format"] == 1
            assert (await operator_error(address, authority.operator(), get_status)).exit_code == 78

    run(scenario)


def test_connections_end_with_their_age_so_that_what_was_withdrawn_works_no_longer(
    authority: TestAuthority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The authority is replaced, the node gets no new certificate: it is out once its connection is old."""
    caplog.set_level(logging.INFO)

    async def scenario() -> None:
        coordinator = authority.coordinator()
        async with serving(coordinator, max_age_s=1.0) as (address, backend):
            async with linked(address, authority.node(), renew_s=0.3) as (_, desired, states):
                await until(
                    lambda: caplog.text.count("was made anew") >= 3, "the link to replace its connection by itself"
                )
                assert states == [True]
                assert backend.suspects == []
                seen = len(desired)
                await until(lambda: len(desired) > seen, "answers")
            async with linked(address, authority.node("n2"), name="n2") as (link, desired, states):
                await until(lambda: desired, "the first answer")
                new = TestAuthority(tmp_path / "new", name="new CA")
                new.make(["spiffe://backstay/backstay/coordinator"], into=coordinator.files)
                await until(lambda: states == [True, False], "the coordinator to cut the old connection")
                await until(lambda: "tls_ca" in link.last_error, f"the reason to be said: {link.last_error}")
                assert ("n2", "i1") in backend.suspects

    run(scenario)


def test_a_name_that_ends_at_a_zero_byte_for_others_is_not_an_operators(authority: TestAuthority) -> None:
    async def scenario() -> None:
        async with serving(authority.coordinator()) as (address, _):
            disguised = authority.operator()
            authority.make([f"{OPERATOR}\x00.example"], into=disguised.files)
            material = read_pair(disguised.files)
            options = [("grpc.ssl_target_name_override", f"[{COORDINATOR}]")]
            with grpc.secure_channel(address, grpc.ssl_channel_credentials(*material), options=options) as channel:
                stub = operator_pb2_grpc.OperatorServiceStub(channel)
                with pytest.raises(grpc.RpcError) as caught:
                    await asyncio.to_thread(stub.Forget, operator_pb2.ForgetRequest(run="default/gpt"), timeout=5)
            assert caught.value.code() is not grpc.StatusCode.OK
            assert "cannot be read" in str(caught.value)

    run(scenario)


def read_pair(files: TlsFiles) -> tuple[bytes, bytes, bytes]:
    return files.ca.read_bytes(), files.key.read_bytes(), files.cert.read_bytes()


def test_every_call_of_an_operator_leaves_a_line_with_who_it_was_and_what_came_of_it(
    authority: TestAuthority, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="backstayd.audit")
    credentials = authority.operator()
    serial = read_pem(credentials.files.cert.read_bytes()).serial

    async def scenario() -> None:
        async with serving(authority.coordinator()) as (address, _):
            for _ in range(5):
                await asyncio.to_thread(operate, address, credentials, get_status)
            await asyncio.to_thread(operate, address, credentials, forget)
            await operator_error(address, credentials, lambda client: client.forget("default/\x1b[2Jnobody"))

    run(scenario)
    lines = [record.getMessage() for record in caplog.records if record.name == "backstayd.audit"]
    caller = f"by {OPERATOR} (serial {serial}) from 127.0.0.1"
    assert lines == [
        f"GetStatus {caller}: done",
        f"Forget default/gpt {caller}: done",
        f"Forget default/\\x1b[2Jnobody {caller}: refused (unknown_run)",
    ], "reads once a minute, every act, and nothing in them steers a terminal"
