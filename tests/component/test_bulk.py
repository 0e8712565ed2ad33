"""The bulk transport between a real server and a client: ranges, typed refusals, limits, names that lead nowhere."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from crc32c import crc32c

from backstay.errors import BackstayError, IntegrityError, SnapshotNotFoundError, UnavailableError, UsageError
from backstay.format import json_records
from backstay.format.manifest import CHUNK_BYTES, Manifest
from backstay.ids import SnapshotKey
from backstayd.coder import bulk_server
from backstayd.coder.bulk_server import BulkServer
from backstayd.coder.jobs import CoderEvent
from backstayd.store.paths import FragmentRef, RunPaths, ShardRef
from backstayd.store.record_files import StoredFragment
from backstayd.store.staging import prepare_staging
from backstayd.transport.bulk.client import BulkClient
from backstayd.transport.bulk.wire import BulkReply, BulkRequest, Channel, Timeouts
from tests.component.coder_nodes import KEY, RUN, listening_socket, publish_shard

DATA = random.Random(1).randbytes(3 * CHUNK_BYTES + 100)
PLAN_ID = "0123456789abcdef" * 2
FAST = Timeouts(connect_s=2.0, constant_s=2.0)


class Served:
    """A served directory with one published shard, and a client."""

    def __init__(self, directory: Path) -> None:
        self.paths = RunPaths(directory, RUN)
        self.manifest: Manifest = publish_shard(self.paths, 0, DATA, world_size=1)
        self.events: list[CoderEvent] = []
        self._listen = listening_socket()
        self.address = f"127.0.0.1:{self._listen.getsockname()[1]}"
        self._server = BulkServer(
            self._listen, memory_dir=directory, incarnation="aa", on_event=self.events.append, timeouts=FAST
        )
        self._thread = threading.Thread(target=self._server.serve)
        self._thread.start()
        self.client = BulkClient(self.address, timeouts=FAST)

    @property
    def ref(self) -> ShardRef:
        return ShardRef(run=RUN, key=KEY, rank=0, world_size=1, digest=self.manifest.digest)

    def close(self) -> None:
        self.client.close()
        self._server.close()
        self._thread.join(5)
        self._listen.close()


@pytest.fixture
def served(tmpfs_dir: Path) -> Iterator[Served]:
    served = Served(tmpfs_dir)
    try:
        yield served
    finally:
        served.close()


def read(served: Served, first: int, count: int, ref: ShardRef | None = None) -> bytes:
    data = bytearray(min(CHUNK_BYTES * count, len(DATA) - first * CHUNK_BYTES))
    served.client.read(ref or served.ref, first_chunk=first, view=memoryview(data), chunk_count=count)
    return bytes(data)


def fragment_ref(index: int = 1) -> FragmentRef:
    return FragmentRef(run=RUN, key=KEY, plan_id=PLAN_ID, stripe=3, index=index)


def store_plan_file(served: Served) -> None:
    served.paths.parity(KEY).mkdir(parents=True, exist_ok=True)
    served.paths.plan(KEY, PLAN_ID).write_bytes(b"{}")


def test_any_range_of_a_shard_is_read_over_one_connection(served: Served) -> None:
    for first, count in [(0, 4), (1, 2), (3, 1), (0, 1)]:
        assert read(served, first, count) == DATA[first * CHUNK_BYTES : (first + count) * CHUNK_BYTES]


def test_requests_may_run_ahead_of_answers(served: Served) -> None:
    served.client.request(served.ref, first_chunk=0, chunk_count=1)
    served.client.request(served.ref, first_chunk=3, chunk_count=1)
    for size, begin in [(CHUNK_BYTES, 0), (100, 3 * CHUNK_BYTES)]:
        assert served.client.begin_answer().payload_bytes == size
        data = bytearray(size)
        served.client.receive_into(memoryview(data))
        assert data == DATA[begin : begin + size]


def test_a_manifest_comes_as_the_bytes_its_digest_names(served: Served) -> None:
    assert json_records.loads(Manifest, served.client.get_manifest(served.ref)) == served.manifest


def test_another_digest_in_its_place_is_refused_as_wrong_identity_and_the_connection_lives(served: Served) -> None:
    other = ShardRef(run=RUN, key=KEY, rank=0, world_size=1, digest="ab" * 32)
    with pytest.raises(IntegrityError) as caught:
        read(served, 0, 1, other)
    assert caught.value.reason == "wrong_identity"
    assert read(served, 0, 1) == DATA[:CHUNK_BYTES]


@pytest.mark.parametrize("what", ["unknown_step", "manifest_unlinked", "data_unlinked", "withdrawn", "link"])
def test_what_is_not_published_is_gone(served: Served, what: str) -> None:
    ref = served.ref
    shard = served.paths.shard(KEY, 0, 1)
    lock = -1
    if what == "unknown_step":
        ref = ShardRef(run=RUN, key=SnapshotKey(1, 13), rank=0, world_size=1, digest=ref.digest)
    elif what == "manifest_unlinked":
        served.paths.manifest(KEY, 0, 1).unlink()
    elif what == "data_unlinked":
        shard.unlink()
    elif what == "link":
        shard.rename(shard.with_name("elsewhere"))
        shard.symlink_to(shard.with_name("elsewhere"))
    else:
        lock = os.open(shard, os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with pytest.raises(SnapshotNotFoundError) as caught:
            read(served, 0, 1, ref)
        assert caught.value.reason == "gone"
    finally:
        if lock >= 0:
            os.close(lock)


def test_a_file_is_locked_while_it_is_sent_and_free_afterwards(served: Served) -> None:
    size = 64 * CHUNK_BYTES  # more than the socket buffers hold
    manifest = publish_shard(served.paths, 0, bytes(size), world_size=1)
    ref = ShardRef(run=RUN, key=KEY, rank=0, world_size=1, digest=manifest.digest)
    served.client.request(ref, first_chunk=0, chunk_count=64)
    assert served.client.begin_answer().payload_bytes == size
    own = os.open(served.paths.shard(KEY, 0, 1), os.O_RDWR)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
        served.client.receive_into(memoryview(bytearray(size)))
        served.client.get_manifest(ref)  # answered only after the file was closed
        fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(own)


def test_a_fragment_is_put_once_the_plan_is_stored_and_read_back_with_its_crcs(served: Served) -> None:
    ref = fragment_ref()
    with pytest.raises(UnavailableError) as caught:
        served.client.begin_put_fragment(ref, size_bytes=CHUNK_BYTES + 10)
    assert caught.value.reason == "not_ready"
    store_plan_file(served)
    chunks = [memoryview(DATA)[:CHUNK_BYTES], memoryview(DATA)[CHUNK_BYTES : CHUNK_BYTES + 10]]
    served.client.begin_put_fragment(ref, size_bytes=CHUNK_BYTES + 10)
    for chunk in chunks:
        served.client.put_chunk(crc32c(chunk), [chunk[:7], chunk[7:]])
    served.client.end_put()
    stored = json_records.loads(
        StoredFragment, served.paths.fragment_record(KEY, PLAN_ID, stripe=3, index=1).read_bytes()
    )
    assert [stored.chunk_crc(0), stored.chunk_crc(1)] == [crc32c(chunk) for chunk in chunks]
    data = bytearray(CHUNK_BYTES + 10)
    served.client.read(ref, first_chunk=0, view=memoryview(data), chunk_count=2)
    assert data == DATA[: CHUNK_BYTES + 10]
    assert [event.kind for event in served.events] == ["fragment_stored"]


def test_an_empty_fragment_is_put_and_read_like_any_other(served: Served) -> None:
    store_plan_file(served)
    served.client.begin_put_fragment(fragment_ref(), size_bytes=0)
    served.client.end_put()
    assert served.paths.fragment(KEY, PLAN_ID, stripe=3, index=1).stat().st_size == 0
    served.client.request(fragment_ref(), first_chunk=0, chunk_count=0)
    assert served.client.begin_answer().total_bytes == 0


def test_a_damaged_put_publishes_nothing_and_the_sender_hears_why(served: Served) -> None:
    store_plan_file(served)
    size = 40 * CHUNK_BYTES
    chunk = memoryview(bytes(CHUNK_BYTES))
    served.client.begin_put_fragment(fragment_ref(), size_bytes=size)

    def put_all() -> None:
        for index in range(40):
            served.client.put_chunk(crc32c(chunk) ^ (index == 1), [chunk])
        served.client.end_put()

    with pytest.raises(UnavailableError) as caught:
        put_all()
    assert caught.value.reason == "flipped_in_flight"
    assert [path.name for path in served.paths.parity(KEY).iterdir()] == [f"plan-{PLAN_ID}.json"]


def test_a_sender_that_vanishes_leaves_no_file(served: Served) -> None:
    store_plan_file(served)
    served.client.begin_put_fragment(fragment_ref(), size_bytes=2 * CHUNK_BYTES)
    served.client.close()
    served.client.get_manifest(served.ref)
    deadline = threading.Event()
    for _ in range(500):
        if len(list(served.paths.parity(KEY).iterdir())) == 1:
            return
        deadline.wait(0.01)
    raise AssertionError("the temporary file of a broken put is still there after 5 s")


def test_a_plan_dropped_in_mid_put_takes_no_fragment(served: Served) -> None:
    store_plan_file(served)
    chunk = memoryview(DATA)[:CHUNK_BYTES]
    served.client.begin_put_fragment(fragment_ref(), size_bytes=CHUNK_BYTES)
    served.paths.plan(KEY, PLAN_ID).unlink()
    served.client.put_chunk(crc32c(chunk), [chunk])
    with pytest.raises(UnavailableError) as caught:
        served.client.end_put()
    assert caught.value.reason == "not_ready"
    assert list(served.paths.parity(KEY).iterdir()) == []


def test_a_staged_range_is_taken_only_when_prepared_and_only_bytes_of_its_manifest(served: Served) -> None:
    assert not served.client.is_staged(served.ref)
    with pytest.raises(UnavailableError) as caught:
        served.client.begin_put_shard(served.ref, first_chunk=0, chunk_count=1, stripe=2)
    assert caught.value.reason == "not_ready"
    prepare_staging(served.paths, served.manifest, digest=served.manifest.digest, incarnation="aa")
    assert served.client.is_staged(served.ref)
    for good in (False, True):
        chunk = memoryview(DATA if good else DATA[::-1])[:CHUNK_BYTES]
        served.client.begin_put_shard(served.ref, first_chunk=0, chunk_count=1, stripe=2)
        served.client.put_chunk(crc32c(chunk), [chunk])
        if good:
            served.client.end_put()
        else:
            with pytest.raises(UnavailableError):
                served.client.end_put()
        marker = served.paths.staged_stripe(0, 1, digest=served.manifest.digest, stripe=2)
        assert marker.exists() == good
    assert served.paths.staged(0, 1, served.manifest.digest).read_bytes()[:CHUNK_BYTES] == DATA[:CHUNK_BYTES]
    assert [event.kind for event in served.events] == ["stripe_staged"]


BAD_REQUESTS = [
    BulkRequest(op="read_shard", run="../..", digest="ab" * 32),
    BulkRequest(op="read_shard", run="job/..", digest="ab" * 32),
    BulkRequest(op="read_fragment", run=RUN, plan_id="../../../etc/passwd"),
    BulkRequest(op="get_plan", run=RUN, plan_id="0" * 31 + "/"),
    BulkRequest(op="read_shard", run=RUN, digest="ab" * 32, first_chunk=-1),
    BulkRequest(op="put_fragment", run=RUN, plan_id=PLAN_ID, stripe=0, index=0, size_bytes=1 << 60),
    BulkRequest(op="put_fragment", run=RUN, plan_id=PLAN_ID, stripe=-1, index=0),
    BulkRequest(op="read_shard", run=RUN, digest="ab" * 32, chunk_count=1 << 50),
    BulkRequest(op="delete_everything", run=RUN),
]


@pytest.mark.parametrize("request_", BAD_REQUESTS, ids=range(len(BAD_REQUESTS)))
def test_a_malformed_request_is_refused_by_name(served: Served, request_: BulkRequest) -> None:
    with connected(served) as sock:
        channel = Channel(sock, name="test", timeouts=FAST)
        channel.send_record(request_)
        reply = channel.receive_record(BulkReply)
    assert reply.error_class == UsageError.__name__
    assert read(served, 0, 1) == DATA[:CHUNK_BYTES]


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", struct.pack(">I", 3) + b"{}}", b"GET / HTTP/1.0\r\n\r\n"])
def test_what_is_no_request_ends_the_connection_and_nothing_else(served: Served, garbage: bytes) -> None:
    with connected(served) as sock:
        sock.sendall(garbage)
        with contextlib.suppress(ConnectionError):  # closed with or without a reset, but never answered
            assert sock.recv(10) == b""
    assert read(served, 0, 1) == DATA[:CHUNK_BYTES]


def connected(served: Served) -> socket.socket:
    host, _, port = served.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=5)


def test_a_peer_that_is_not_there_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = f"127.0.0.1:{sock.getsockname()[1]}"
    with pytest.raises(UnavailableError) as caught:
        BulkClient(address, timeouts=FAST).get_plan(FragmentRef(run=RUN, key=KEY, plan_id=PLAN_ID))
    assert caught.value.reason == "unreachable"


def test_a_silent_peer_is_unavailable_after_its_limit() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = f"127.0.0.1:{sock.getsockname()[1]}"
        client = BulkClient(address, timeouts=Timeouts(constant_s=0.2))
        with pytest.raises(BackstayError) as caught:
            client.get_plan(FragmentRef(run=RUN, key=KEY, plan_id=PLAN_ID))
        assert caught.value.reason == "peer_silent"


def test_an_aborted_client_wakes_its_thread() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        client = BulkClient(f"127.0.0.1:{sock.getsockname()[1]}", timeouts=Timeouts(constant_s=30.0))
        failures: list[BackstayError] = []

        def ask() -> None:
            try:
                client.get_plan(FragmentRef(run=RUN, key=KEY, plan_id=PLAN_ID))
            except BackstayError as error:
                failures.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        peer, _ = sock.accept()
        peer.recv(10)
        client.abort()
        thread.join(5)
        peer.close()
        assert not thread.is_alive()
        assert isinstance(failures[0], UnavailableError)


def test_connections_that_ask_nothing_do_not_keep_peers_out(served: Served) -> None:
    host, _, port = served.address.rpartition(":")
    silent = [socket.create_connection((host, int(port)), timeout=10) for _ in range(2 * bulk_server.MAX_CONNECTIONS)]
    try:
        assert read(served, 0, 1) == DATA[:CHUNK_BYTES]
        assert threading.active_count() < 2 * bulk_server.MAX_CONNECTIONS
    finally:
        for connection in silent:
            connection.close()
