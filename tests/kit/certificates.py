"""Certificates as no operator should make them: other authorities, several identities, expired, without a purpose."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from backstayd.security.credentials import Credentials, TlsFiles
from backstayd.security.identity import Role

COORDINATOR = "spiffe://backstay/backstay/coordinator"
OPERATOR = "spiffe://backstay/backstay/operator"
DAY = dt.timedelta(days=1)


def node_uri(name: str) -> str:
    return f"spiffe://backstay/backstay/node/{name}"


class TestAuthority:
    """An authority in memory; ``make`` writes the three files of one certificate and loads nothing."""

    __test__ = False

    def __init__(self, directory: Path, name: str = "test CA") -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self._count = 0
        now = dt.datetime.now(dt.UTC)
        self.cert = (
            x509.CertificateBuilder()
            .subject_name(self._name)
            .issuer_name(self._name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + 100 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    @property
    def pem(self) -> bytes:
        return self.cert.public_bytes(serialization.Encoding.PEM)

    def make(
        self,
        uris: Sequence[str],
        *,
        begins: dt.timedelta = -DAY,
        ends: dt.timedelta = DAY,
        purposes: Sequence[x509.ObjectIdentifier] = (),
        into: TlsFiles | None = None,
        is_text: bool = True,
    ) -> TlsFiles:
        """A certificate with these URIs, in new files or ``into`` files that are there (cert first, as the careless do).

        ``is_text``: False makes of the one URI something that is not UTF-8.
        """
        now = dt.datetime.now(dt.UTC)
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + begins)
            .not_valid_after(now + ends)
        )
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
        names += [] if uris else [x509.DNSName("node-1.example.com")]
        names_extension = x509.SubjectAlternativeName(names) if is_text else _no_text(uris[0])
        builder = builder.add_extension(names_extension, critical=True)
        if purposes:
            builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        cert = builder.sign(self._key, hashes.SHA256())
        files = into or self._new_files()
        files.cert.write_bytes(cert.public_bytes(serialization.Encoding.PEM))
        files.key.touch(mode=0o600)
        files.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        files.ca.write_bytes(self.pem)
        return files

    def _new_files(self) -> TlsFiles:
        self._count += 1
        directory = self._directory / f"{self.cert.serial_number:x}-{self._count}"
        directory.mkdir(parents=True)
        return TlsFiles(cert=directory / "tls.crt", key=directory / "tls.key", ca=directory / "ca.crt")

    def node(self, name: str = "n1", *, ends: dt.timedelta = DAY) -> Credentials:
        """Credentials of a node."""
        return node_credentials(self.make([node_uri(name)], ends=ends), name)

    def coordinator(self, *, ends: dt.timedelta = DAY) -> Credentials:
        return Credentials(self.make([COORDINATOR], ends=ends), trust_domain="backstay", role=Role.COORDINATOR)

    def operator(self, *, ends: dt.timedelta = DAY) -> Credentials:
        return Credentials(self.make([OPERATOR], ends=ends), trust_domain="backstay", role=Role.OPERATOR)


def _no_text(uri: str) -> x509.UnrecognizedExtension:
    """Alternative names with one URI that ends in a byte which is not UTF-8."""
    value = uri.encode() + b"\xff"
    der = bytes([0x30, len(value) + 2, 0x86, len(value)]) + value
    return x509.UnrecognizedExtension(x509.SubjectAlternativeName.oid, der)


def node_credentials(files: TlsFiles, name: str = "n1") -> Credentials:
    return Credentials(files, trust_domain="backstay", role=Role.NODE, name=name)
