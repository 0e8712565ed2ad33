"""Many TLS connections at once, of those who may and of those who may not: what a port scanner, a bug or a crowd does.

``python -m tests.kit.handshakes HOST:PORT CERT_DIR [COUNT]`` does it to a coordinator that runs.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

THREADS: Final = 32
TIMEOUT_S: Final = 20.0
KINDS: Final = ("valid", "closed-at-once", "valid", "plaintext", "no certificate", "valid", "cut-short")


def client_context(directory: Path | None, ca: Path) -> ssl.SSLContext:
    """TLS 1.3 as gRPC speaks it, with the certificate in ``directory`` or with none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(ca)
    context.set_alpn_protocols(["h2"])
    if directory is not None:
        context.load_cert_chain(directory / "tls.crt", directory / "tls.key")
    return context


def connect(address: tuple[str, int], kind: str, directory: Path) -> str:
    """One connection of a kind; what came of it."""
    ca = directory / "ca.crt"
    with socket.create_connection(address, timeout=TIMEOUT_S) as sock:
        if kind == "closed-at-once":
            return "closed"
        if kind in ("plaintext", "cut-short"):
            hello = (
                b"GET / HTTP/1.1\r\n\r\n" if kind == "plaintext" else b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
            )
            with contextlib.suppress(OSError):
                sock.sendall(hello)
            return "sent"
        context = client_context(directory if kind == "valid" else None, ca)
        try:
            with context.wrap_socket(sock) as wrapped:
                return "shaken" if wrapped.selected_alpn_protocol() == "h2" else "no h2"
        except OSError as error:
            return type(error).__name__


def storm(address: tuple[str, int], directory: Path, count: int) -> Counter[str]:
    """``count`` connections of all kinds, THREADS at a time; how many of each kind ended how."""
    kinds = [KINDS[index % len(KINDS)] for index in range(count)]

    def one(kind: str) -> str:
        try:
            return f"{kind}: {connect(address, kind, directory)}"
        except OSError as error:
            return f"{kind}: {type(error).__name__}"

    with ThreadPoolExecutor(THREADS) as threads:
        return Counter(threads.map(one, kinds))


if __name__ == "__main__":
    host, _, port = sys.argv[1].rpartition(":")
    for outcome, times in sorted(
        storm((host, int(port)), Path(sys.argv[2]), int((sys.argv[3:] or ["10000"])[0])).items()
    ):
        print(f"{times:7} {outcome}")
