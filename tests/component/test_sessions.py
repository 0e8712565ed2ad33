"""Trainers and their daemon over the real socket: attach, reserve, commit, fences, death."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backstay.errors import (
    CapacityError,
    ConfigError,
    IntegrityError,
    StaleGenerationError,
    UnavailableError,
    UnrecoverableError,
    UsageError,
)
from backstay.ids import SnapshotKey
from backstay.protocol import framing, messages
from backstayd.cli.doctor.daemon_checks import session_timeouts
from backstayd.core.messages.decisions import DecisionPhase, Outcome
from backstayd.core.messages.desired import RunDesired
from backstayd.core.messages.report import SessionRecord, SkipCause
from backstayd.node.trainers import users
from backstayd.transport import convert
from backstayd.v1 import coordinator_pb2
from tests.kit.node import NodeThread, fresh_decision, running_node
from tests.kit.shards import RUN, make_shard
from tests.kit.trainer import PlainTrainer, trainer_of, wait_until
from tests.kit.wording import refuses

ROOT = Path(__file__).resolve().parents[2]
KEY = SnapshotKey(1, 1)


@pytest.fixture
def directory(tmpfs_dir: Path) -> Path:
    return tmpfs_dir


@pytest.fixture
def node(directory: Path) -> Iterator[NodeThread]:
    with running_node(directory) as running:
        yield running
        running.check()


def sessions_of(node: NodeThread) -> list[tuple[int, str]]:
    return [(s.rank, s.phase.value) for run in node.report().runs for s in run.sessions]


def test_a_committed_shard_lies_where_everybody_looks_and_survives_the_daemon(directory: Path) -> None:
    with running_node(directory) as node:
        node.start_world()
        trainer = trainer_of(node)
        shard = trainer.snapshot(1)
        node.check()
        path = node.memory_dir / "job/run/attempt-0001/step-00000001/rank-00000-of-00001.safetensors"
        assert path.read_bytes() == shard.data
        assert path.stat().st_mode & 0o777 == 0o600
        assert node.memory_dir.stat().st_mode & 0o777 == 0o700
        (found,) = node.report().runs[0].shards
        assert (found.digest, found.world_id) == (shard.manifest.digest, "world")
    with running_node(directory) as node:
        (found,) = node.report().runs[0].shards
        assert found.digest == shard.manifest.digest
        trainer.close()
        again = PlainTrainer(node.socket)
        again.attach(attempt=1)  # no coordinator said anything yet: the recorded decision vouches
        again.snapshot(2)
        node.check()
        again.close()


def test_slots_keep_their_inode_and_are_handed_over_once(node: NodeThread) -> None:
    node.start_world()
    trainer = trainer_of(node)
    trainer.snapshot(1)
    trainer.snapshot(2)
    assert isinstance(trainer.reserve(3), messages.Skipped)  # two slots, both hold a shard
    node.start_world(release=(KEY,))
    shard = trainer.snapshot(4, wait_s=5)
    assert len(trainer.fds) == 2
    assert shard.manifest.step == 4
    node.check()
    trainer.close()


def test_a_rank_waits_for_a_release_and_not_when_none_can_come(node: NodeThread) -> None:
    node.start_world()
    trainer = trainer_of(node)
    trainer.snapshot(1)
    trainer.snapshot(2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(trainer.reserve, 3, wait_s=20)
        wait_until(lambda: sessions_of(node) == [(0, "training")], why="the trainer is there")
        node.start_world(release=(KEY,))
        assert isinstance(waiting.result(15), messages.Reserved)
    node.start_world(is_release_possible=False)
    skipped = trainer.reserve(4, wait_s=600)
    assert isinstance(skipped, messages.Skipped)
    (run,) = node.report().runs
    session = run.sessions[0]
    assert (session.skipped_step, session.skip_reason, session.skip_cause) == (4, skipped.reason, SkipCause.NO_SLOT)
    trainer.close()


def test_steps_must_increase_and_restore_comes_first(node: NodeThread) -> None:
    trainer = PlainTrainer(node.socket)
    with refuses(UnavailableError, "not_attached"):
        trainer.reserve(1)
    trainer.attach()
    with refuses(UsageError, "not_restored", "restore()"):
        trainer.reserve(1)
    node.start_world()
    trainer.restore()
    trainer.snapshot(5)
    for step in (5, 4):
        with refuses(UsageError, "step_not_increasing", 5, step):
            trainer.reserve(step)
    with refuses(UsageError, "restored_already"):
        trainer.restore()
    trainer.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"run": "job/other"},
        {"world_size": 2},
        {"rank": 1, "world_size": 2},
        {"attempt": 2},
        {"step": 9},
        {"world_id": "x"},
    ],
)
def test_a_manifest_of_another_identity_is_refused(node: NodeThread, wrong: dict[str, object]) -> None:
    node.start_world()
    trainer = trainer_of(node)
    shard = make_shard(**{"attempt": 1, "step": 1, **wrong})  # type: ignore[arg-type]
    reserved = trainer.reserve(1, size_bytes=len(shard.data))
    assert isinstance(reserved, messages.Reserved)
    trainer.fill(reserved.slot_id, shard.data)
    with refuses(IntegrityError, "wrong_identity"):
        trainer.commit(1, reserved.slot_id, shard)
    assert node.report().runs[0].shards == ()
    trainer.snapshot(2)
    trainer.close()


def test_a_slot_that_was_cut_or_has_holes_or_another_header_is_refused(node: NodeThread) -> None:
    node.start_world()
    trainer = trainer_of(node)
    shard = trainer.make(1)
    reserved = trainer.reserve(1)
    assert isinstance(reserved, messages.Reserved)
    trainer.fill(reserved.slot_id, shard.data)
    os.ftruncate(trainer.fds[reserved.slot_id], 8192)
    with refuses(IntegrityError, "truncated", 8192):
        trainer.commit(1, reserved.slot_id, shard)
    trainer.close()
    trainer = PlainTrainer(node.socket)
    trainer.attach(attempt=1)
    reserved = trainer.reserve(2)
    assert isinstance(reserved, messages.Reserved)
    os.ftruncate(trainer.fds[reserved.slot_id], 0)
    os.ftruncate(trainer.fds[reserved.slot_id], len(shard.data))
    with pytest.raises(IntegrityError, match="holes"):
        trainer.commit(2, reserved.slot_id, trainer.make(2))
    reserved = trainer.reserve(3)
    assert isinstance(reserved, messages.Reserved)
    data = bytearray(trainer.make(3).data)
    data[20] ^= 1
    trainer.fill(reserved.slot_id, bytes(data))
    with refuses(IntegrityError, "bad_chunk", 0):
        trainer.commit(3, reserved.slot_id, trainer.make(3))
    trainer.close()


def test_abandoned_and_unfinished_captures_are_reported_as_skipped(node: NodeThread) -> None:
    node.start_world()
    trainer = trainer_of(node)
    reserved = trainer.reserve(1)
    assert isinstance(reserved, messages.Reserved)
    trainer.call(messages.Abandon(step=1, slot_id=reserved.slot_id, reason="the fence saw a difference"))
    (session,) = node.report().runs[0].sessions
    assert (session.skip_reason, session.skip_cause) == ("the fence saw a difference", SkipCause.CAPTURE)
    again = trainer.reserve(2)
    assert isinstance(again, messages.Reserved)
    assert again.slot_id == reserved.slot_id
    trainer.close()


def test_a_trainer_of_another_protocol_or_user_is_refused_by_name(node: NodeThread) -> None:
    trainer = PlainTrainer(node.socket)
    with refuses(UsageError, "bad_protocol", 7):
        trainer.attach(protocol=7)
    node.call(lambda: node.node.state.store.open_run("job/theirs", uid=4242))
    theirs = PlainTrainer(node.socket, run="job/theirs")
    with refuses(UsageError, "not_owner", "job/theirs", 4242):
        theirs.attach()
    trainer.close()
    theirs.close()


def test_a_refusal_reaches_the_trainer_word_for_word(node: NodeThread) -> None:
    decision = fresh_decision("n1", world_id="world", attempt=1, world_size=1)
    decision = type(decision)(
        **{f: getattr(decision, f) for f in decision.__dataclass_fields__ if f not in ("outcome", "message")},
        outcome=Outcome.REFUSED,
        message="step 12 lacks rank 3: node-05 and node-06 are gone; step 8 could be had",
    )
    phase = DecisionPhase.REFUSE
    node.desire(RunDesired(run=RUN, world_id="world", decision=decision, decision_phase=phase))
    trainer = PlainTrainer(node.socket)
    trainer.attach()
    with refuses(UnrecoverableError, "unrecoverable", decision.message):
        trainer.restore()
    trainer.close()


def test_a_slot_reserved_ahead_says_nothing_of_how_far_training_came(node: NodeThread) -> None:
    node.start_world()
    trainer = trainer_of(node)
    trainer.snapshot(4)
    ahead = trainer.reserve(8, is_ahead=True)
    assert isinstance(ahead, messages.Reserved)

    def session() -> SessionRecord:
        return node.report().runs[0].sessions[0]

    assert session().last_step == 4, "step 8 is still to come"
    trainer.call(messages.Abandon(step=8, slot_id=ahead.slot_id, reason="the interval was lowered", is_unused=True))
    assert (session().last_step, session().skipped_step) == (4, 0)
    ahead = trainer.reserve(6, is_ahead=True)
    assert isinstance(ahead, messages.Reserved), (
        "a step before the one that was reserved, for which nothing was captured"
    )
    assert session().last_step == 4
    shard = trainer.make(6)
    trainer.fill(ahead.slot_id, shard.data)
    trainer.commit(6, ahead.slot_id, shard)
    assert session().last_step == 6
    node.check()
    trainer.close()


def test_capacity_is_refused_with_numbers(directory: Path) -> None:
    with running_node(directory, quota_bytes=1_000_000) as node:
        node.start_world(parity_fraction=0.5)
        trainer = trainer_of(node, payload_bytes=400_000 - 4096)
        with refuses(CapacityError, "no_room", 2, 400000, 1000000):
            trainer.reserve(1)
        assert node.report().runs[0].sessions[0].skipped_step == 1
        node.start_world(parity_fraction=0.25)
        trainer.snapshot(2)
        trainer.snapshot(3)
        node.check()
        trainer.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs")
def test_a_full_tmpfs_is_an_error_with_numbers_and_never_a_signal(directory: Path) -> None:
    small = directory / "n1-memory"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "backstay-test", str(small)], check=True)
    try:
        with running_node(directory) as node:
            node.start_world()
            trainer = trainer_of(node, payload_bytes=600_000)
            with refuses(CapacityError, "no_room", small):
                trainer.reserve(1)
            trainer.payload_bytes = 300_000
            trainer.snapshot(2)
            (small / "filler").write_bytes(bytes(300_000))
            trainer.snapshot(3)
            node.check()
            trainer.close()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_two_daemons_on_one_directory_or_socket_are_refused(directory: Path, node: NodeThread) -> None:
    with refuses(ConfigError, "directory_in_use"), running_node(directory):
        pass
    other = directory / "elsewhere"
    other.mkdir()
    (other / "n1.sock").symlink_to(node.socket)
    with pytest.raises(ConfigError, match="not a socket"), running_node(other):
        pass
    (other / "n1.sock").unlink()
    with refuses(ConfigError, "socket_in_use"), running_node(other, socket=node.socket):
        pass
    assert trainer_is_served(node)


def trainer_is_served(node: NodeThread) -> bool:
    trainer = PlainTrainer(node.socket)
    reply, _ = trainer.call(messages.Status())
    trainer.close()
    return isinstance(reply, messages.StatusBody) and reply.document["role"] == "node"


def test_a_stale_socket_file_is_replaced(directory: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(directory / "n1.sock"))
    with running_node(directory) as node:
        assert trainer_is_served(node)


CHILD = """
import os, sys, time
sys.path[:0] = [{root!r}, {root!r} + "/client", {root!r} + "/daemon"]
from pathlib import Path
from tests.kit.trainer import PlainTrainer
trainer = PlainTrainer(Path({socket!r}), world_id={world!r})
trainer.attach()
trainer.restore()
trainer.snapshot(1)
reserved = trainer.reserve(2)
{extra}
print("ready", reserved.slot_id, flush=True)
sys.stdin.readline()
trainer.fill(reserved.slot_id, b"late" * 1000)
try:
    trainer.commit(2, reserved.slot_id, trainer.make(2))
    print("committed", flush=True)
except Exception as error:
    print(type(error).__name__, flush=True)
"""


def start_child(node: NodeThread, *, world: str, extra: str = "") -> tuple[subprocess.Popen[str], str]:
    code = CHILD.format(root=str(ROOT), socket=str(node.socket), world=world, extra=extra)
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    word, slot_id = child.stdout.readline().split()
    assert word == "ready"
    return child, slot_id


def end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.close()
    child.stdout.close()


def test_a_trainer_frozen_replaced_and_thawed_cannot_touch_the_new_ones_slots(node: NodeThread) -> None:
    node.start_world(world_id="old")
    child, old_slot = start_child(node, world="old")
    try:
        child.send_signal(signal.SIGSTOP)
        node.start_world(world_id="new", attempt=2)
        trainer = trainer_of(node, world_id="new")
        mine = [trainer.reserve(step) for step in (3, 4)]
        assert all(isinstance(grant, messages.Reserved) and grant.slot_id != old_slot for grant in mine)
        before = {slot: os.pread(fd, 1000, 0) for slot, fd in trainer.fds.items()}
        child.send_signal(signal.SIGCONT)
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write("go\n")
        child.stdin.flush()
        assert child.stdout.readline().strip() == StaleGenerationError.__name__
        assert {slot: os.pread(fd, 1000, 0) for slot, fd in trainer.fds.items()} == before
        assert [s.key for s in node.report().runs[0].shards] == [SnapshotKey(1, 1)]
        trainer.close()
    finally:
        end(child)


def test_death_is_seen_though_a_forked_worker_keeps_the_socket_open(node: NodeThread) -> None:
    node.start_world()
    fork = (
        "worker = os.fork()\nif worker == 0:\n    time.sleep(60)\n    os._exit(0)\nprint('worker', worker, flush=True)"
    )
    code = CHILD.format(root=str(ROOT), socket=str(node.socket), world="world", extra=fork)
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    worker = int(child.stdout.readline().split()[1])
    assert child.stdout.readline().startswith("ready")
    try:
        assert sessions_of(node) == [(0, "training")]
        child.kill()
        wait_until(lambda: sessions_of(node) == [], why="the session of the dead trainer ends")
        os.kill(worker, 0)  # it is still there, with the socket
        node.start_world(world_id="next", attempt=2, release=(KEY,))
        trainer = trainer_of(node, world_id="next")
        trainer.snapshot(2)
        trainer.close()
    finally:
        os.kill(worker, signal.SIGKILL)
        end(child)


def test_a_dead_trainers_slot_goes_to_the_next_one(node: NodeThread) -> None:
    node.start_world(world_id="old")
    child, slot = start_child(node, world="old")
    end(child)
    wait_until(lambda: sessions_of(node) == [], why="the session of the dead trainer ends")
    node.start_world(world_id="new", attempt=2)
    trainer = trainer_of(node, world_id="new")
    reserved = trainer.reserve(2)
    assert isinstance(reserved, messages.Reserved)
    assert reserved.slot_id == slot
    trainer.close()


def test_a_lost_connection_of_a_living_trainer_is_forgiven_for_a_lease(node: NodeThread) -> None:
    node.start_world()
    trainer = trainer_of(node)
    trainer.snapshot(1)
    trainer.close()
    assert sessions_of(node) == [(0, "training")]
    again = PlainTrainer(node.socket)
    again.attach(attempt=1)
    again.snapshot(2)
    again.close()
    wait_until(lambda: sessions_of(node) == [], why="a lease has run")
    stale = PlainTrainer(node.socket, world_id="never decided")
    with refuses(StaleGenerationError, "stale_world", "never decided"):
        stale.attach(attempt=1)
    stale.close()


def test_garbage_on_the_socket_ends_only_its_own_connection(node: NodeThread) -> None:
    trainer = PlainTrainer(node.socket)
    trainer.socket.sendall(b"\xff\xff\xff\xffgarbage")
    with pytest.raises(ConnectionError):
        framing.receive_frame(trainer.socket)
    trainer.close()
    assert trainer_is_served(node)


@pytest.mark.parametrize(
    "message",
    [
        messages.Reserve(step=1 << 63, size_bytes=4096),
        messages.Reserve(step=1, size_bytes=1 << 70),
        messages.Reserve(step=1, size_bytes=4096, wait_s=float("nan")),
        messages.Abandon(step=1 << 200),
        messages.Abandon(step=1, reason="half a pair: \ud800"),
    ],
)
def test_what_no_report_could_carry_is_refused_and_the_node_goes_on_reporting(
    node: NodeThread, message: object
) -> None:
    node.start_world()
    trainer = trainer_of(node)
    framing.send_frame(trainer.socket, message, message_id=9)
    with pytest.raises(ConnectionError):
        framing.receive_frame(trainer.socket)
    convert.to_message(node.report(), coordinator_pb2.NodeReport)
    trainer.close()


def test_long_words_of_a_trainer_do_not_make_long_reports(node: NodeThread) -> None:
    node.start_world()
    trainer = trainer_of(node)
    trainer.call(messages.Abandon(step=5, reason="x" * 1_000_000))
    assert len(convert.to_message(node.report(), coordinator_pb2.NodeReport).SerializeToString()) < 10_000
    stranger = PlainTrainer(node.socket, world_id="w" * 1000)
    with refuses(UsageError, "bad_attach", 100):
        stranger.attach()
    stranger.close()
    trainer.close()


def test_connections_that_never_attach_are_few_small_and_short(node: NodeThread) -> None:
    node.node.server.attach_timeout_s = 1.0
    node.start_world()
    trainer = trainer_of(node)
    greedy = PlainTrainer(node.socket)
    greedy.socket.sendall((250 * 1024 * 1024).to_bytes(4, "big"))
    with pytest.raises(ConnectionError):
        framing.receive_frame(greedy.socket)  # at once: nothing was set aside for it
    idle = [PlainTrainer(node.socket) for _ in range(200)]
    for one in idle:
        with contextlib.suppress(BrokenPipeError):
            one.socket.sendall(b"\0")
    served = sum(
        1 for task in node.node.server.connections.tasks if not task.cancelling()
    )  # a list would keep their sockets
    assert served <= users.MAX_UNATTACHED + 1
    trainer.snapshot(1)
    for one in idle:
        with pytest.raises(ConnectionError):
            framing.receive_frame(one.socket)
        one.close()
    assert trainer_is_served(node)
    greedy.close()
    trainer.close()


def test_the_status_shows_the_collective_timeout_that_a_trainer_declared(node: NodeThread) -> None:
    trainer = PlainTrainer(node.socket)
    trainer.call(messages.Attach(run=RUN, world_id="world", rank=0, world_size=1, collective_timeout_s=12.5))
    assert session_timeouts(node.call(node.node.reporter.document)) == [12.5]
    trainer.close()


def test_what_is_deleted_under_a_running_daemon_is_not_reported_any_longer(node: NodeThread) -> None:
    decision = node.start_world()
    trainer = trainer_of(node)
    trainer.snapshot(1)
    trainer.snapshot(2)
    assert [s.step for run in node.report().runs for s in run.shards] == [1, 2]
    shutil.rmtree(node.memory_dir)
    wait_until(lambda: not any(run.shards for run in node.report().runs), why="it is struck out")
    wait_until(lambda: node.report().runs[0].decision == decision, why="the decision is recorded again")
    trainer.snapshot(3)
    trainer.close()


def test_an_older_coordinator_is_not_obeyed(node: NodeThread) -> None:
    node.start_world()
    node.desire(generation=5)
    node.desire(RunDesired(run=RUN, world_id="older"), generation=4)
    assert not node.node.state.desired
    assert node.report().generation.number == 5
