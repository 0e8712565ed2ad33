"""A daemon double for the trainer's tests: the real local protocol, real slots on tmpfs, no cluster behind it.

One thread per connection. It keeps the newest complete snapshot of each run and reuses older files as slots. Not for tests of
the daemon: those start the real one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from backstay.errors import (
    BackstayError,
    CapacityError,
    IntegrityError,
    StaleGenerationError,
    UnavailableError,
    UsageError,
)
from backstay.format import json_records
from backstay.format.manifest import CHUNK_BYTES, Manifest
from backstay.format.shard import check_file
from backstay.protocol import framing, messages
from backstayd.core.messages.gate import GateReport
from backstayd.core.recover.gate import conflicts_of


@dataclass
class Shard:
    path: Path
    manifest: dict[str, Any]


@dataclass
class Run:
    attempt: int = 0
    world_id: str = ""
    waiting: set[int] = field(default_factory=set)
    decisions: dict[str, tuple[int, tuple[int, int] | None]] = field(default_factory=dict)
    snapshots: dict[tuple[int, int], dict[int, Shard]] = field(default_factory=dict)
    free: dict[int, list[Path]] = field(default_factory=dict)
    abandoned: list[tuple[int, int, str]] = field(default_factory=list)  # rank, step, reason
    finished: set[int] = field(default_factory=set)
    waited_s: float = 0.0  # for slots and copying, as its trainers say
    gates: dict[str, dict[int, GateReport]] = field(default_factory=dict)  # by decision and rank
    distrusted: list[tuple[int, int, str]] = field(default_factory=list)  # rank, step, reason
    staged: dict[str, set[int]] = field(default_factory=dict)  # world to ranks that have all they need
    sparse: dict[tuple[int, int, int], set[int]] = field(default_factory=dict)  # attempt, step, rank to chunks fetched


class LocalDaemon:
    """Serves ``socket_path`` until ``close()``. ``hold_slots``: Reserve answers Skipped; ``is_full``: it is an
    error, with other numbers each time; ``slot_delay_s``: so long a slot takes to come free; ``is_frozen``: nothing is
    answered; ``unanswered``: no message of these kinds.
    """

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="backstay-trainer-", dir="/dev/shm"))
        self.socket_path = str(self.directory / "sock")
        self.runs: dict[str, Run] = {}
        self.is_frozen = False
        self.unanswered: tuple[type, ...] = ()
        self.hold_slots = False
        self.is_full = False
        self.slot_delay_s = 0.0
        self.notice = ""
        self.interval_steps = 1
        self.probation_steps = 3
        self.fetched_bytes = 0  # of chunks of another layout, each once
        self._lock = threading.Condition()
        self._numbers = iter(range(1, 1_000_000))
        self._connections: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Listen (again)."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.socket_path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.socket_path)
        self._listener.listen(16)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def kill(self) -> None:
        """Close everything, as a dead process would; files stay."""
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.socket_path)
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.is_frozen, self.unanswered = False, ()
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def shard(self, run: str, step: int, rank: int = 0) -> Shard:
        with self._lock:
            return next(s[rank] for (_, at), s in sorted(self.runs[run].snapshots.items(), reverse=True) if at == step)

    def committed_steps(self, run: str, rank: int = 0) -> list[int]:
        with self._lock:
            return sorted(step for (_, step), shards in self.runs.get(run, Run()).snapshots.items() if rank in shards)

    def wait_until(self, condition: Any, timeout_s: float = 20.0) -> bool:
        """Wait until ``condition()`` holds; checked whenever a request was answered."""
        with self._lock:
            return bool(self._lock.wait_for(condition, timeout_s))

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            self._connections.add(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        attach: messages.Attach | None = None
        try:
            while True:
                message, number, _ = framing.receive_frame(connection)
                while self.is_frozen or isinstance(message, self.unanswered):
                    time.sleep(0.01)
                fds: tuple[int, ...] = ()
                try:
                    if isinstance(message, messages.Attach):
                        attach, reply = message, self._attach(message)
                    else:
                        assert attach is not None
                        reply, fds = self._answer(attach, message)
                except BackstayError as error:
                    reply = messages.Error.of(error)
                try:
                    framing.send_frame(connection, reply, message_id=number, fds=fds)
                finally:  # the trainer may have gone meanwhile
                    framing.close_fds(list(fds))
                with self._lock:
                    self._lock.notify_all()
        except (OSError, ConnectionError, IntegrityError):
            pass
        finally:
            self._connections.discard(connection)
            connection.close()

    def _attach(self, attach: messages.Attach) -> messages.Attached:
        with self._lock:
            run = self.runs.setdefault(attach.run, Run())
            if attach.attempt and attach.world_id != run.world_id:
                raise StaleGenerationError(f"world {attach.world_id} is over", reason="stale_world")
        return messages.Attached(
            session_id="s", incarnation="i", lease_s=1.0, protocol=messages.PROTOCOL_VERSION, node="double"
        )

    def _answer(self, attach: messages.Attach, message: Any) -> tuple[Any, tuple[int, ...]]:
        with self._lock:
            run = self.runs[attach.run]
            if isinstance(message, messages.Restore):
                return self._restore(run, attach, message)
            if isinstance(message, messages.Fetch):
                return self._fetch(run, attach, message)
            if run.world_id != attach.world_id:
                raise StaleGenerationError(f"world {attach.world_id} is over", reason="stale_world")
            if isinstance(message, messages.Gate):
                return self._gate(run, attach, message), ()
            if isinstance(message, messages.Distrust):
                run.distrusted.append((attach.rank, message.step, message.reason))
                return messages.Done(), ()
            if isinstance(message, messages.Reserve):
                return self._reserve(run, attach, message)
            if isinstance(message, messages.Commit):
                return self._commit(run, attach, message), ()
            if isinstance(message, messages.Abandon):
                run.abandoned.append((attach.rank, message.step, message.reason))
                if message.slot_id:
                    run.free.setdefault(attach.rank, []).append(self.directory / message.slot_id)
                return messages.Done(), ()
            if isinstance(message, messages.Finish):
                run.finished.add(attach.rank)
                return messages.Done(), ()
        raise UsageError(f"unknown request {type(message).__name__}")

    def _restore(self, run: Run, attach: messages.Attach, message: messages.Restore) -> tuple[Any, tuple[int, ...]]:
        if attach.world_id not in run.decisions:
            run.waiting.add(attach.rank)
        self._lock.notify_all()
        self._lock.wait_for(
            lambda: attach.world_id in run.decisions or len(run.waiting) == attach.world_size, message.deadline_s
        )
        if attach.world_id not in run.decisions:
            whole = [key for key, shards in run.snapshots.items() if len(shards) == len_of(shards)]
            run.attempt += 1
            run.world_id = attach.world_id
            run.waiting.clear()
            run.decisions[attach.world_id] = (run.attempt, max(whole) if whole else None)
            self._lock.notify_all()
        attempt, base = run.decisions[attach.world_id]
        if base is None:
            return messages.Restored(outcome="NONE", attempt=attempt, interval_steps=self.interval_steps), ()
        shards = run.snapshots[base]
        own = shards[attach.rank].manifest.get("layout", "") if attach.rank in shards else ""
        is_other = attach.layout and own and attach.layout != own
        if len(shards) != attach.world_size or is_other:
            return self._restore_elsewhere(run, attach, message), ()
        run.staged.setdefault(attach.world_id, set()).add(attach.rank)
        ranks = sorted({attach.rank, *attach.needs})
        fds = tuple(os.open(shards[rank].path, os.O_RDONLY) for rank in ranks)
        listed = tuple(
            messages.RestoredShard(rank=rank, source="local", manifest=shards[rank].manifest, fd_index=index)
            for index, rank in enumerate(ranks)
        )
        return messages.Restored(
            outcome="EXACT", attempt=attempt, step=base[1], base_attempt=base[0], snapshot_id="id", shards=listed,
            decision_id=attach.world_id, probation_steps=self.probation_steps,
        ), fds  # fmt: skip

    def _gate(self, run: Run, attach: messages.Attach, message: messages.Gate) -> messages.GateAnswer:
        """Compare as the coordinator does."""
        run.gates.setdefault(message.decision_id, {})[attach.rank] = GateReport(
            decision_id=message.decision_id,
            entries=message.entries,
            failure=message.failure,
        )
        reports = run.gates[message.decision_id]
        self._lock.notify_all()

        def is_said() -> bool:
            return len(reports) == attach.world_size or any(report.failure for report in reports.values())

        self._lock.wait_for(is_said, message.deadline_s)
        failures = [f"rank {rank}: {report.failure}" for rank, report in reports.items() if report.failure]
        conflicts = conflicts_of(reports, reports)
        if not failures and not conflicts:
            return messages.GateAnswer(state="passed")
        return messages.GateAnswer(state="failed", message="; ".join([*failures, *(str(c) for c in conflicts)]))

    def _restore_elsewhere(self, run: Run, attach: messages.Attach, message: messages.Restore) -> Any:
        """Offer the snapshot to a rank of another layout; let it go once every rank has what it needs."""
        attempt, base = run.decisions[attach.world_id]
        assert base is not None
        shards = run.snapshots[base]
        decision_id = attach.world_id
        if message.staged != decision_id:
            return messages.Offer(
                decision_id=decision_id,
                step=base[1],
                base_attempt=base[0],
                base_world_size=len(shards),
                snapshot_id="id",
                manifests=tuple(shards[rank].manifest for rank in range(len(shards))),
                kinds=("local",) * len(shards),
                details=("double",) * len(shards),
            )
        staged = run.staged.setdefault(attach.world_id, set())
        staged.add(attach.rank)
        self._lock.notify_all()
        self._lock.wait_for(lambda: len(staged) == attach.world_size, message.deadline_s)
        return messages.Restored(
            outcome="EXACT",
            attempt=attempt,
            step=base[1],
            base_attempt=base[0],
            snapshot_id="id",
            decision_id=decision_id,
            base_world_size=len(shards),
            probation_steps=self.probation_steps,
        )

    def _fetch(self, run: Run, attach: messages.Attach, message: messages.Fetch) -> tuple[Any, tuple[int, ...]]:
        """Copy the chunks asked for into sparse files, each once."""
        _, base = run.decisions[attach.world_id]
        assert base is not None
        if message.decision_id != attach.world_id:
            raise UnavailableError("that decision is over; ask again", reason="decision_changed")
        fds = []
        for ranges in message.shards:
            shard = run.snapshots[base][ranges.rank]
            path = self.directory / f"sparse-{base[0]}-{base[1]}-{ranges.rank}"
            present = run.sparse.setdefault((*base, ranges.rank), set())
            with open(path, "r+b" if path.exists() else "w+b") as sparse, open(shard.path, "rb") as whole:
                sparse.truncate(shard.manifest["size_bytes"])
                for first, count in zip(ranges.firsts, ranges.counts, strict=True):
                    for chunk in set(range(first, first + count)) - present:
                        for file in (sparse, whole):
                            file.seek(chunk * CHUNK_BYTES)
                        self.fetched_bytes += sparse.write(whole.read(CHUNK_BYTES))
                        present.add(chunk)
            fds.append(os.open(path, os.O_RDONLY))
        shards = tuple(messages.FetchedShard(rank=r.rank, fd_index=index) for index, r in enumerate(message.shards))
        return messages.Fetched(shards=shards), tuple(fds)

    def _reserve(self, run: Run, attach: messages.Attach, message: messages.Reserve) -> tuple[Any, tuple[int, ...]]:
        schedule = messages.Schedule(interval_steps=self.interval_steps, previous_interval_steps=self.interval_steps)
        if self.hold_slots:
            return messages.Skipped(reason="slots are held by the test", schedule=schedule, notice=self.notice), ()
        if self.is_full:
            raise CapacityError(f"no room for step {message.step}", reason="no_room")
        time.sleep(self.slot_delay_s)
        free = run.free.setdefault(attach.rank, [])
        path = next((p for p in free if p.stat().st_size == message.size_bytes), None)
        if path is None:
            path = self.directory / f"slot-{attach.rank}.{next(self._numbers)}"
            with open(path, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, message.size_bytes)
        else:
            free.remove(path)
        fds = () if path.name in message.known_slots else (os.open(path, os.O_RDWR),)
        return messages.Reserved(slot_id=path.name, size_bytes=message.size_bytes, schedule=schedule), fds

    def _commit(self, run: Run, attach: messages.Attach, message: messages.Commit) -> messages.Committed:
        run.waited_s += message.cost.waited_s
        path = self.directory / message.slot_id
        manifest = json_records.from_json(Manifest, message.manifest)
        if (manifest.attempt, manifest.step, manifest.rank) != (run.attempt, message.step, attach.rank):
            raise IntegrityError(f"manifest of attempt {manifest.attempt}, step {manifest.step} does not belong here")
        fd = os.open(path, os.O_RDONLY)
        try:
            check_file(fd, manifest)
        finally:
            os.close(fd)
        key = (manifest.attempt, manifest.step)
        shards = run.snapshots.setdefault(key, {})
        shards[attach.rank] = Shard(path, message.manifest)
        if len(shards) == attach.world_size:
            for older in [k for k in run.snapshots if k < key]:
                for rank, shard in run.snapshots.pop(older).items():
                    run.free.setdefault(rank, []).append(shard.path)
        schedule = messages.Schedule(interval_steps=self.interval_steps, previous_interval_steps=self.interval_steps)
        return messages.Committed(digest=manifest.digest, schedule=schedule, notice=self.notice)


def len_of(shards: dict[int, Shard]) -> int:
    """World size of a snapshot, as its manifests say."""
    return int(next(iter(shards.values())).manifest["world_size"])
