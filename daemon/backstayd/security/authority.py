"""A small certificate authority in a directory, for clusters that have none. Needs the package ``cryptography``.

Its key never leaves the directory; if it is lost or stolen, all certificates must be reissued. Must not be used by daemons.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from backstay.errors import ConfigError
from backstayd.security.identity import Identity

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

CA_DAYS: Final = 3650
CLOCK_SKEW: Final = dt.timedelta(minutes=5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """The three files of one identity, with the names that Kubernetes and cert-manager use."""

    identity: Identity
    directory: Path
    not_after: dt.datetime

    @property
    def cert(self) -> Path:
        return self.directory / "tls.crt"

    @property
    def key(self) -> Path:
        return self.directory / "tls.key"

    @property
    def ca(self) -> Path:
        return self.directory / "ca.crt"


class Authority:
    """The authority in ``directory`` (``ca.crt`` and ``ca.key``), created if there is none."""

    def __init__(self, directory: Path) -> None:
        _require_cryptography()
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        self.directory = directory
        cert_path, key_path = directory / "ca.crt", directory / "ca.key"
        self.is_new = not cert_path.exists() and not key_path.exists()
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.is_new:
                key, cert = _make_ca()
                _write(key_path, _key_pem(key), mode=0o600)
                _write(cert_path, _cert_pem(cert), mode=0o644)
            self._cert_pem = cert_path.read_bytes()
            loaded = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
            self._cert = x509.load_pem_x509_certificate(self._cert_pem)
        except OSError as error:
            raise ConfigError(f"cannot use {directory}: {error.strerror}: {error.filename}", reason="bad_ca") from None
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{directory} contains no usable authority: {error}", reason="bad_ca") from None
        if not isinstance(loaded, ec.EllipticCurvePrivateKey) or loaded.public_key() != self._cert.public_key():
            raise ConfigError(f"{key_path} is not the key of {cert_path}", reason="bad_ca")
        self._key = loaded

    def issue(
        self, identity: Identity, directory: Path, *, lifetime: dt.timedelta, hosts: Sequence[str] = ()
    ) -> Issued:
        """A new certificate and key for ``identity`` in ``directory``, replacing existing ones.

        ``hosts``: names and addresses that it is also valid for, for browsers and Prometheus.
        """
        key, cert = self._make_leaf(identity, lifetime, hosts)
        issued = Issued(identity=identity, directory=directory, not_after=cert.not_valid_after_utc)
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write(issued.ca, self._cert_pem, mode=0o644)
            _write(issued.key, _key_pem(key), mode=0o600)
            _write(issued.cert, _cert_pem(cert), mode=0o644)
        except OSError as error:
            raise ConfigError(f"cannot write to {directory}: {error.strerror}", reason="unwritable") from None
        return issued

    def _make_leaf(
        self, identity: Identity, lifetime: dt.timedelta, hosts: Sequence[str]
    ) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID

        now = dt.datetime.now(dt.UTC)
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri), *map(_host_name, hosts)]
        both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = (
            _builder(f"backstay {identity.role.value} {identity.name}".strip()[:64], key)
            .issuer_name(self._cert.subject)
            .not_valid_before(min(now - CLOCK_SKEW, now + lifetime - CLOCK_SKEW))
            .not_valid_after(min(now + lifetime, self._cert.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(is_ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(both), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        return key, builder.sign(self._key, hashes.SHA256())


def _make_ca() -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    now = dt.datetime.now(dt.UTC)
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder("backstay CA", key)
    cert = (
        builder.issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "backstay CA")]))
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + dt.timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(is_ca=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return key, cert


def _builder(common_name: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    from cryptography import x509

    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _key_usage(*, is_ca: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        encipher_only=False,
        decipher_only=False,
    )


def _host_name(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _cert_pem(cert: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return cert.public_bytes(serialization.Encoding.PEM)


def _write(path: Path, data: bytes, *, mode: int) -> None:
    """Atomically; a key is never readable by others, not even briefly."""
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(fd, "wb") as file:
            os.fchmod(fd, mode)
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _require_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise ConfigError(
            "creating certificates needs the package cryptography: pip install 'backstay[certs]'",
            reason="missing_package",
        ) from None
