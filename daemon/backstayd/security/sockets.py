"""TLS on connected sockets, with both sides' roles checked, and explained errors. Must not know the protocol on top."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Collection
from typing import Final

from backstay.errors import ConfigError, UnavailableError
from backstayd.security.credentials import Credentials, Material, certificate_of
from backstayd.security.identity import Identity, Role, authorise, identify

DRAIN_S: Final = 2.0
SCRATCH_BYTES: Final = 1 << 16
_HANDSHAKE_RECORD: Final = 0x16  # first byte of any TLS client's first record


def connect_tls(
    sock: socket.socket, credentials: Credentials, *, peer: str, roles: Collection[Role], doing: str
) -> tuple[ssl.SSLSocket, Identity]:
    """The client's side of a handshake on ``sock``, which has a timeout; the server must have one of ``roles``.

    The server checks our certificate after we are done; a rejection shows at the first read (:func:`explain`).

    Raises:
        UnavailableError: as :func:`explain` describes, or because of the server's identity. The socket is then closed.
    """
    material = credentials.current()
    try:
        wrapped = material.client_context.wrap_socket(sock)
    except (ssl.SSLError, OSError) as error:
        sock.close()
        raise refused(error, peer=peer, material=material) from error
    try:
        return wrapped, check_peer(wrapped, credentials, peer=peer, roles=roles, doing=doing)
    except UnavailableError:
        wrapped.close()
        raise


def accept_tls(sock: socket.socket, credentials: Credentials, *, peer: str) -> ssl.SSLSocket:
    """The server's side of a handshake on ``sock``, which has a timeout; :func:`check_peer` then identifies the client.

    Raises:
        UnavailableError: as :func:`explain` describes; ``plaintext`` for a peer without TLS, whose socket is left open
            for an answer. All others are closed once the peer had time to read the alert.
    """
    material = credentials.current()
    try:
        first = sock.recv(1, socket.MSG_PEEK)
        if first and first[0] != _HANDSHAKE_RECORD:
            raise UnavailableError(
                f"{peer} speaks plaintext, but TLS is required here; give it tls_cert, tls_key and tls_ca",
                reason="plaintext",
            )
        wrapped = material.server_context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
    except OSError as error:
        sock.close()
        raise refused(error, peer=peer, material=material) from error
    try:
        wrapped.do_handshake()
    except (ssl.SSLError, OSError) as error:
        drop_incoming(wrapped, DRAIN_S)
        wrapped.close()
        raise refused(error, peer=peer, material=material) from error
    return wrapped


def drop_incoming(sock: socket.socket, seconds: float) -> None:
    """Stop sending, and read and discard what still arrives: closing with unread bytes would destroy our last message.

    Works on the TCP connection, because discarded bytes need no decryption.
    """
    deadline = time.monotonic() + seconds
    scratch = bytearray(SCRATCH_BYTES)
    with contextlib.suppress(OSError):
        sock.settimeout(seconds)
        socket.socket.shutdown(sock, socket.SHUT_WR)
        while time.monotonic() < deadline and socket.socket.recv_into(sock, scratch):
            pass


def check_peer(
    sock: ssl.SSLSocket, credentials: Credentials, *, peer: str, roles: Collection[Role], doing: str
) -> Identity:
    """The peer's identity; raises UnavailableError unless it has one of ``roles``, which may do ``doing``."""
    try:
        identity = identify(certificate_of(sock).uris, trust_domain=credentials.trust_domain)
        authorise(identity, roles, doing=doing)
    except ConfigError as error:
        raise UnavailableError(f"{peer}: {error}", reason=error.reason) from None
    return identity


def refused(error: Exception, *, peer: str, material: Material) -> UnavailableError:
    """``error`` of a handshake, or of the first read after it, with its meaning and the next step."""
    reason, text = explain(error, material=material)
    return UnavailableError(f"{peer}: {text}", reason=reason)


def explain(error: Exception, *, material: Material) -> tuple[str, str]:
    """A stable reason and a sentence for a TLS error."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _explain_verification(error)
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        name = error.reason or ""
        for part, reason, text in _ALERTS:
            if part in name:
                return reason, text.format(ours=material.identity)
        return "tls_failed", f"the TLS handshake failed: {name or error}"
    if isinstance(error, TimeoutError):
        return "peer_silent", "no answer to the TLS handshake in time; does it speak TLS?"
    if isinstance(error, ConnectionResetError | ssl.SSLEOFError | BrokenPipeError):
        return (
            "tls_failed",
            "it closed the connection during the TLS handshake; does it speak TLS, and what does its log say?",
        )
    return "peer_failed", f"the TLS handshake failed: {error}"


def _explain_verification(error: ssl.SSLCertVerificationError) -> tuple[str, str]:
    what = error.verify_message.rstrip(".")
    if error.verify_code == 10:
        return "peer_expired", f"its certificate was rejected: {what}; renew it there"
    if error.verify_code == 9:
        return "peer_not_yet_valid", f"its certificate was rejected: {what}; compare the clocks"
    if error.verify_code == 26:
        return "peer_wrong_purpose", f"its certificate was rejected: {what}; it must allow serverAuth and clientAuth"
    return (
        "peer_other_ca",
        f"its certificate was rejected: {what}; no authority in our tls_ca signed it, so use the same CA on both sides",
    )


# Parts of OpenSSL's error names: alerts of the peer, and data that is not TLS.
_ALERTS: Final = (
    ("CERTIFICATE_EXPIRED", "we_expired", "it rejects our certificate ({ours}): expired; renew it here"),
    (
        "UNKNOWN_CA",
        "we_other_ca",
        "it rejects our certificate ({ours}): its tls_ca does not contain the authority that signed it",
    ),
    (
        "DECRYPT_ERROR",
        "we_other_ca",
        "it rejects our certificate ({ours}): its tls_ca has another key for the authority that signed it",
    ),
    ("CERTIFICATE_REQUIRED", "we_sent_none", "it requires a certificate and got none; set tls_cert and tls_key here"),
    ("BAD_CERTIFICATE", "we_refused", "it rejects our certificate ({ours}); its log says why"),
    ("CERTIFICATE_UNKNOWN", "we_refused", "it rejects our certificate ({ours}); its log says why"),
    ("UNSUPPORTED_CERTIFICATE", "we_refused", "it rejects our certificate ({ours}): not for serverAuth and clientAuth"),
    ("WRONG_VERSION_NUMBER", "plaintext", "it does not speak TLS, but TLS is required here; give it certificates"),
    ("RECORD_LAYER_FAILURE", "plaintext", "it does not speak TLS, but TLS is required here; give it certificates"),
    ("HTTP_REQUEST", "plaintext", "it speaks plaintext, but TLS is required here"),
    ("UNSUPPORTED_PROTOCOL", "old_tls", "it does not speak TLS 1.3; older versions are not accepted"),
    ("PROTOCOL_VERSION", "old_tls", "it does not speak TLS 1.3; older versions are not accepted"),
    ("PEER_DID_NOT_RETURN_A_CERTIFICATE", "peer_sent_none", "it sent no certificate; set tls_cert and tls_key there"),
)
