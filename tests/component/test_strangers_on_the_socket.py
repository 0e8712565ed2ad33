"""What one trainer can do to its daemon and to the trainers beside it: nothing. Real sockets, real tmpfs."""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from crc32c import crc32c

from backstay.errors import CapacityError, IntegrityError, StaleGenerationError, UsageError
from backstay.format import json_records
from backstay.format.manifest import CHUNK_BYTES, MAX_LABEL
from backstay.ids import MAX_COUNT, Generation
from backstay.protocol import framing, messages
from backstay.protocol.connection import DaemonConnection
from backstayd.node.session import MAX_REPORTED_BYTES
from backstayd.node.trainers import users
from backstayd.node.trainers.users import visible_to
from backstayd.store.adopt import GENERATION_NAME
from backstayd.store.store import Store
from backstayd.transport import convert
from backstayd.v1 import coordinator_pb2
from tests.kit.node import NodeThread, running_node
from tests.kit.shards import MadeShard
from tests.kit.trainer import PlainTrainer, trainer_of, wait_until
from tests.kit.wording import refuses


@pytest.fixture
def node(tmpfs_dir: Path) -> Iterator[NodeThread]:
    with running_node(tmpfs_dir) as running:
        yield running
        running.check()


def report_bytes(node: NodeThread) -> int:
    return len(convert.to_message(node.report(), coordinator_pb2.NodeReport).SerializeToString())


def test_who_attaches_again_is_held_to_the_rank_and_world_size_that_were_decided(node: NodeThread) -> None:
    node.start_world()
    trainer = trainer_of(node)
    trainer.snapshot(1)
    for rank, world_size in ((5, 1 << 20), (0, 2), (1, 1 << 20)):
        stranger = PlainTrainer(node.socket, rank=rank, world_size=world_size)
        with refuses(StaleGenerationError, "stale_world", rank, world_size):
            stranger.attach(attempt=1)
        stranger.close()
    trainer.snapshot(2)
    assert {shard.world_size for run in node.report().runs for shard in run.shards} == {1}
    trainer.close()


def test_a_step_that_nobody_could_count_on_from_is_refused_wherever_a_trainer_names_one(node: NodeThread) -> None:
    node.start_world()
    trainer = trainer_of(node)
    for step in (MAX_COUNT, (1 << 63) - 3, -1):
        for message in (
            messages.Reserve(step=step, size_bytes=4096),
            messages.Abandon(step=step, reason="x"),
            messages.Seal(step=step),
            messages.Distrust(step=step, reason="x"),
            messages.Commit(step=step, slot_id="s", manifest={}),
        ):
            with refuses(UsageError, "bad_step", step):
                trainer.call(message)
    trainer.snapshot(1)
    (session,) = node.report().runs[0].sessions
    assert max(session.last_step, session.skipped_step, session.sealed_step) == 1
    trainer.close()


def test_a_generation_file_with_a_flipped_high_bit_is_not_obeyed(tmpfs_dir: Path) -> None:
    memory = tmpfs_dir / "memory"
    Store(memory, incarnation="1" * 16).close()
    (memory / GENERATION_NAME).write_bytes(json_records.dumps(Generation((1 << 63) - 1, "c")))
    store = Store(memory, incarnation="2" * 16)
    try:
        assert store.generation == Generation()
        assert not store.admit_generation(Generation((1 << 63) - 1, "rogue"))
        assert store.admit_generation(Generation(7, "c"))
    finally:
        store.close()


def test_what_a_trainer_states_is_bounded_before_it_travels(node: NodeThread) -> None:
    node.start_world()
    trainer = trainer_of(node)
    names = tuple(f"replicas: {index:06}" for index in range(2500))
    ranks = tuple(range(400))
    many = tuple(messages.GateEntry(name=name, ranks=ranks, digest="d" * 32) for name in names)
    for gate in (
        messages.Gate(decision_id="d" * (MAX_REPORTED_BYTES // 2), entries=()),
        messages.Gate(decision_id="d", entries=many),
    ):
        framing.send_frame(trainer.socket, gate, message_id=99)
        reply, _, _ = framing.receive_frame(trainer.socket)
        assert isinstance(reply, messages.Error)
        assert "too_large" in reply.reason, reply
        assert report_bytes(node) < 10_000
    trainer.snapshot(1)
    trainer.close()
    needy = PlainTrainer(node.socket, rank=0, world_size=1 << 20, world_id="w", needs=tuple(range(100_000)) * 2)
    with pytest.raises(ConnectionError):
        needy.attach()  # more than a first frame may have
    needy.close()


def test_a_manifest_with_a_long_name_is_refused_and_never_reported(node: NodeThread) -> None:
    node.start_world()
    trainer = trainer_of(node)
    for step, field in enumerate(("layout", "model_signature", "writer"), 1):
        shard, reserved = trainer.make(step), trainer.reserve(step)
        assert isinstance(reserved, messages.Reserved)
        trainer.fill(reserved.slot_id, shard.data)
        long = replace(shard.manifest, **{field: "x" * 1_000_000})  # type: ignore[arg-type]
        with refuses(IntegrityError, "bad_manifest", MAX_LABEL):
            trainer.commit(step, reserved.slot_id, MadeShard(data=shard.data, manifest=long))
        assert report_bytes(node) < 10_000
    trainer.snapshot(4)
    trainer.close()


def test_a_frame_longer_than_what_was_granted_needs_is_not_taken(node: NodeThread) -> None:
    node.start_world()
    trainer = trainer_of(node)
    trainer.snapshot(1)
    trainer.socket.sendall((100 * 1024 * 1024).to_bytes(4, "big"))
    with pytest.raises(ConnectionError):
        framing.receive_frame(trainer.socket)
    trainer.close()
    line = DaemonConnection(str(node.socket), timeout_s=5)
    with refuses(IntegrityError, "too_large"):
        line.call(
            messages.Commit(step=1, slot_id="s", manifest={"size_bytes": 4096, "x": "y" * (5 << 20)}), deadline_s=5
        )
    line.close()


HEADERS: list[Any] = [  # None: nested without end
    {"w": {"dtype": "U8", "shape": [1], "data_offsets": 7}},
    {"w": {"dtype": "U8", "shape": [1], "data_offsets": ["a", "b"]}},
    {"w": {"dtype": "U8", "shape": [1], "data_offsets": [0]}},
    {"w": {"dtype": "U8", "data_offsets": [0, 1]}},
    {"w": {"dtype": "U8", "shape": 1, "data_offsets": [0, 1]}},
    {"w": []},
    {"w": None},
    [],
    None,
]


def with_header(shard: MadeShard, text: bytes) -> MadeShard:
    """The shard with another header, and a manifest that has the right digests for it."""
    header = text.ljust(-(-(len(text) + 8) // 4096) * 4096 - 8)
    data = (struct.pack("<Q", len(header)) + header + shard.data[4096:])[: len(shard.data)]
    crcs = "".join(f"{crc32c(data[i : i + CHUNK_BYTES]):08x}" for i in range(0, len(data), CHUNK_BYTES))
    (entry,) = shard.manifest.tensors
    moved = replace(entry, begin=len(header) + 8, end=len(data))
    manifest = replace(shard.manifest, chunk_crcs=crcs, header_bytes=len(header) + 8, tensors=(moved,))
    return MadeShard(data=data, manifest=manifest)


def test_a_shard_header_of_any_shape_is_answered_with_what_is_wrong(node: NodeThread) -> None:
    node.start_world()
    trainer = trainer_of(node, payload_bytes=200_000)
    for step, document in enumerate(HEADERS, 1):
        text = b"[" * 60_000 if document is None else json.dumps(document).encode()
        shard, reserved = with_header(trainer.make(step), text), trainer.reserve(step)
        assert isinstance(reserved, messages.Reserved)
        trainer.fill(reserved.slot_id, shard.data)
        with refuses(IntegrityError, "bad_header"):
            trainer.commit(step, reserved.slot_id, shard)
    trainer.snapshot(99)  # on the same connection
    trainer.close()


def test_silent_connections_shut_no_trainer_of_the_same_user_out(node: NodeThread) -> None:
    node.node.server.attach_timeout_s = 600.0
    node.start_world()
    silent = [PlainTrainer(node.socket) for _ in range(3 * users.MAX_UNATTACHED)]
    trainer = trainer_of(node)
    trainer.snapshot(1)
    more = [PlainTrainer(node.socket) for _ in range(2 * users.MAX_UNATTACHED)]
    trainer.snapshot(2)  # one that is attached is never the one that goes
    wait_until(
        lambda: len(node.node.server.connections.tasks) <= users.MAX_UNATTACHED + 1,
        why="the oldest silent ones are closed",
    )
    for one in (*silent, *more, trainer):
        one.close()


SILENT = """
import os, socket, sys
os.setresuid(65534, 65534, 65534)
sockets = []
for _ in range(300):
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    one.connect(sys.argv[1])
    sockets.append(one)
print("connected", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_another_users_silent_connections_cost_this_user_no_place(node: NodeThread) -> None:
    node.node.server.attach_timeout_s = 600.0
    node.start_world()
    os.chmod(node.socket, 0o666)
    os.chmod(node.socket.parent, 0o755)
    own = [PlainTrainer(node.socket) for _ in range(10)]
    command = [sys.executable, "-c", SILENT, str(node.socket)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"connected\n"
        for one in own:
            assert one.call(messages.Status())[0].document["role"] == "node", "none of these had to go"
        trainer = trainer_of(node)
        trainer.snapshot(1)
        other.communicate()
    for one in (*own, trainer):
        one.close()


def test_one_user_has_so_many_trainers_and_names_and_unused_names_go(node: NodeThread) -> None:
    node.start_world()
    trainer = trainer_of(node)
    trainer.snapshot(1)
    others = []
    for index in range(users.MAX_RUNS - 1):
        others.append(PlainTrainer(node.socket, run=f"job/r{index}"))
        others[-1].attach()
    last = PlainTrainer(node.socket, run="job/one-too-many")
    with refuses(CapacityError, "too_many_trainers", users.MAX_TRAINERS):
        last.attach()
    others.pop().close()
    wait_until(lambda: len(list(node.node.sessions)) < users.MAX_TRAINERS, why="one has left")
    for one in others:
        one.close()
    wait_until(
        lambda: set(node.node.state.store.runs) == {"job/run"}, why="names under which nothing lies are given up"
    )
    wait_until(lambda: os.listdir(node.memory_dir / "job") == ["run"], why="nothing of them is left")
    last.attach()
    trainer.snapshot(2)
    last.close()
    trainer.close()


def test_names_are_limited_by_user_even_without_trainers(tmpfs_dir: Path) -> None:
    store = Store(tmpfs_dir / "memory", incarnation="1" * 16)
    try:
        for index in range(users.MAX_RUNS):
            store.open_run(f"job/r{index}", uid=1000)
        with refuses(CapacityError, "too_many_runs", 1000, users.MAX_RUNS):
            users.check_names(store, "job/new", 1000)
        users.check_names(store, "job/r3", 1000)
        users.check_names(store, "job/new", 1001)
    finally:
        store.close()


def test_what_is_added_to_a_slot_past_its_size_is_taken_back_and_the_process_named(
    node: NodeThread, caplog: pytest.LogCaptureFixture
) -> None:
    node.start_world()
    trainer = trainer_of(node)
    committed = trainer.reserve(1)
    assert isinstance(committed, messages.Reserved)
    shard = trainer.make(1)
    trainer.fill(committed.slot_id, shard.data)
    trainer.commit(1, committed.slot_id, shard)
    granted = trainer.reserve(2)
    assert isinstance(granted, messages.Reserved)
    size = len(shard.data)
    with caplog.at_level(logging.WARNING):
        for slot_id in (committed.slot_id, granted.slot_id):
            fd = trainer.fds[slot_id]
            os.posix_fallocate(fd, size, 30_000_000)
            wait_until(lambda fd=fd: os.fstat(fd).st_blocks * 512 < 1_000_000, why="it is cut back")
            assert os.fstat(fd).st_size == size
            _keep_size(fd, size, 30_000_000)
            wait_until(lambda fd=fd: os.fstat(fd).st_blocks * 512 < 1_000_000, why="it is cut back, size kept or not")
    assert f"process {os.getpid()} of user {os.getuid()}" in caplog.text
    shard = trainer.make(2)
    trainer.fill(granted.slot_id, shard.data)
    trainer.commit(2, granted.slot_id, shard)
    trainer.close()


def _keep_size(fd: int, offset: int, length: int) -> None:
    """Allocate past the end of the file without making it longer."""
    command = ["fallocate", "--keep-size", "-o", str(offset), "-l", str(length), f"/proc/self/fd/{fd}"]
    subprocess.run(command, check=True, pass_fds=(fd,))


def test_a_user_holds_no_more_than_the_operator_allows_each(tmpfs_dir: Path) -> None:
    with running_node(tmpfs_dir, user_quota_bytes=1_000_000) as node:
        node.start_world()
        trainer = trainer_of(node, payload_bytes=300_000)
        trainer.snapshot(1)
        trainer.snapshot(2)
        node.start_world(keep=3)
        with pytest.raises(CapacityError, match=r"user \d+ holds 60\d+ of 1000000 \(user_quota_bytes\)"):
            trainer.reserve(3)
        trainer.close()


def test_the_status_shows_a_user_nothing_of_other_users(node: NodeThread) -> None:
    node.start_world()
    trainer = trainer_of(node)
    shard = trainer.snapshot(1)

    def seen_by(uid: int) -> str:
        return json.dumps(visible_to(uid, node.node.reporter.document(), node.node.state.store))

    stranger = node.call(lambda: seen_by(4242))
    assert shard.manifest.digest not in stranger
    assert "job/run" not in stranger
    assert shard.manifest.digest in node.call(lambda: seen_by(os.getuid()))
    trainer.close()


def test_strange_frames_are_logged_once_a_minute(node: NodeThread, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for index in range(20):
            one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            one.connect(str(node.socket))
            body = json.dumps({"nonsense": index}).encode()
            one.sendall(struct.pack(">I", len(body)) + body)
            one.settimeout(10)
            assert one.recv(1) == b""
            one.close()
    assert sum("not a frame" in line for line in caplog.messages) <= 1
    assert "Traceback" not in caplog.text
