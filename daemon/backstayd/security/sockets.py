"""TLS on connected sockets, with both sides' roles checked; and in words what went wrong. Must not know what is said there."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Collection
from typing import Final

from backstay.errors import ConfigError, UnavailableError
from backstayd.security.credentials import Credentials, Material, uris_of
from backstayd.security.identity import Identity, Role, authorise, identify

_HANDSHAKE_RECORD: Final = 0x16  # first byte of any TLS client's first record


def connect_tls(
    sock: socket.socket, credentials: Credentials, *, peer: str, roles: Collection[Role]
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
    return wrapped, _check_peer(wrapped, credentials, peer=peer, roles=roles)


def accept_tls(
    sock: socket.socket, credentials: Credentials, *, peer: str, roles: Collection[Role]
) -> tuple[ssl.SSLSocket, Identity]:
    """The server's side of a handshake on ``sock``, which has a timeout. Raises as :func:`connect_tls`, and
    UnavailableError (``plaintext``) for a peer that speaks none, with the socket left open for an answer."""
    material = credentials.current()
    try:
        first = sock.recv(1, socket.MSG_PEEK)
        if first and first[0] != _HANDSHAKE_RECORD:
            raise UnavailableError(
                f"{peer} speaks plaintext, and here TLS is spoken; give it tls_cert, tls_key and tls_ca",
                reason="plaintext",
            )
        wrapped = material.server_context.wrap_socket(sock, server_side=True)
    except (ssl.SSLError, OSError) as error:
        sock.close()
        raise refused(error, peer=peer, material=material) from error
    return wrapped, _check_peer(wrapped, credentials, peer=peer, roles=roles)


def is_tls(sock: socket.socket) -> bool:
    """Whether what waits to be read begins as TLS does (for a server of plaintext, to say so)."""
    first = sock.recv(1, socket.MSG_PEEK)
    return bool(first) and first[0] == _HANDSHAKE_RECORD


def _check_peer(sock: ssl.SSLSocket, credentials: Credentials, *, peer: str, roles: Collection[Role]) -> Identity:
    try:
        identity = identify(uris_of(dict(sock.getpeercert() or {})), trust_domain=credentials.trust_domain)
        authorise(identity, roles, doing=f"speak here as {peer}")
    except ConfigError as error:
        sock.close()
        raise UnavailableError(f"{peer} is refused: {error}", reason=error.reason) from None
    return identity


def refused(error: Exception, *, peer: str, material: Material) -> UnavailableError:
    """``error`` of a handshake, or of the first read after one, with what it means and the next step."""
    reason, text = explain(error, material=material)
    return UnavailableError(f"{peer}: {text}", reason=reason)


def explain(error: Exception, *, material: Material) -> tuple[str, str]:
    """A stable reason and a sentence for an error of TLS."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _explain_verification(error, material)
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


def _explain_verification(error: ssl.SSLCertVerificationError, material: Material) -> tuple[str, str]:
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
