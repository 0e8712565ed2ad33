"""A process's own certificate: loaded, checked, and reloaded when the files change.

Files that do not fit together (half written, key of another certificate, other role) are rejected with a warning, and the
previous certificate stays in use. Holds no sockets; open connections keep the certificate they were opened with.
"""

from __future__ import annotations

import contextlib
import grp
import logging
import os
import pwd
import ssl
import stat
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from backstay.errors import ConfigError
from backstayd.config.schema import DaemonConfig, NodeConfig, check_security
from backstayd.security.certificate import Certificate, read_der
from backstayd.security.identity import Identity, Role, authorise, identify

logger = logging.getLogger(__name__)

CHECK_S: Final = 1.0  # shortest time between two checks of the files
MAX_FILE_BYTES: Final = 1 << 20
SOON_S: Final = 7 * 86400.0  # an expiry is logged this long before, at most every AGAIN_S
AGAIN_S: Final = 3600.0
_NO_CHECK_TIME: Final = 0x200000  # X509_V_FLAG_NO_CHECK_TIME: we check validity ourselves, for a readable message

_Signature = tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """Where the PEM files are."""

    cert: Path
    key: Path
    ca: Path

    def signature(self) -> _Signature:
        """Changes when any of the files is written or replaced, or its link points elsewhere."""
        found = []
        for path in (self.cert, self.key, self.ca):
            try:
                status = os.stat(path)
            except OSError:
                found.append((0, 0, 0, 0))
            else:
                found.append((status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size))
        return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """The files as loaded at one moment, checked to belong together. ``number`` counts the loads."""

    cert_pem: bytes
    key_pem: bytes = field(repr=False)
    ca_pem: bytes
    identity: Identity
    not_before_unix_s: float
    not_after_unix_s: float
    number: int
    ca_not_after_unix_s: float  # of the authority that expires first
    client_context: ssl.SSLContext
    server_context: ssl.SSLContext
    watcher_context: ssl.SSLContext  # for a server that asks for no client certificate


class Credentials:
    """The certificate of this process. Safe for threads.

    Args:
        role: The role that the certificate must state, and ``name`` the node's name in it.
        unix_s: The clock that validity is checked against.

    Raises:
        ConfigError: a file cannot be read, they do not belong together, or the certificate is of another role or name.
    """

    def __init__(
        self,
        files: TlsFiles,
        *,
        trust_domain: str,
        role: Role,
        name: str = "",
        unix_s: Callable[[], float] = time.time,
    ) -> None:
        self.files = files
        self.trust_domain = trust_domain
        self.role = role
        self.name = name
        self._unix_s = unix_s
        self._lock = threading.Lock()
        self._signature = files.signature()
        self._refused: _Signature = ()
        self._looked_s = time.monotonic()
        self._material = self._read(number=1)

    def current(self) -> Material:
        """The newest valid material; checks the files at most once per CHECK_S."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked_s >= CHECK_S:
                self._looked_s = now
                self._look()
            return self._material

    def ends_unix_s(self) -> dict[str, float]:
        """When the current certificates expire: ``own``, and ``ca``, the last authority (a rotation leaves old ones)."""
        material = self.current()
        authorities = [
            str(found["notAfter"]) for found in material.client_context.get_ca_certs() if "notAfter" in found
        ]
        ends = {"own": material.not_after_unix_s}
        if authorities:
            ends["ca"] = max(float(ssl.cert_time_to_seconds(end)) for end in authorities)
        return ends

    def validity_problem(self) -> str:
        """Why the certificate is not valid now; "" if it is."""
        material, now = self._material, self._unix_s()
        if now > material.not_after_unix_s:
            return f"certificate {self.files.cert} of {material.identity} expired at {utc(material.not_after_unix_s)}"
        if now < material.not_before_unix_s:
            begins = utc(material.not_before_unix_s)
            return f"certificate {self.files.cert} of {material.identity} is not valid before {begins}; is the clock right?"
        return ""

    def _look(self) -> None:
        signature = self.files.signature()
        if signature in (self._signature, self._refused):
            return
        try:
            material = self._read(number=self._material.number + 1)
            if self._unix_s() > material.not_after_unix_s:
                raise ConfigError(f"it expired at {utc(material.not_after_unix_s)}", reason="expired")
        except ConfigError as error:
            self._refused = signature
            logger.warning("rejected the new certificate at %s, keeping the previous one: %s", self.files.cert, error)
            return
        self._signature, self._refused, self._material = signature, (), material
        logger.info(
            "certificate %s of %s was reloaded; valid until %s",
            self.files.cert, material.identity, utc(material.not_after_unix_s),
        )  # fmt: skip

    def _read(self, *, number: int) -> Material:
        cert, key, ca = (_read_file(path) for path in (self.files.cert, self.files.key, self.files.ca))
        client, server = _contexts(self.files, cert, key, ca)
        watcher = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        watcher.minimum_version = ssl.TLSVersion.TLSv1_3
        _load_pair(watcher, self.files, cert, key)
        own = _own_certificate(self.files, client, server)
        try:
            identity = identify(certificate_of(own).uris, trust_domain=self.trust_domain)
            authorise(identity, {self.role}, doing=f"be the certificate of the {self.role.value}", name=self.name)
        except ConfigError as error:
            raise ConfigError(f"{self.files.cert}: {error}", reason=error.reason) from None
        warn_if_open(self.files.key)
        found = dict(own.getpeercert() or {})
        for context in (client, server):  # peers' certificates are checked for validity
            context.verify_flags &= ~_NO_CHECK_TIME
        return Material(
            cert_pem=cert,
            key_pem=key,
            ca_pem=ca,
            identity=identity,
            not_before_unix_s=float(ssl.cert_time_to_seconds(str(found["notBefore"]))),
            not_after_unix_s=_ends_unix_s(found),
            number=number,
            ca_not_after_unix_s=min((_ends_unix_s(one) for one in client.get_ca_certs()), default=_ends_unix_s(found)),
            client_context=client,
            server_context=server,
            watcher_context=watcher,
        )


def load_credentials(config: DaemonConfig) -> Credentials | None:
    """The daemon's certificate, checked; None if the settings say ``insecure``.

    Raises:
        ConfigError: neither is set, or this daemon cannot use the certificate.
    """
    check_security(config)
    if config.tls_cert is None or config.tls_key is None or config.tls_ca is None:
        return None
    files = TlsFiles(cert=config.tls_cert, key=config.tls_key, ca=config.tls_ca)
    return Credentials(
        files,
        trust_domain=config.trust_domain,
        role=Role.NODE if isinstance(config, NodeConfig) else Role.COORDINATOR,
        name=config.name if isinstance(config, NodeConfig) else "",
    )


class ExpiryWatch:
    """Warns of certificates that expire. Call :meth:`look` regularly; without credentials it does nothing.

    Args:
        export: Called with the name of a certificate and the Unix time at which it expires.
    """

    def __init__(self, credentials: Credentials | None, export: Callable[[str, float], None]) -> None:
        self._credentials = credentials
        self._export = export
        self._logged_s = float("-inf")
        self._logged = ""

    def look(self) -> None:
        """Reload changed files, export the expiry times, warn at most hourly."""
        if self._credentials is None:
            return
        material = self._credentials.current()
        self._export("own", material.not_after_unix_s)
        self._export("authority", material.ca_not_after_unix_s)
        text, now = self._complaint(), time.monotonic()
        if text and (text != self._logged or now - self._logged_s >= AGAIN_S):
            logger.log(logging.ERROR if self._credentials.validity_problem() else logging.WARNING, "%s", text)
            self._logged_s = now
        self._logged = text

    def _complaint(self) -> str:
        assert self._credentials is not None
        problem = self._credentials.validity_problem()
        if problem:
            return f"{problem}; peers reject it. Renew it: the files are checked every second, no restart is needed"
        material = self._credentials.current()
        ends = {"certificate": material.not_after_unix_s, "authority (tls_ca)": material.ca_not_after_unix_s}
        soon = [f"{what} ends at {utc(end)}" for what, end in ends.items() if end - time.time() < SOON_S]
        return f"of {material.identity} the {' and the '.join(soon)}" if soon else ""


def warn_if_open(key: Path) -> None:
    """Log which other users of this machine can read the private key: each of them could impersonate this daemon."""
    with contextlib.suppress(OSError):
        found = key.stat()
        mode = stat.S_IMODE(found.st_mode)
        if mode & stat.S_IROTH:
            logger.warning(
                "every user of this machine can read the private key %s (mode %o): chmod o= %s", key, mode, key
            )
        elif mode & stat.S_IRGRP and (members := _other_members(found.st_gid)):
            logger.warning(
                "%s can read the private key %s, as members of its group %s: give trainers another group (socket_group)",
                ", ".join(members[:8]), key, grp.getgrgid(found.st_gid).gr_name,
            )  # fmt: skip


def _other_members(group_id: int) -> list[str]:
    """Members of a group other than root and this process's user; empty for a group without a name."""
    with contextlib.suppress(KeyError):
        own = {"root"} | {entry.pw_name for entry in pwd.getpwall() if entry.pw_uid == os.geteuid()}
        primary = {entry.pw_name for entry in pwd.getpwall() if entry.pw_gid == group_id}
        return sorted({*grp.getgrgid(group_id).gr_mem, *primary} - own)
    return []


def utc(unix_s: float) -> str:
    """A time as text, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(unix_s))


def _ends_unix_s(certificate: Mapping[str, Any]) -> float:
    return float(ssl.cert_time_to_seconds(str(certificate["notAfter"])))


def certificate_of(end: ssl.SSLSocket | ssl.SSLObject) -> Certificate:
    """The peer's certificate; raises ConfigError (``no_identity``) if its names are unreadable."""
    return read_der(end.getpeercert(binary_form=True) or b"")


def _read_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", reason="unreadable_file") from None
    if b"-----BEGIN " not in data:
        raise ConfigError(f"{path} is not PEM: it has no -----BEGIN line", reason="bad_certificate")
    return data


def _contexts(files: TlsFiles, cert: bytes, key: bytes, ca: bytes) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Contexts for both sides, TLS 1.3 with certificates of both; from the bytes that were read, not from the files."""
    contexts = []
    for protocol in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER):
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # the identity says who the peer is; addresses change
        context.verify_mode = ssl.CERT_REQUIRED
        context.set_alpn_protocols(["h2"])  # gRPC servers require it of a client; others ignore it
        context.verify_flags |= _NO_CHECK_TIME
        if protocol == ssl.PROTOCOL_TLS_SERVER:
            context.num_tickets = 0  # a session ticket would let a client in after its certificate expired
        try:
            context.load_verify_locations(cadata=ca.decode())
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(
                f"{files.ca} contains no usable certificates: {error}", reason="bad_certificate"
            ) from None
        _load_pair(context, files, cert, key)
        contexts.append(context)
    return contexts[0], contexts[1]


def _load_pair(context: ssl.SSLContext, files: TlsFiles, cert: bytes, key: bytes) -> None:
    """OpenSSL loads a pair only by path: it gets a memory file, so that it sees the bytes that were checked."""
    fd = os.memfd_create("backstay-certificate", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(cert + b"\n" + key)
        context.load_cert_chain(f"/proc/self/fd/{fd}", password=_no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(
                f"{files.key} is not the key of {files.cert}; is one of them still being written?",
                reason="key_mismatch",
            ) from None
        raise ConfigError(
            f"{files.cert} with {files.key} cannot be used: {error.reason or error}", reason="bad_certificate"
        ) from None
    finally:
        os.close(fd)


def _no_password() -> str:
    raise ConfigError("the private key is encrypted; backstay has no password for it", reason="bad_certificate")


def _own_certificate(files: TlsFiles, client: ssl.SSLContext, server: ssl.SSLContext) -> ssl.SSLObject:
    """A TLS end that has seen our certificate as peers will: a handshake with ourselves, in memory, in both directions."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_side=False),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    try:
        for _ in range(8):
            done = True
            for end in ends:
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    done = False
            if done:
                break
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(
            f"{files.ca} did not sign {files.cert}: {error.verify_message}; peers would reject it",
            reason="not_vouched_for",
        ) from None
    except ssl.SSLError as error:
        raise ConfigError(
            f"{files.cert} cannot be used for TLS: {error.reason or error}", reason="bad_certificate"
        ) from None
    return ends[0]
