"""The line to the daemon, against a small real server: deadlines, errors, descriptors, forks, and the documented contract."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from backstay.errors import (
    CapacityError,
    ConfigError,
    IntegrityError,
    StaleGenerationError,
    UnavailableError,
    UsageError,
)
from backstay.protocol import framing, messages
from backstay.protocol.connection import DaemonConnection, register_child_cleanup
from tests.kit.wording import refuses

ATTACH = messages.Attach(run="default/gpt", world_id="w", rank=0, world_size=1)
ATTACHED = messages.Attached(session_id="s", incarnation="1", lease_s=3.0, protocol=messages.PROTOCOL_VERSION)
PATIENCE_S = 20.0

Script = Callable[[socket.socket], None]


class Server:
    """Accepts connections, each served by the next script in a thread of its own."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.failures: list[BaseException] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._listener.listen(8)
        self._threads: list[threading.Thread] = []

    def serve(self, script: Script) -> None:
        thread = threading.Thread(target=self._run, args=(script,), name="test-server")
        thread.start()
        self._threads.append(thread)

    def close(self) -> None:
        self._listener.close()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        assert self.failures == []

    def _run(self, script: Script) -> None:
        try:
            connection, _ = self._listener.accept()
            with connection:
                connection.settimeout(PATIENCE_S)
                script(connection)
        except (Exception, AssertionError) as error:  # noqa: BLE001 - shown by the test
            self.failures.append(error)


@pytest.fixture
def server(tmpfs_dir: Path) -> Iterator[Server]:
    server = Server(tmpfs_dir / "sock")
    yield server
    server.close()


@contextlib.contextmanager
def connected(server: Server, script: Script) -> Iterator[DaemonConnection]:
    server.serve(script)
    connection = DaemonConnection(server.path, timeout_s=PATIENCE_S)
    try:
        yield connection
    finally:
        connection.close()


def answer(*replies: Any, fds: tuple[int, ...] = ()) -> Script:
    """One reply to each request; ``fds`` go with the last; then waits for the end of the session."""

    def script(connection: socket.socket) -> None:
        for index, reply in enumerate(replies):
            _, message_id, _ = framing.receive_frame(connection)
            is_last = index == len(replies) - 1
            framing.send_frame(connection, reply, message_id=message_id, fds=fds if is_last else ())
        assert connection.recv(1) == b""

    return script


def stay_silent(connection: socket.socket) -> None:
    while connection.recv(65536):
        pass


@pytest.fixture
def marker(tmpfs_dir: Path) -> Iterator[int]:
    """A descriptor to send; :func:`copies_of` counts how often this process holds it."""
    fd = os.open(tmpfs_dir / "marker", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def copies_of(marker: int) -> int:
    inode, count = os.fstat(marker).st_ino, 0
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += os.fstat(int(entry)).st_ino == inode
    return count


def test_attach_call_and_close_is_a_session(server: Server) -> None:
    reserved = messages.Reserved(slot_id="slot", size_bytes=4096)
    with connected(server, answer(ATTACHED, reserved)) as connection:
        assert connection.attach(ATTACH, deadline_s=PATIENCE_S) == ATTACHED
        request = messages.Reserve(step=1, size_bytes=4096)
        assert connection.call(request, deadline_s=PATIENCE_S) == (reserved, [])


def test_a_descriptor_of_a_slot_arrives_writable_and_close_on_exec(server: Server, tmpfs_dir: Path) -> None:
    slot = os.open(tmpfs_dir / "slot", os.O_RDWR | os.O_CREAT)
    try:
        with connected(server, answer(messages.Reserved(slot_id="slot", size_bytes=3), fds=(slot,))) as connection:
            _, fds = connection.call(messages.Reserve(step=1, size_bytes=3), deadline_s=PATIENCE_S)
            assert not os.get_inheritable(fds[0])
            os.pwrite(fds[0], b"abc", 0)
            os.close(fds[0])
        assert os.pread(slot, 3, 0) == b"abc"
    finally:
        os.close(slot)


@pytest.mark.parametrize("error_class", [CapacityError, StaleGenerationError, UsageError, UnavailableError])
def test_an_error_reply_is_raised_as_its_class_and_the_session_goes_on(server: Server, error_class: Any) -> None:
    refusal = messages.Error(error_class=error_class.__name__, reason="because", message="no room: 3 of 4")
    with connected(server, answer(refusal, messages.Done())) as connection:
        with pytest.raises(error_class, match="no room: 3 of 4") as caught:
            connection.call(messages.Reserve(step=1, size_bytes=1), deadline_s=PATIENCE_S)
        assert caught.value.reason == "because"
        assert connection.call(messages.Abandon(step=1), deadline_s=PATIENCE_S) == (messages.Done(), [])


def test_an_error_class_of_a_newer_daemon_is_still_an_error(server: Server) -> None:
    from backstay.errors import BackstayError

    with connected(server, answer(messages.Error(error_class="NewError", reason="r", message="m"))) as connection:
        with pytest.raises(BackstayError) as caught:
            connection.call(messages.Status(), deadline_s=PATIENCE_S)
        assert type(caught.value) is BackstayError


def test_a_frozen_daemon_costs_the_deadline_and_closes_the_session(server: Server) -> None:
    with connected(server, stay_silent) as connection:
        started = time.monotonic()
        with refuses(UnavailableError, "deadline", 0, 3, 9) as caught:
            connection.call(messages.Reserve(step=1, size_bytes=1), deadline_s=0.3)
        assert 0.3 <= time.monotonic() - started < PATIENCE_S / 2
        assert caught.value.reason == "deadline"
        with refuses(UnavailableError, "closed"):
            connection.call(messages.Status(), deadline_s=PATIENCE_S)


def test_a_daemon_that_does_not_read_costs_the_deadline_too(server: Server) -> None:
    with connected(server, lambda connection: select.select([], [], [connection], 2.0) and None) as connection:
        big = messages.Commit(step=1, slot_id="s", manifest={"chunk_crcs": "0" * 3_000_000})
        with pytest.raises(UnavailableError, match="silent"):
            connection.call(big, deadline_s=0.3)


def test_a_daemon_that_sends_byte_by_byte_cannot_stretch_the_deadline(server: Server) -> None:
    def drip(connection: socket.socket) -> None:
        _, message_id, _ = framing.receive_frame(connection)
        for byte in framing.encode_frame(messages.StatusBody(document={"text": "x" * 100_000}), message_id):
            if select.select([connection], [], [], 0.02)[0]:  # the trainer left
                return
            connection.send(bytes([byte]))

    with connected(server, drip) as connection:
        started = time.monotonic()
        with pytest.raises(UnavailableError, match="silent"):
            connection.call(messages.Status(), deadline_s=0.4)
        assert time.monotonic() - started < PATIENCE_S / 2
        connection.close()


def test_a_daemon_that_dies_is_unavailable_at_once(server: Server) -> None:
    with connected(server, lambda connection: framing.receive_frame(connection) and None) as connection:
        with pytest.raises(UnavailableError) as caught:
            connection.call(messages.Status(), deadline_s=PATIENCE_S)
        assert caught.value.reason == "disconnected"


def test_no_daemon_and_a_wrong_path_are_told_apart(tmpfs_dir: Path) -> None:
    with refuses(UnavailableError, "no_daemon"):
        DaemonConnection(str(tmpfs_dir / "absent"), timeout_s=1)
    abandoned = socket.socket(socket.AF_UNIX)
    abandoned.bind(str(tmpfs_dir / "abandoned"))
    abandoned.close()
    with refuses(UnavailableError, "no_daemon"):
        DaemonConnection(str(tmpfs_dir / "abandoned"), timeout_s=1)
    with refuses(ConfigError, "bad_socket"):
        DaemonConnection(str(tmpfs_dir / ("x" * 200)), timeout_s=1)


def test_a_daemon_that_accepts_nobody_costs_the_deadline(tmpfs_dir: Path) -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(tmpfs_dir / "sock"))
        listener.listen(0)

        def fill_the_backlog() -> None:
            for _ in range(8):  # it takes one or two
                stack.callback(DaemonConnection(str(tmpfs_dir / "sock"), timeout_s=0.2).close)

        with refuses(UnavailableError, "deadline", "0.2"):
            fill_the_backlog()


@pytest.mark.parametrize("bytes_sent", [b"\0\0\0\2{}", b"\xff\xff\xff\xff", b"\0\0\0\1\xff", b"\0\0\0\4null"])
def test_a_reply_that_is_no_frame_ends_the_session_and_leaks_nothing(
    server: Server, marker: int, bytes_sent: bytes
) -> None:
    def script(connection: socket.socket) -> None:
        framing.receive_frame(connection)
        socket.send_fds(connection, [bytes_sent], [marker, marker])
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""

    with connected(server, script) as connection:
        with pytest.raises(IntegrityError):
            connection.call(messages.Status(), deadline_s=PATIENCE_S)
        assert copies_of(marker) == 1
        assert connection._socket.fileno() == -1


def test_a_late_reply_to_another_request_is_dropped_with_its_descriptors(server: Server, marker: int) -> None:
    def script(connection: socket.socket) -> None:
        _, message_id, _ = framing.receive_frame(connection)
        framing.send_frame(
            connection, messages.Reserved(slot_id="old", size_bytes=1), message_id=message_id - 1, fds=(marker,)
        )
        framing.send_frame(connection, messages.Progress(phase="waiting"), message_id=message_id)
        framing.send_frame(connection, messages.Done(), message_id=message_id)
        assert connection.recv(1) == b""

    with connected(server, script) as connection:
        assert connection.call(messages.Abandon(step=1), deadline_s=PATIENCE_S) == (messages.Done(), [])
        assert copies_of(marker) == 1


def test_the_wrong_kind_of_reply_is_refused(server: Server) -> None:
    with (
        connected(server, answer(messages.Done())) as connection,
        refuses(IntegrityError, "bad_reply"),
    ):
        connection.attach(ATTACH, deadline_s=PATIENCE_S)


@pytest.mark.parametrize("protocol", [messages.PROTOCOL_VERSION - 2, messages.PROTOCOL_VERSION + 1])
def test_a_daemon_of_another_protocol_is_refused_with_both_versions(server: Server, protocol: int) -> None:
    other = messages.Attached(session_id="s", incarnation="1", lease_s=3, protocol=protocol, daemon_version="9.9")
    with (
        connected(server, answer(other)) as connection,
        refuses(ConfigError, "protocol_version", "9.9", protocol),
    ):
        connection.attach(ATTACH, deadline_s=PATIENCE_S)


class TestRestore:
    """Progress is a sign of life; silence is not."""

    def test_progress_comes_before_the_decision_and_its_descriptors(self, server: Server, tmpfs_dir: Path) -> None:
        (tmpfs_dir / "shard").write_bytes(b"shard")
        told = [messages.Progress(phase="waiting"), messages.Progress(phase="staging", done_bytes=1, total_bytes=2)]
        shard = messages.RestoredShard(rank=0, source="local", manifest={}, fd_index=0)
        decision = messages.Restored(outcome="EXACT", attempt=2, step=7, shards=(shard,))

        def script(connection: socket.socket) -> None:
            _, message_id, _ = framing.receive_frame(connection)
            for progress in told:
                framing.send_frame(connection, progress, message_id=message_id)
            with (tmpfs_dir / "shard").open("rb") as file:
                framing.send_frame(connection, decision, message_id=message_id, fds=(file.fileno(),))
            assert connection.recv(1) == b""

        heard: list[messages.Progress] = []
        with connected(server, script) as connection:
            restored, fds = connection.restore(messages.Restore(deadline_s=PATIENCE_S), heard.append)
            with os.fdopen(fds[0], "rb") as file:
                assert file.read() == b"shard"
        assert (heard, restored) == (told, decision)

    def test_silence_ends_the_wait_long_before_the_deadline(self, server: Server) -> None:
        with connected(server, stay_silent) as connection:
            connection.silence_s = 0.3
            started = time.monotonic()
            with pytest.raises(UnavailableError, match="silent"):
                connection.restore(messages.Restore(deadline_s=600), lambda _: None)
            assert time.monotonic() - started < PATIENCE_S

    def test_signs_of_life_prolong_the_wait_but_not_beyond_the_deadline(self, server: Server) -> None:
        def chatter(connection: socket.socket) -> None:
            _, message_id, _ = framing.receive_frame(connection)
            while not select.select([connection], [], [], 0.05)[0]:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    framing.send_frame(connection, messages.Progress(phase="waiting"), message_id=message_id)

        heard: list[messages.Progress] = []
        with connected(server, chatter) as connection:
            connection.silence_s = 0.6
            started = time.monotonic()
            with pytest.raises(UnavailableError):
                connection.restore(messages.Restore(deadline_s=-1.0), heard.append)
            assert 0.9 <= time.monotonic() - started < PATIENCE_S, (
                "longer than one silence; 2 s of grace after the deadline"
            )
        assert len(heard) > 2

    def test_shards_without_descriptors_are_refused(self, server: Server, marker: int) -> None:
        shard = messages.RestoredShard(rank=0, source="local", manifest={}, fd_index=1)
        decision = messages.Restored(outcome="EXACT", attempt=2, shards=(shard,))
        with connected(server, answer(decision, fds=(marker,))) as connection:
            with pytest.raises(IntegrityError, match="1 descriptors"):
                connection.restore(messages.Restore(deadline_s=PATIENCE_S), lambda _: None)
            assert copies_of(marker) == 1

    def test_what_the_listener_raises_comes_through_and_ends_the_session(self, server: Server) -> None:
        def interrupt(_: messages.Progress) -> None:
            raise KeyboardInterrupt

        with connected(server, answer(messages.Progress(phase="waiting"))) as connection:
            with pytest.raises(KeyboardInterrupt):
                connection.restore(messages.Restore(deadline_s=PATIENCE_S), interrupt)
            with pytest.raises(UnavailableError, match="closed"):
                connection.call(messages.Status(), deadline_s=PATIENCE_S)


def test_calls_of_two_threads_do_not_mix(server: Server) -> None:
    def echo(connection: socket.socket) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                message, message_id, _ = framing.receive_frame(connection)
                framing.send_frame(connection, messages.Committed(digest=message.reason), message_id=message_id)

    with connected(server, echo) as connection:
        mixed: list[str] = []

        def ask(name: str) -> None:
            for index in range(50):
                reply, _ = connection.call(messages.Abandon(step=1, reason=f"{name}{index}"), deadline_s=PATIENCE_S)
                if reply.digest != f"{name}{index}":
                    mixed.append(reply.digest)

        threads = [threading.Thread(target=ask, args=(name,)) for name in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert mixed == []


def test_a_call_behind_another_waits_its_own_deadline_only(server: Server) -> None:
    with connected(server, stay_silent) as connection:
        failed: list[UnavailableError] = []

        def hold() -> None:
            try:
                connection.call(messages.Reserve(step=1, size_bytes=1), deadline_s=PATIENCE_S)
            except UnavailableError as error:
                failed.append(error)

        thread = threading.Thread(target=hold)
        thread.start()
        deadline = time.monotonic() + PATIENCE_S
        while not connection._lock.locked() and time.monotonic() < deadline:
            thread.join(0.01)
        with pytest.raises(UnavailableError) as caught:
            connection.call(messages.Status(), deadline_s=0.1)
        assert caught.value.reason == "busy"
        connection.close()
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "close() wakes who waits"
        assert [error.reason for error in failed] == ["disconnected"]
        connection.close()


def _in_child(action: Callable[[], int]) -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(action())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_forked_child_has_no_line_and_the_parents_goes_on(server: Server) -> None:
    with connected(server, answer(ATTACHED, messages.Done())) as connection:
        connection.attach(ATTACH, deadline_s=PATIENCE_S)
        fd = connection._socket.fileno()

        def action() -> int:
            if os.path.exists(f"/proc/self/fd/{fd}"):
                return 1
            try:
                connection.call(messages.Finish(), deadline_s=PATIENCE_S)
            except UsageError:
                connection.close()
                return 0
            return 2

        assert _in_child(action) == 0
        assert connection.call(messages.Abandon(step=1), deadline_s=PATIENCE_S) == (messages.Done(), [])


def test_a_child_that_outlives_its_parents_session_does_not_keep_it_open(server: Server) -> None:
    ended = threading.Event()

    def until_the_end(connection: socket.socket) -> None:
        assert connection.recv(1) == b""
        ended.set()

    with connected(server, until_the_end) as connection:
        keep_open, let_go = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(let_go)
            os.read(keep_open, 1)
            os._exit(0)
        os.close(keep_open)
        connection._socket.close()  # as the kernel does for a dead process: no shutdown
        assert ended.wait(PATIENCE_S), "the child still holds the socket"
        os.close(let_go)
        os.waitpid(pid, 0)


def test_a_child_closes_the_descriptors_that_were_registered_for_it(tmpfs_dir: Path) -> None:
    slot = os.open(tmpfs_dir / "slot", os.O_RDWR | os.O_CREAT)
    unregister = register_child_cleanup(lambda: os.close(slot))
    try:
        assert _in_child(lambda: int(os.path.exists(f"/proc/self/fd/{slot}"))) == 0
        assert os.fstat(slot)
        unregister()
        assert _in_child(lambda: int(os.path.exists(f"/proc/self/fd/{slot}"))) == 1
        unregister()
    finally:
        os.close(slot)


MANIFEST = {"run": "default/gpt", "size_bytes": 8192, "tensors": [{"name": "w", "crc": 4294967295}], "aliases": {}}
EVERY_MESSAGE = [
    messages.Attach(
        run="default/gpt", world_id="w", rank=1, world_size=2, attempt=3, needs=(0, 1), collective_timeout_s=1.5
    ),
    ATTACHED,
    messages.Restore(allow_fresh=True, deadline_s=3.5, world_size=2),
    messages.Progress(phase="staging", detail="step 7", done_bytes=2**40, total_bytes=2**41),
    messages.Restored(
        outcome="EXACT",
        attempt=2,
        step=7,
        shards=(messages.RestoredShard(rank=1, source="peer", manifest=MANIFEST, fd_index=0, detail="n2"),),
    ),
    messages.Reserve(step=7, size_bytes=8192, wait_s=0.25, known_slots=("a", "b")),
    messages.Reserved(slot_id="a", size_bytes=8192, schedule=messages.Schedule(interval_steps=2, from_step=8)),
    messages.Skipped(reason="no slot", redundancy="AT_RISK"),
    messages.Commit(step=7, slot_id="a", manifest=MANIFEST),
    messages.Committed(digest="ab", protected_step=6),
    messages.Abandon(step=7, slot_id="a", reason="torn"),
    messages.Finish(keep=True),
    messages.Status(),
    messages.StatusBody(document={"format": 1, "runs": [MANIFEST], "nothing": None}),
    messages.Done(),
    messages.Error(error_class="UsageError", reason="r", message="m"),
    messages.Offer(
        decision_id="d",
        step=7,
        base_attempt=1,
        base_world_size=2,
        snapshot_id="s",
        manifests=(MANIFEST,),
        kinds=("peer",),
        details=("n2",),
    ),
    messages.Open(run="default/gpt", step=3),
    messages.Fetch(
        decision_id="d", shards=(messages.ChunkRanges(rank=1, firsts=(0, 9), counts=(1, 2)),), deadline_s=9.5
    ),
    messages.Fetched(shards=(messages.FetchedShard(rank=1, fd_index=0),)),
    messages.Gate(
        decision_id="d",
        entries=(messages.GateEntry(name="replicas", ranks=(0, 1), digest="ab"),),
        details=(messages.GateDetail(entry="replicas", names=("model.w",), digests=("cd",)),),
        deadline_s=9.5,
    ),
    messages.GateAnswer(state="detail", entries=("replicas",), message="m"),
    messages.Distrust(step=7, reason="NaN"),
    messages.Persist(),
    messages.Seal(step=7),
    messages.AwaitSeal(after_step=6, wait_s=1.5),
    messages.Sealed(step=7, protected_step=6, complete_step=7),
]


def test_every_message_comes_through_a_frame_as_it_was() -> None:
    assert {type(message).__name__ for message in EVERY_MESSAGE} == set(messages.MESSAGES)
    for message in EVERY_MESSAGE:
        assert framing.decode_payload(framing.encode_frame(message, 5)[4:]) == (message, 5)
