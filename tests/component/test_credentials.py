"""A process's certificate: what is refused at the start, and how renewed files are taken up, or not."""

from __future__ import annotations

import datetime as dt
import grp
import os
import stat
from pathlib import Path

import pytest

pytest.importorskip("cryptography")
from cryptography.x509.oid import ExtendedKeyUsageOID

from backstay.errors import ConfigError
from backstayd import app, cli
from backstayd.config.schema import NodeConfig
from backstayd.security import credentials as credentials_module
from backstayd.security.authority import Authority
from backstayd.security.credentials import Credentials, TlsFiles, load_credentials
from backstayd.security.identity import Identity, Role
from tests.kit.certificates import COORDINATOR, DAY, OPERATOR, TestAuthority, node_credentials, node_uri
from tests.kit.wording import refuses


@pytest.fixture
def authority(tmp_path: Path) -> TestAuthority:
    return TestAuthority(tmp_path / "ca")


@pytest.fixture(autouse=True)
def look_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials_module, "CHECK_S", 0.0)


def refusal(files: TlsFiles, name: str = "n1") -> tuple[str, str]:
    with pytest.raises(ConfigError) as caught:
        node_credentials(files, name)
    return caught.value.reason, str(caught.value)


def test_a_certificate_of_another_role_name_or_domain_is_refused_with_what_was_found(authority: TestAuthority) -> None:
    assert node_credentials(authority.make([node_uri("n1")])).current().identity.name == "n1"
    reason, text = refusal(authority.make([OPERATOR]))
    assert (reason, "its role is operator" in text) == ("wrong_role", True)
    reason, text = refusal(authority.make([node_uri("n2")]))
    assert (reason, "it is node 'n2', not 'n1'" in text) == ("wrong_name", True)
    reason, text = refusal(authority.make(["spiffe://prod/backstay/node/n1"]))
    assert (reason, "trust domain 'prod', not 'backstay'" in text) == ("other_trust_domain", True)
    assert refusal(authority.make([]))[0] == "no_identity"
    assert refusal(authority.make([node_uri("n1"), OPERATOR]))[0] == "several_identities"


def test_files_that_do_not_belong_together_are_refused_with_their_names(
    authority: TestAuthority, tmp_path: Path
) -> None:
    files, other = authority.make([node_uri("n1")]), authority.make([node_uri("n1")])
    files.key.write_bytes(other.key.read_bytes())
    reason, text = refusal(files)
    assert (reason, f"{files.key} is not the key of {files.cert}" in text) == ("key_mismatch", True)
    other.ca.write_bytes(TestAuthority(tmp_path / "other").pem)
    reason, text = refusal(other)
    assert (reason, f"{other.ca} did not sign {other.cert}" in text) == ("not_vouched_for", True)


def test_files_that_are_missing_empty_or_cut_off_are_refused_with_their_names(authority: TestAuthority) -> None:
    files = authority.make([node_uri("n1")])
    whole = files.cert.read_bytes()
    files.cert.write_bytes(whole[:200])
    assert refusal(files)[0] == "bad_certificate"
    files.cert.write_bytes(b"")
    assert "has no -----BEGIN line" in refusal(files)[1]
    files.cert.unlink()
    reason, text = refusal(files)
    assert (reason, f"cannot read {files.cert}: No such file" in text) == ("unreadable_file", True)


def test_a_certificate_for_servers_alone_is_refused_as_peers_would(authority: TestAuthority) -> None:
    files = authority.make([node_uri("n1")], purposes=[ExtendedKeyUsageOID.SERVER_AUTH])
    reason, text = refusal(files)
    assert reason == "not_vouched_for"
    assert "purpose" in text
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    node_credentials(authority.make([node_uri("n1")], purposes=both))


def test_an_expired_certificate_starts_a_daemon_and_is_named(authority: TestAuthority) -> None:
    expired = node_credentials(authority.make([node_uri("n1")], ends=-dt.timedelta(hours=1)))
    assert "expired at 20" in expired.validity_problem()
    early = node_credentials(authority.make([node_uri("n1")], begins=DAY / 2))
    assert "is the clock right?" in early.validity_problem()
    expired_files = expired.files
    authority.make([node_uri("n1")], into=expired_files)
    expired.current()
    assert expired.validity_problem() == "", "renewed, without a restart"


def test_checking_the_configuration_finds_a_bad_certificate(
    authority: TestAuthority, tmpfs_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("BACKSTAYD_NODE_INSECURE")
    place = ["--memory-dir", str(tmpfs_dir), "--socket", str(tmpfs_dir / "socket")]

    def check(files: TlsFiles) -> tuple[int, str]:
        argv = ["node", "--name", "n1", "--tls-cert", str(files.cert), "--tls-key", str(files.key)]
        status = app.main([*argv, *place, "--tls-ca", str(files.ca), "--check-config"])
        return status, capsys.readouterr().err

    assert check(authority.make([node_uri("n1")]))[0] == 0
    status, text = check(authority.make([node_uri("n1")], ends=-dt.timedelta(hours=1)))
    assert (status, "expired at" in text) == (78, True)
    status, text = check(authority.make([COORDINATOR]))
    assert (status, "its role is coordinator" in text) == (78, True)


def test_a_private_key_that_everybody_may_read_is_warned_of(
    authority: TestAuthority, caplog: pytest.LogCaptureFixture
) -> None:
    files = authority.make([node_uri("n1")])
    files.key.chmod(0o640)
    node_credentials(files)
    assert caplog.messages == []
    files.key.chmod(0o644)
    node_credentials(files)
    assert caplog.messages == [
        f"every user of this machine can read the private key {files.key} (mode 644): chmod o= {files.key}"
    ]


def test_renewed_files_are_taken_up_whole_and_never_half(
    authority: TestAuthority, caplog: pytest.LogCaptureFixture
) -> None:
    held = authority.node()
    first = held.current()
    new = authority.make([node_uri("n1")])
    held.files.cert.write_bytes(new.cert.read_bytes())  # the key is still to come
    assert held.current() is first
    assert held.current() is first
    complaints = [record for record in caplog.records if "rejected the new certificate" in record.message]
    assert len(complaints) == 1, "logged once, not at every check"
    assert "is one of them still being written?" in complaints[0].message
    held.files.key.write_bytes(new.key.read_bytes())
    second = held.current()
    assert second.number == first.number + 1
    assert second.cert_pem == new.cert.read_bytes()
    assert held.current() is second


@pytest.mark.parametrize("uris", [[OPERATOR], [node_uri("n2")], []])
def test_renewed_files_of_somebody_else_are_not_taken_up(
    authority: TestAuthority, uris: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    held = authority.node()
    first = held.current()
    authority.make(uris, into=held.files)
    assert held.current() is first
    assert "keeping the previous one" in caplog.text


def test_a_certificate_whose_names_are_no_text_is_refused_and_not_taken_up(authority: TestAuthority) -> None:
    with refuses(ConfigError, "no_identity", "tls.crt") as caught:
        node_credentials(authority.make([node_uri("n1")], is_text=False))
    assert caught.value.reason == "no_identity"
    credentials = authority.node("n1")
    before = credentials.current()
    authority.make([node_uri("n1")], into=credentials.files, is_text=False)
    assert credentials.current() is before


def test_files_that_vanish_leave_the_certificate_in_use(authority: TestAuthority) -> None:
    held = authority.node()
    first = held.current()
    held.files.cert.unlink()
    assert held.current() is first


def test_links_swapped_as_kubernetes_does_are_seen(authority: TestAuthority, tmp_path: Path) -> None:
    old, new = authority.make([node_uri("n1")]), authority.make([node_uri("n1")])
    mount = tmp_path / "mount"
    mount.mkdir()
    (mount / "..data").symlink_to(old.cert.parent)
    for name in ("tls.crt", "tls.key", "ca.crt"):
        (mount / name).symlink_to(f"..data/{name}")
    held = node_credentials(TlsFiles(cert=mount / "tls.crt", key=mount / "tls.key", ca=mount / "ca.crt"))
    first = held.current()
    (mount / "..tmp").symlink_to(new.cert.parent)
    os.replace(mount / "..tmp", mount / "..data")
    assert held.current().number == first.number + 1
    assert held.current().cert_pem == new.cert.read_bytes()


def test_plaintext_has_no_certificate_and_none_is_taken_for_it(authority: TestAuthority) -> None:
    assert load_credentials(NodeConfig(name="n1", insecure=True)) is None
    with refuses(ConfigError, "no_security"):
        load_credentials(NodeConfig(name="n1"))
    files = authority.make([node_uri("n1")])
    loaded = load_credentials(NodeConfig(name="n1", tls_cert=files.cert, tls_key=files.key, tls_ca=files.ca))
    assert loaded is not None
    assert loaded.current().identity == Identity(trust_domain="backstay", role=Role.NODE, name="n1")


def test_the_command_makes_certificates_that_daemons_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "ca"
    argv = ["certs", "--ca-dir", str(directory), "--node", "n1", "n2", "--coordinator", "--operator"]
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    assert "created the authority" in shown
    assert node_uri("n2") in shown
    for role, name in ((Role.NODE, "n1"), (Role.NODE, "n2"), (Role.COORDINATOR, ""), (Role.OPERATOR, "")):
        place = directory / role.value / name
        files = TlsFiles(cert=place / "tls.crt", key=place / "tls.key", ca=place / "ca.crt")
        made = Credentials(files, trust_domain="backstay", role=role, name=name)
        assert made.validity_problem() == ""
    keys = list(directory.rglob("*.key"))
    assert len(keys) == 5
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
    ca = (directory / "ca.crt").read_bytes()
    assert cli.main(["certs", "--ca-dir", str(directory), "--node", "n1", "--days", "7"]) == 0
    assert "used the authority" in capsys.readouterr().out
    assert (directory / "ca.crt").read_bytes() == ca


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        ([], 64, "--node NAME, --coordinator or --operator"),
        (["--node", "a/b"], 64, "a/b"),
        (["--operator", "--trust-domain", "A"], 64, "--trust-domain 'A' is not 1 to 255 lower-case"),
        (["--operator", "--days", "0"], 64, "--days '0' is not a number above 0, up to 36500"),
        (["--operator", "--days", "4000000"], 64, "--days '4000000' is not a number above 0, up to 36500"),
    ],
)
def test_a_mistake_in_making_certificates_is_named(
    argv: list[str], status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["certs", "--ca-dir", str(tmp_path), *argv]) == status
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_an_authority_whose_key_is_another_ones_is_refused(tmp_path: Path) -> None:
    Authority(tmp_path / "a")
    Authority(tmp_path / "b")
    (tmp_path / "a" / "ca.key").write_bytes((tmp_path / "b" / "ca.key").read_bytes())
    with refuses(ConfigError, "bad_ca", "ca.key"):
        Authority(tmp_path / "a")


def test_a_key_that_trainers_can_read_through_its_group_is_warned_of_with_their_names(
    authority: TestAuthority, caplog: pytest.LogCaptureFixture
) -> None:
    shared = next((entry for entry in grp.getgrall() if entry.gr_mem and set(entry.gr_mem) - {"root"}), None)
    if shared is None or os.geteuid() != 0:
        pytest.skip("this machine has no group with members to give a key to")
    files = authority.make([node_uri("n1")])
    os.chown(files.key, -1, shared.gr_gid)
    files.key.chmod(0o640)
    node_credentials(files)
    assert f"as members of its group {shared.gr_name}" in caplog.text
    assert next(name for name in shared.gr_mem if name != "root") in caplog.text
    caplog.clear()
    files.key.chmod(0o600)
    node_credentials(files)
    assert caplog.text == ""
