"""Explains why a TLS connection fails, where gRPC reports only a closed socket. Sends no data of its own."""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import Final

from backstay.errors import UnavailableError
from backstayd.security.credentials import Credentials
from backstayd.security.identity import Role
from backstayd.security.sockets import connect_tls, refused

TIMEOUT_S: Final = 2.0


def diagnose(host: str, port: int, credentials: Credentials | None) -> UnavailableError | None:
    """What is wrong with TLS towards the coordinator at ``host``; None if TLS is not the problem.

    Blocks for at most twice TIMEOUT_S.
    """
    problem = credentials.validity_problem() if credentials is not None else ""
    try:
        with socket.create_connection((host, port), timeout=TIMEOUT_S) as sock:
            if credentials is None:
                return _diagnose_plaintext(sock, peer=f"{host}:{port}")
            found = _diagnose_tls(sock, credentials, peer=f"{host}:{port}")
    except OSError:
        return None  # nobody listens: the caller reports that
    if found is not None and problem:
        return UnavailableError(f"{problem}; renew it ({found})", reason="we_expired")
    return found


def _diagnose_tls(sock: socket.socket, credentials: Credentials, *, peer: str) -> UnavailableError | None:
    material = credentials.current()
    try:
        wrapped, _ = connect_tls(sock, credentials, peer=peer, roles={Role.COORDINATOR}, doing="coordinate")
    except UnavailableError as error:
        return error
    with wrapped:
        try:
            first = wrapped.recv(1)  # of the first frame of HTTP/2, or an alert about our certificate
        except TimeoutError:
            return None
        except (ssl.SSLError, OSError) as error:
            return refused(error, peer=peer, material=material)
    if first:
        return None
    return UnavailableError(  # gRPC sends no reason, not even a TLS alert, when it rejects a certificate
        f"{peer}: it closes the connection after our certificate ({material.identity}); does its tls_ca contain the authority "
        "that signed ours, and is its clock right?",
        reason="we_refused",
    )


def _diagnose_plaintext(sock: socket.socket, *, peer: str) -> UnavailableError | None:
    """Whether the peer speaks TLS; verifies nothing, because nothing is trusted and nothing is sent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with contextlib.suppress(ssl.SSLError, OSError), context.wrap_socket(sock):
        return UnavailableError(
            f"{peer}: it speaks TLS, but this side is set to plaintext (insecure); set tls_cert, tls_key and tls_ca here",
            reason="tls_required",
        )
    return None
