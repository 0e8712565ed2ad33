"""Files as a rank's shard: written by any number of ranks, kept as one snapshot when one of them seals the step.

    store = FileStore(run_id="gpt-7b-3")
    step = store.begin()                       # None: a new run
    store.write(100, "model.pt", data)         # buffered in this process until the step is sealed
    store.seal(100)                            # by one rank: every rank commits what it wrote; returns when all have
    store.read("model.pt")                     # after a restart: what any rank wrote

Knows nothing of fsspec or of folders. Must not interpret what is in a file.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Container, Mapping
from typing import Any, Final

import torch

from backstay.errors import BackstayError, StaleGenerationError, UnavailableError, UsageError
from backstay.format import shard
from backstay.ids import DEFAULT_JOB, RunKey
from backstay.protocol.connection import find_socket
from backstay.restore.snapshot import OpenedSnapshot
from backstay.stores.snapshot_reader import SnapshotReader
from backstay.stores.store_session import POLL_S, StoreSession, begin
from backstay.trainer import argument_checks
from backstay.trainer.process_group import World, agree_on_id, current_world

_log = logging.getLogger("backstay")

KIND: Final = "files"  # the layout in manifests
FILE: Final = "file"
CARRIED: Final = "carried"
_NAME: Final = re.compile(rf"rank-(\d{{5,}})\.({FILE}|{CARRIED})\.(.*)", re.DOTALL)
PADDING: Final = "padding"
DEFAULT_MAX_WAIT_S: Final = 10.0
DEFAULT_COMPLETE_S: Final = 120.0
LOOK_S: Final = 10.0
RETRY_S: Final = 0.5
LINGER_S: Final = 2.0


Index = dict[str, tuple[str, int]]


class FileStore:
    """One rank's files of one run; thread-safe.

    Invariant: the files of at most one step are buffered and not committed (``open_step``); a committed step never changes.

    Args:
        run_id: The training run whose files these are; a new one for a run that starts from scratch.
        job: Name of the job the run belongs to.
        socket: Path of the daemon's socket; default ``$BACKSTAY_SOCKET``, then ``/run/backstay/backstayd.sock``.
        max_wait_s: How long a commit may wait for a free slot.
    """

    def __init__(
        self,
        *,
        run_id: str,
        job: str = DEFAULT_JOB,
        socket: str | os.PathLike[str] | None = None,
        max_wait_s: float = DEFAULT_MAX_WAIT_S,
    ) -> None:
        self.run = RunKey(job, run_id)
        self._socket_path = find_socket(socket)
        self._max_wait_s = argument_checks.seconds_of("max_wait_s", max_wait_s)
        self.step: int | None = None  # what this world began from; None: nothing
        self.last_problem = ""
        self.open_step: int | None = None
        self.open_folder = ""  # for who maps folders to steps
        self._carried: dict[str, Any] = {}  # files that belong to no step: in every snapshot of this rank
        self._files: dict[str, Any] = {}  # name -> bytes-like
        self._busy = 0  # files that are being written: a step with such a file is not committed
        self._committed = 0  # newest step that this rank committed or gave up
        self._committing = 0  # a step whose files this rank is committing
        self._sealed: dict[str, int] = {}  # name -> size of what this rank committed last
        self._session: StoreSession | None = None
        self._complete = 0  # newest complete step that this rank knows of
        self._awaited = 0  # newest step that a look waited for, whether or not it became complete
        self._source: SnapshotReader | None = None
        self._index: Index | None = None  # what is in ``_source``
        self._pid = os.getpid()
        self._state = threading.Condition()
        self._commit = threading.RLock()
        self._reading = threading.RLock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # ---- the world

    def begin(
        self, *, place: World | None = None, world_id: str = "", allow_fresh: bool = False, deadline_s: float = 600.0
    ) -> int | None:
        """Join the world of the run and return the step of its files; None for a run that is provably new.

        All ranks of torch.distributed call it; a collective unless ``world_id`` (the same on all ranks) is given.

        Raises:
            UnavailableError: no daemon, or no decision in time. UnrecoverableError: a known run without a restorable snapshot.
        """
        self.close()
        place = place or current_world()
        begun = begin(
            str(self.run),
            place,
            world_id or agree_on_id(place, deadline_s=deadline_s),
            socket_path=self._socket_path,
            allow_fresh=allow_fresh,
            deadline_s=deadline_s,
        )
        self._session, self._source, self._index = begun.session, begun.source, None
        self.step = begun.source.step if begun.source is not None else None
        self._committed = self._committing = self._complete = self._awaited = self.step or 0
        self._sealed = {}
        self._carried = self._carried_before(place)
        self._stop.clear()
        self._thread = threading.Thread(target=self._watch, args=(begun.session,), name="backstay-files", daemon=True)
        self._thread.start()
        return self.step

    @property
    def newest_step(self) -> int:
        """The newest step that this rank committed, or began from; 0: none."""
        return self._committed

    # ---- files

    def write(self, step: int, name: str, data: Any) -> None:
        """Buffer a file of ``step`` (bytes-like; kept, not copied). The name may have slashes; writing it again replaces it.

        Raises:
            UsageError: the step is committed, or files of another step are open.
        """
        with self._state:
            self._open(step, name)
            self._files[name] = data

    def carry(self, name: str, data: Any) -> None:
        """Keep a file that belongs to no step: it becomes part of every snapshot from the next one on."""
        with self._state:
            self._current()
            self._carried[name] = data

    def hold(self, step: int, name: str) -> None:
        """A file of ``step`` is being written: the step is not committed before :meth:`release`."""
        with self._state:
            self._open(step, name)
            self._busy += 1

    def release(self) -> None:
        """The file of a :meth:`hold` was written, or given up."""
        with self._state:
            self._busy -= 1
            self._state.notify_all()

    def remove(self, name: str) -> bool:
        """Forget a buffered file; False if there is none. What is committed stays as it is."""
        with self._state:
            return self._files.pop(name, self._carried.pop(name, None)) is not None

    def open_names(self) -> frozenset[str]:
        """Names of the buffered files: those of the open step, and those that belong to no step."""
        with self._state:
            return frozenset(self._files) | frozenset(self._carried)

    def holds_only(self, names: Container[str]) -> bool:
        """Whether all files of the open step are among ``names``, and none is being written."""
        with self._state:
            return not self._busy and all(name in names for name in self._files)

    def move(self, names: Mapping[str, str], step: int | None) -> None:
        """Rename buffered files, old name to new; they then belong to ``step``, or to none.

        Raises:
            UsageError: ``step`` is sealed, or not all files of the open step go along to it.
        """
        with self._state:
            if step is not None:
                first = next(iter(names.values()))
                if self.open_step not in (None, step) and self.holds_only(names):
                    self._check_open(step, first)
                    self.open_step = step
                else:
                    self._open(step, first)
            target = self._carried if step is None else self._files
            for name, new_name in names.items():
                target[new_name] = self._files.pop(name) if name in self._files else self._carried.pop(name)

    def settle(self, step: int | None = None) -> None:
        """Before the files of ``step`` (None: of any) are listed: if this rank committed it, wait until it is complete.

        So a step that one rank saw complete is visible to all, though the watching thread learns of it a little later. A step
        is waited for once, for at most ``LOOK_S``.
        """
        newest = max(self._committed, self._committing)
        if newest <= max(self._complete, self._awaited) or step not in (None, newest):
            return
        self._awaited = newest
        if self._current().wait_complete(newest, LOOK_S):
            self._complete = max(self._complete, newest)

    def names(self) -> dict[str, int]:
        """Name and size of every file that can be seen: of the newest complete step (all ranks'), and written here since."""
        _, index = self._newest()
        found = {name: size for name, (_, size) in index.items()}
        with self._state:
            if self._committed > self._complete:
                found |= self._sealed
            own = self._carried | self._files
        return found | {name: len(memoryview(data).cast("B")) for name, data in own.items()}

    def read(self, name: str) -> memoryview:
        """The bytes of a file; of a snapshot's, verified as they are read, whichever rank wrote it (own ones first).

        Raises:
            FileNotFoundError: no such file. IntegrityError: a byte is wrong.
        """
        with self._state:
            own = self._carried | self._files
            if name in own:
                return memoryview(own[name]).cast("B")
        source, index = self._newest()
        if source is None or name not in index:
            raise FileNotFoundError(f"{self.run}: no file {name!r} in memory (newest complete step {self._complete})")
        return memoryview(source.read_bytes(index[name][0]))

    # ---- whole steps

    def seal(self, step: int, *, timeout_s: float = DEFAULT_COMPLETE_S) -> None:
        """Declare that all ranks wrote all files of ``step``: every rank commits its part; returns when all have.

        Raises:
            UsageError: nothing was written for it; an empty step would take the place of the one before.
            UnavailableError: not complete within ``timeout_s``: the step counts as not written, the one before stays.
        """
        timeout_s = argument_checks.seconds_of("timeout_s", timeout_s)
        session = self._current()
        is_alone = session.place.size == 1  # else other ranks may have written some
        if is_alone and step > self._committed and not self._carried and self.open_step != step:
            found = "no files" if self.open_step is None else f"the files of step {self.open_step}"
            raise UsageError(
                f"{self.run}: nothing was written for step {step}, so it is not sealed; {found} are open",
                reason="empty_step",
            )
        self.commit(step, is_sealing=True)
        if session.wait_complete(step, timeout_s):
            self._complete = max(self._complete, step)
        else:
            raise UnavailableError(
                f"{self.run}: step {step} is not complete after {timeout_s:g} s: a rank did not commit its files (its log says "
                f"why); the step counts as not written, the newest complete one is {session.complete_step()}",
                reason="incomplete",
            )

    def commit(self, step: int, *, is_sealing: bool = False) -> None:
        """Commit this rank's files of ``step``, none if it wrote none. ``is_sealing``: and have the other ranks commit theirs.

        Raises:
            BackstayError: they cannot be kept; the step is given up, here and so everywhere.
        """
        session = self._current()
        with self._commit:
            if step <= self._committed:
                if is_sealing:
                    session.seal(step)
                return
            with self._state:
                if not self._state.wait_for(lambda: self._busy == 0, DEFAULT_COMPLETE_S):
                    raise UsageError(
                        f"step {step} of {self.run} was sealed while {self._busy} of its files are open",
                        reason="files_open",
                    )
                if self.open_step is not None and self.open_step < step:
                    self._give_up(session, step)
                files = dict(self._files) if self.open_step == step else {}
            if is_sealing:
                session.seal(step)
            self._commit_files(session, step, files)

    def abandon(self, step: int, reason: str) -> None:
        """Drop the files of ``step`` that are not committed: this rank will have none of it, so it will not be complete."""
        session = self._current()
        with self._commit:
            if self.open_step == step:
                session.abandon(step, reason)
                self._close_step(step, dict(self._files), self._sealed)

    def linger(self, timeout_s: float = LINGER_S) -> None:
        """Before leaving: wait a little for what another rank seals as it leaves, and commit this rank's part of it."""
        session = self._current()
        if session.place.size > 1:
            before, deadline = self._committed, time.monotonic() + timeout_s
            while self._committed == before and time.monotonic() < deadline and not self._stop.is_set():
                self._stop.wait(POLL_S)

    def finish(self, *, keep: bool = False) -> None:
        """The run ended well: free its memory everywhere (``keep=True``: it stays until ``job_ttl_s``), and detach."""
        if self._session is not None:
            self._session.finish(keep=keep)
        self.close()

    def close(self) -> None:
        """Detach; what is committed stays in memory, what is buffered is dropped. Idempotent."""
        self._stop.set()
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread() and os.getpid() == self._pid:
            thread.join(30.0)
        session, self._session = self._session, None
        source, self._source = self._source, None
        if session is not None:
            session.close()
        if source is not None:
            source.close()
        self._files, self.open_step, self._busy = {}, None, 0

    # ---- inside

    def _current(self) -> StoreSession:
        if os.getpid() != self._pid:
            raise UsageError(
                "this file store belongs to another process; a forked child must not use it", reason="forked"
            )
        if self._session is None:
            raise UsageError(
                "this file store has not begun (or was closed): call begin() on all ranks first", reason="not_begun"
            )
        return self._session

    def _carried_before(self, place: World) -> dict[str, Any]:
        """The carried files of the snapshot begun from: its own, and for rank 0 those of ranks that no longer exist."""
        found: dict[str, Any] = {}
        source = self._source
        for stored in source.read(lambda opened: opened.names()) if source is not None else ():
            named = _NAME.fullmatch(stored)
            if source is not None and named and named.group(2) == CARRIED:
                rank = int(named.group(1))
                if rank == place.rank or (place.rank == 0 and rank >= place.size):
                    found.setdefault(named.group(3), source.read_bytes(stored))
        return found

    def _newest(self) -> tuple[SnapshotReader | None, Index]:
        """The newest complete snapshot, opened at its first use."""
        session = self._current()
        with self._reading:
            source = self._source
            if self._complete > (source.step if source is not None else 0):
                if source is not None:
                    source.close()
                source = SnapshotReader(run=str(self.run), step=self._complete, socket_path=self._socket_path)
                self._source, self._index = source, None
            if source is not None and self._index is None:
                self._index = source.read(lambda opened: _index(opened, session.place.rank))
            return source, self._index or {}

    def _check_open(self, step: int, name: str) -> None:
        self._current()
        if step <= self._committed:
            began = " and is what this world began from" if step == self.step else ""
            raise UsageError(
                f"{name} cannot be written: step {self._committed} of {self.run} is sealed{began}, files of step {step} can no "
                "longer change; write into the folder of a later step",
                reason="sealed",
            )

    def _open(self, step: int, name: str) -> None:
        self._check_open(step, name)
        if self.open_step not in (None, step):
            raise UsageError(
                f"{name} of step {step} cannot be written while files of step {self.open_step} of {self.run} are open; seal "
                "that step first",
                reason="two_steps_open",
            )
        self.open_step = step

    def _commit_files(self, session: StoreSession, step: int, files: Mapping[str, Any]) -> None:
        try:
            self._committing = step
            carried = dict(self._carried)
            start = f"rank-{session.place.rank:05d}."
            sources = {f"{start}{FILE}.{name}": _as_tensor(data) for name, data in files.items()}
            sources |= {f"{start}{CARRIED}.{name}": _as_tensor(data) for name, data in carried.items()}
            sizes = {name: sources[f"{start}{FILE}.{name}"].numel() for name in files}
            layout = _layout(sources, f"{start}{PADDING}")
            session.write(step, layout, sources, kind=KIND, wait_s=self._max_wait_s)
        except BaseException as error:
            session.abandon(step, str(error))
            self._close_step(step, files, self._sealed)
            raise
        self._close_step(step, files, sizes)

    def _give_up(self, session: StoreSession, step: int) -> None:
        stale = self.open_step
        reason = f"step {step} of {self.run} was sealed while files of step {stale} are open: both are given up"
        session.abandon(step, reason)
        self._committed, self._files, self.open_step = step, {}, None
        raise UsageError(reason, reason="two_steps_open")

    def _close_step(self, step: int, files: Mapping[str, Any], sealed: dict[str, int]) -> None:
        with self._state:
            self._committed, self._sealed = step, sealed
            for name, data in files.items():
                if self._files.get(name) is data:
                    del self._files[name]
            if self.open_step == step:
                self.open_step = None

    def _watch(self, session: StoreSession) -> None:
        """Commit what this rank wrote, or nothing, of every step that another rank sealed."""
        while not self._stop.is_set():
            try:
                sealed = session.await_seal(self._committed, wait_s=POLL_S)
                self._complete = max(self._complete, sealed.complete_step)
                if sealed.step > self._committed:
                    self.commit(sealed.step)
            except StaleGenerationError as error:
                self._note(error)
                return
            except Exception as error:  # noqa: BLE001 - the thread's boundary: training must continue
                if not self._stop.is_set():
                    self._note(error)
                self._stop.wait(RETRY_S)

    def _note(self, error: Exception) -> None:
        text = str(error) if isinstance(error, BackstayError) else f"{type(error).__name__}: {error}"
        if text != self.last_problem:
            _log.warning("backstay: files of %s: %s", self.run, text)
        self.last_problem = text


def _index(opened: OpenedSnapshot, own_rank: int) -> Index:
    """File → tensor and size; of a file that several ranks wrote, the own one, else that of the lowest rank."""
    found: Index = {}
    for stored in opened.names():
        named = _NAME.fullmatch(stored)
        if named and (named.group(3) not in found or int(named.group(1)) == own_rank):
            found[named.group(3)] = (stored, opened.tensor(stored).shape[0])
    return found


def _as_tensor(data: Any) -> torch.Tensor:
    view = memoryview(data).cast("B")
    if not view.nbytes:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    if view.readonly:  # torch warns of read-only memory though it is only read here
        return _from_readonly(view)
    return torch.frombuffer(view, dtype=torch.uint8)


def _from_readonly(view: memoryview) -> torch.Tensor:
    return torch.frombuffer(bytearray(view), dtype=torch.uint8)


def _layout(sources: dict[str, torch.Tensor], padding_name: str) -> shard.Layout:
    """The files, and as much padding that a step with slightly larger files takes the same slots."""
    specs = [shard.TensorSpec.whole(name, "torch.uint8", tensor.shape) for name, tensor in sources.items()]
    size = shard.plan_layout(specs).size_bytes
    grain = max(shard.PAGE_BYTES, 1 << max(0, size.bit_length() - 5))
    padding = -size % grain
    sources[padding_name] = torch.zeros(padding, dtype=torch.uint8, device="cpu")
    return shard.plan_layout([*specs, shard.TensorSpec.whole(padding_name, "torch.uint8", (padding,))])
