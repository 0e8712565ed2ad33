"""Bulk bytes over TLS, plaintext, and bare sockets: ratios of one run. ``python -m tests.bench.tls_throughput``."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from backstay.format.manifest import CHUNK_BYTES
from backstayd.coder.bulk_server import BulkServer
from backstayd.security.credentials import Credentials
from backstayd.store.paths import RunPaths, ShardRef
from backstayd.transport.bulk.client import BulkClient
from tests.component.coder_nodes import KEY, RUN, listening_socket, publish_shard
from tests.kit.certificates import TestAuthority


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=256, help="bytes moved per measurement")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="backstay-bench-"))
    try:
        print(json.dumps(measure(root, arguments.mib << 20, arguments.rounds), indent=2))
    finally:
        shutil.rmtree(root)


def measure(root: Path, size: int, rounds: int) -> dict[str, float]:
    """Medians of MB/s, one after the other in each round, and their ratios."""
    authority = TestAuthority(root / "ca")
    server, client = authority.node("server"), authority.node("client")
    data = os.urandom(1 << 20) * (size >> 20)
    with served(root / "plain", data, None) as plain, served(root / "tls", data, server) as secure:
        ways: dict[str, Callable[[], float]] = {
            "plain": lambda: read(plain, None, size),
            "tls": lambda: read(secure, client, size),
            "bare_plain": lambda: bare(data, None, None),
            "bare_tls": lambda: bare(data, server, client),
        }
        found: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds + 1):
            for name, way in ways.items():
                seconds = way()
                if turn:  # the first is for warming up
                    found[name].append(size / seconds / 1e6)
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {f"{name}_mb_s": round(value) for name, value in medians.items()} | {
        "tls_to_plain": round(medians["tls"] / medians["plain"], 3),
        "tls_to_bare_tls": round(medians["tls"] / medians["bare_tls"], 3),
        "plain_to_bare_plain": round(medians["plain"] / medians["bare_plain"], 3),
    }


@contextmanager
def served(directory: Path, data: bytes, credentials: Credentials | None) -> Iterator[tuple[str, ShardRef]]:
    """A bulk server in a process of its own, as coders are."""
    directory.mkdir()
    manifest = publish_shard(RunPaths(directory, RUN), 0, data, world_size=1)
    listen = listening_socket()
    pid = os.fork()
    if pid == 0:
        BulkServer(
            listen, memory_dir=directory, incarnation="aa", on_event=lambda event: None, credentials=credentials
        ).serve()
        os._exit(0)
    try:
        address = f"127.0.0.1:{listen.getsockname()[1]}"
        yield address, ShardRef(run=RUN, key=KEY, rank=0, world_size=1, digest=manifest.digest)
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        listen.close()


def read(place: tuple[str, ShardRef], credentials: Credentials | None, size: int) -> float:
    """Seconds for reading the shard whole, in windows of 4 MiB into one buffer, with the next one asked for ahead."""
    address, ref = place
    window = 4 * (1 << 20) // CHUNK_BYTES
    count = -(-size // CHUNK_BYTES)
    view = memoryview(bytearray(window * CHUNK_BYTES))
    client = BulkClient(address, credentials=credentials)
    client.is_staged(ref)  # the handshake is not what is measured
    began = time.perf_counter()
    client.request(ref, first_chunk=0, chunk_count=window)
    for first in range(0, count, window):
        if first + window < count:
            client.request(ref, first_chunk=first + window, chunk_count=window)
        reply = client.begin_answer()
        client.receive_into(view[: reply.payload_bytes])
    seconds = time.perf_counter() - began
    client.close()
    return seconds


def bare(data: bytes, server: Credentials | None, client: Credentials | None) -> float:
    """Seconds for the same bytes from memory over a bare socket, sender in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listen:
        pid = os.fork()
        if pid == 0:
            sock, _ = listen.accept()
            if server is not None:
                sock = server.current().server_context.wrap_socket(sock, server_side=True)
            sock.recv(1)
            sock.sendall(data)
            sock.recv(1)
            os._exit(0)
        sock = socket.create_connection(listen.getsockname())
        if client is not None:
            sock = client.current().client_context.wrap_socket(sock)
        view = memoryview(bytearray(4 << 20))
        began = time.perf_counter()
        sock.sendall(b"x")
        left = len(data)
        while left:
            left -= sock.recv_into(view[: min(left, len(view))])
        seconds = time.perf_counter() - began
        sock.close()
        os.waitpid(pid, 0)
    return seconds


if __name__ == "__main__":
    assert threading.active_count() == 1, "processes are forked"
    main()
