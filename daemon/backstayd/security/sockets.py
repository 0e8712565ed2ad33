"""TLS on connected sockets, with both sides' roles checked; and in words what went wrong. Must not know what is said there."""

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
    """The client's side of a handshake on ``sock``, which has a timeout; who answers must have one of ``roles``.

    The server looks at our certificate after we are done: that it refuses it, the first read says (:func:`explain`).

    Raises:
        UnavailableError: with what :func:`explain` says, or because of who it is. The socket is closed then.
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
    """The server's side of a handshake on ``sock``, which has a timeout; who it is, :func:`check_peer` says.

    Raises:
        UnavailableError: what :func:`explain` says; ``plaintext`` for a peer that speaks none. That the socket is left open
            for an answer, all others are closed once the peer had time to read the alert.
    """
    material = credentials.current()
    try:
        first = sock.recv(1, socket.MSG_PEEK)
        if first and first[0] != _HANDSHAKE_RECORD:
            raise UnavailableError(
                f"{peer} speaks plaintext, and here TLS is spoken; give it tls_cert, tls_key and tls_ca",
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
    """Say no more, and read and drop what still comes: closing over unread bytes would destroy our last words.

    Works on the TCP connection: what is dropped need not be deciphered.
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
    """Who is on the other side; raises UnavailableError when it is nobody of ``roles``, to whom ``doing`` is open."""
    try:
        identity = identify(certificate_of(sock).uris, trust_domain=credentials.trust_domain)
        authorise(identity, roles, doing=doing)
    except ConfigError as error:
        raise UnavailableError(f"{peer}: {error}", reason=error.reason) from None
    return identity


def refused(error: Exception, *, peer: str, material: Material) -> UnavailableError:
    """``error`` of a handshake, or of the first read after one, with what it means and the next step."""
    reason, text = explain(error, material=material)
    return UnavailableError(f"{peer}: {text}", reason=reason)


def explain(error: Exception, *, material: Material) -> tuple[str, str]:
    """A stable reason and a sentence for an error of TLS."""
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
            "it ended the connection during the TLS handshake; does it speak TLS, and what does its log say?",
        )
    return "peer_failed", f"the TLS handshake failed: {error}"


def _explain_verification(error: ssl.SSLCertVerificationError) -> tuple[str, str]:
    what = error.verify_message.rstrip(".")
    if error.verify_code == 10:
        return "peer_expired", f"its certificate is refused: {what}; renew it there"
    if error.verify_code == 9:
        return "peer_not_yet_valid", f"its certificate is refused: {what}; compare the clocks"
    if error.verify_code == 26:
        return "peer_wrong_purpose", f"its certificate is refused: {what}; it must be for serverAuth and clientAuth"
    return (
        "peer_other_ca",
        f"its certificate is refused: {what}; it is not signed by an authority in our tls_ca, use the same CA on both sides",
    )


# Parts of OpenSSL's names of errors: what the other side said, and what is no TLS at all.
_ALERTS: Final = (
    ("CERTIFICATE_EXPIRED", "we_expired", "it refuses our certificate ({ours}): expired; renew it here"),
    ("UNKNOWN_CA", "we_other_ca", "it refuses our certificate ({ours}): its tls_ca does not know who signed it"),
    (
        "DECRYPT_ERROR",
        "we_other_ca",
        "it refuses our certificate ({ours}): its tls_ca has another key for who signed it",
    ),
    ("CERTIFICATE_REQUIRED", "we_sent_none", "it asks for a certificate and got none; set tls_cert and tls_key here"),
    ("BAD_CERTIFICATE", "we_refused", "it refuses our certificate ({ours}); its log says why"),
    ("CERTIFICATE_UNKNOWN", "we_refused", "it refuses our certificate ({ours}); its log says why"),
    ("UNSUPPORTED_CERTIFICATE", "we_refused", "it refuses our certificate ({ours}): not for serverAuth and clientAuth"),
    ("WRONG_VERSION_NUMBER", "plaintext", "it does not speak TLS, and here plaintext is refused; give it certificates"),
    ("RECORD_LAYER_FAILURE", "plaintext", "it does not speak TLS, and here plaintext is refused; give it certificates"),
    ("HTTP_REQUEST", "plaintext", "it speaks plaintext, and here TLS is spoken"),
    ("UNSUPPORTED_PROTOCOL", "old_tls", "it speaks no TLS 1.3; older versions are not accepted"),
    ("PROTOCOL_VERSION", "old_tls", "it speaks no TLS 1.3; older versions are not accepted"),
    ("PEER_DID_NOT_RETURN_A_CERTIFICATE", "peer_sent_none", "it shows no certificate; set tls_cert and tls_key there"),
)
