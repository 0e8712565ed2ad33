"""The fsspec scheme ``backstay://<job>/<run_id>/<folder>/<file>``: tools that only know checkpoint folders write into memory.

    dcp.save(state, checkpoint_id="backstay://llm/gpt-7b-3/step-100")

Files that the ranks write into one folder become one snapshot, of the step that the folder's name ends with. Must not
interpret what is in a file, nor show a folder that is not whole.
"""

from __future__ import annotations

import atexit
import io
import logging
import os
import re
import sys
import threading
from typing import Any, Final

import torch.distributed as dist
from fsspec.registry import register_implementation
from fsspec.spec import AbstractFileSystem

from backstay import ids
from backstay.direct.filestore import DEFAULT_COMPLETE_S, FileStore
from backstay.errors import BackstayError, UsageError
from backstay.trainer import world
from backstay.trainer.world import World

_log = logging.getLogger("backstay")

__all__ = ["BackstayFileSystem", "FileStore", "begin", "finish", "seal", "store_of"]

SCHEME: Final = "backstay"
EXIT_COMPLETE_S: Final = 10.0
_STEP_FOLDER: Final = re.compile(
    r"(?:.*[^a-z])?(?:global_?step|step|iter(?:ation)?|checkpoint|ckpt|epoch)s?[-_=]?(\d+)", re.I
)
_NUMBERED: Final = re.compile(r".*?(\d+)")
_RANK_METADATA: Final = re.compile(r"__\d+\.metadata")

_stores: dict[str, FileStore] = {}
_begun: dict[str, int] = {}  # how often this process began a run: names the world ids
_lock = threading.RLock()


def begin(url: str, *, socket: str | None = None, allow_fresh: bool = False, deadline_s: float = 600.0) -> int | None:
    """Join the world of the run of ``url`` on all ranks, and learn the step of its files; None for a new run.

    The first use of the file system does the same; call this where not every rank uses it, or to start anew.

    Raises:
        UnavailableError: no daemon, or not all ranks in time. UnrecoverableError: a known run without a restorable snapshot.
    """
    run, _ = _split(url)
    with _lock:
        known = _stores.pop(run, None)
        if known is not None:
            known.close()
        job, _, run_id = run.partition("/")
        store = FileStore(run_id=run_id, job=job, socket=socket)
        place = world.current()
        step = store.begin(
            place=place, world_id=_agree_on_id(run, place), allow_fresh=allow_fresh, deadline_s=deadline_s
        )
        _stores[run] = store
        return step


def seal(url: str, *, timeout_s: float = DEFAULT_COMPLETE_S) -> None:
    """Say that all ranks wrote all files of the folder ``url``; returns when every rank's part is in memory.

    One rank calls it, or all do.

    Raises:
        UnavailableError: not complete in time: the folder counts as not written, the one before stays.
    """
    _run, name = _split(url)
    store = store_of(url)
    step = _step_of(f"{name}/file", store) if name else store.open_step
    if step is None:
        raise UsageError(f"{url!r} names no folder, and none is open: there is nothing to seal")
    store.seal(step, timeout_s=timeout_s)


def finish(url: str, *, keep: bool = False) -> None:
    """The run ended well: free its memory everywhere (``keep=True``: it stays until ``job_ttl_s``), and detach."""
    run, _ = _split(url)
    with _lock:
        store = _stores.pop(run, None)
    if store is not None:
        store.finish(keep=keep)


def store_of(url: str, *, socket: str | None = None) -> FileStore:
    """The store behind ``url``, begun if this is its first use in this process."""
    run, _ = _split(url)
    with _lock:
        if run not in _stores:
            begin(url, socket=socket)
        return _stores[run]


class BackstayFileSystem(AbstractFileSystem):
    """Files in the memory of the nodes. Directories exist as far as files lie in them, or ``makedirs`` named them."""

    protocol = SCHEME
    root_marker = ""

    def __init__(self, socket: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._socket = socket
        self._directories: set[str] = set()
        self._handles: dict[str, _Writer] = {}

    # ---- looking

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        run, name = _split_path(path)
        files = self._store(run).names() if run else {}
        if name in files:
            return {"name": path, "size": files[name], "type": "file"}
        is_directory = not name or path in self._directories or any(file.startswith(f"{name}/") for file in files)
        if not is_directory:
            raise FileNotFoundError(f"{SCHEME}://{path}")
        return {"name": path, "size": 0, "type": "directory"}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = self._strip_protocol(path)
        itself = self.info(path)
        if itself["type"] == "file":
            return [itself] if detail else [path]
        run, name = _split_path(path)
        start = f"{name}/" if name else ""
        found: dict[str, dict[str, Any]] = {}
        for file, size in (self._store(run).names() if run else {}).items():
            if file.startswith(start):
                first, _slash, rest = file[len(start) :].partition("/")
                full = f"{run}/{start}{first}"
                found[full] = {"name": full, "size": 0 if rest else size, "type": "directory" if rest else "file"}
        names = sorted(found)
        return [found[each] for each in names] if detail else names

    def exists(self, path: str, **_: Any) -> bool:
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def created(self, path: str) -> Any:
        raise NotImplementedError("files in memory have no times")

    def modified(self, path: str) -> Any:
        raise NotImplementedError("files in memory have no times")

    # ---- changing

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        self._directories.add(self._strip_protocol(path))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        if not exist_ok and self.exists(path):
            raise FileExistsError(f"{SCHEME}://{self._strip_protocol(path)}")
        self.mkdir(path)

    def rmdir(self, path: str) -> None:
        self._directories.discard(self._strip_protocol(path))

    def rm_file(self, path: str) -> None:
        """Forget a file that is not sealed; a sealed one goes by itself, when a later step is safe."""
        path = self._strip_protocol(path)
        run, name = _split_path(path)
        handle = self._handles.get(path)
        if handle is not None:
            handle.discard()
        if not self._store(run).remove(name) and handle is None:
            raise PermissionError(
                f"{SCHEME}://{path} cannot be deleted: its folder is sealed, or there is no such file; memory is freed by "
                "itself when a later step is as safe"
            )

    def _rm(self, path: str) -> None:
        self.rm_file(path)

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        for given in [path] if isinstance(path, str) else path:
            each = str(self._strip_protocol(given))
            if each in self._handles or self.info(each)["type"] == "file":
                self.rm_file(each)
            elif recursive:
                run, name = _split_path(each)
                store = self._store(run)
                for file in [file for file in store.names() if file.startswith(f"{name}/")]:
                    store.remove(file)
                self._directories = {d for d in self._directories if d != each and not d.startswith(f"{each}/")}
            else:
                raise IsADirectoryError(f"{SCHEME}://{each}")

    def mv(self, path1: str, path2: str, recursive: bool = False, maxdepth: int | None = None, **_: Any) -> None:
        """Rename a file that is not sealed. To ``.metadata`` (DCP): its folder is whole; returns when all ranks' parts are."""
        old, new = self._strip_protocol(path1), self._strip_protocol(path2)
        (run, name), (new_run, new_name) = _split_path(old), _split_path(new)
        store = self._store(run)
        step = _step_of(new_name, store)
        if run != new_run or not store.rename(name, new_name):
            if not self.exists(old):
                raise FileNotFoundError(f"{SCHEME}://{old}")
            raise PermissionError(f"{SCHEME}://{old} cannot be renamed to {new}: only open files, within one run")
        last = new_name.rpartition("/")[2]
        if step is None:
            return
        if last == ".metadata":
            store.seal(step)
        elif _RANK_METADATA.fullmatch(last):  # every rank has one (use_collectives=False), and commits for itself
            store.commit(step)

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        self.pipe_file(path2, self.cat_file(path1))

    def _open(self, path: str, mode: str = "rb", *args: Any, **_: Any) -> Any:
        path = self._strip_protocol(path)
        run, name = _split_path(path)
        store = self._store(run)
        if mode == "rb":
            return io.BufferedReader(_View(store.read(name)))
        if mode not in ("wb", "ab", "xb"):
            raise ValueError(f"{SCHEME}://{path}: mode {mode!r} is not supported; use rb, wb, ab or xb")
        if mode == "xb" and self.exists(path):
            raise FileExistsError(f"{SCHEME}://{path}")
        begin = bytes(store.read(name)) if mode == "ab" and self.exists(path) else b""
        handle = _Writer(self, path, store, begin)
        self._handles[path] = handle
        return handle

    def forget(self, path: str, handle: _Writer) -> None:
        """A file being written was closed."""
        if self._handles.get(path) is handle:
            del self._handles[path]

    def _store(self, run: str) -> FileStore:
        return store_of(f"{SCHEME}://{run}", socket=self._socket)


class _View(io.RawIOBase):
    """A file that is read from memory without a copy of it."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._position = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        part = self._data[self._position : self._position + view.nbytes]
        view[: part.nbytes] = part
        self._position += part.nbytes
        return part.nbytes

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._data.nbytes}[whence]
        self._position = max(0, base + offset)
        return self._position


class _Writer(io.RawIOBase):
    """A file being written; it is there when it is closed."""

    _is_ready = False  # an object whose making failed is closed too, when it dies

    def __init__(self, owner: BackstayFileSystem, path: str, store: FileStore, begin: bytes) -> None:
        super().__init__()
        self._owner, self._path, self._store = owner, path, store
        self._data = bytearray(begin)
        self._position = len(self._data)
        self._name = _split_path(path)[1]
        self._is_discarded = False
        self._step = _enter_step(self._name, store)
        if self._step is not None:
            store.hold(self._step, self._name)
        self._is_ready = True

    def discard(self) -> None:
        """Whatever is written to it, there will be no file."""
        self._is_discarded = True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self._position > len(self._data):
            self._data.extend(bytes(self._position - len(self._data)))
        self._data[self._position : self._position + view.nbytes] = view
        self._position += view.nbytes
        return view.nbytes

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._data)}[whence]
        self._position = max(0, base + offset)
        return self._position

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        if not self._is_ready:
            return
        self._owner.forget(self._path, self)
        try:
            if self._is_discarded:
                return
            if self._step is None:
                self._store.carry(self._name, self._data)
            else:
                self._store.write(self._step, self._name, self._data)
        finally:
            if self._step is not None:
                self._store.release()


def _split(url: Any) -> tuple[str, str]:
    """``job/run_id`` and the rest of a URL."""
    text = url.removeprefix(f"{SCHEME}://").strip("/") if isinstance(url, str) else ""
    run, name = _split_path(text)
    if not run or "://" in text:
        raise UsageError(f"{url!r} names no run: write {SCHEME}://<job>/<run_id>/<folder>")
    return run, name


def _split_path(path: str) -> tuple[str, str]:
    parts = path.split("/", 2)
    if len(parts) < 2:
        return "", ""
    return f"{parts[0]}/{parts[1]}", parts[2] if len(parts) == 3 else ""


def _folder_of(name: str) -> tuple[str, int | None]:
    """The folder that is one snapshot, and the step in its name: ``step-100/x/y`` and ``runs/step-100/x`` are step 100."""
    parents = name.split("/")[:-1]
    for pattern in (_STEP_FOLDER, _NUMBERED):
        for index, parent in enumerate(parents):
            if found := pattern.fullmatch(parent):
                return "/".join(parents[: index + 1]), int(found.group(1))
    return (parents[0] if parents else ""), None


def _step_of(name: str, store: FileStore) -> int | None:
    """The step that a file belongs to: its folder's number, else one more than the newest; None: it lies in no folder."""
    folder, step = _folder_of(name)
    if not folder or step is not None:
        return step
    if store.open_folder == folder and store.open_step is not None:
        return store.open_step
    return max(store.newest_step, store.open_step or 0) + 1


def _enter_step(name: str, store: FileStore) -> int | None:
    """The step of a file to write; the first file of a later one says that the one before is whole."""
    step = _step_of(name, store)
    before = store.open_step
    if step is not None and before is not None and step > before:
        store.commit(before, is_sealing=True)
    if step is not None:
        store.open_folder = _folder_of(name)[0]
    return step


def _agree_on_id(run: str, place: World) -> str:
    """The same world id on all ranks without a collective: whoever comes first draws it."""
    own = ids.new_incarnation()
    if place.size == 1:
        return own
    count = _begun[run] = _begun.get(run, 0) + 1
    shared = dist.distributed_c10d._get_default_store()
    return str(shared.compare_set(f"backstay/{run}/{count}", "", own).decode())


def _close_all() -> None:
    """At the end of the process: seal what is open, hear what others seal, detach; the memory stays.

    A process that ends by an exception may have been in the middle of a folder: what it has open is given up.
    """
    failure = getattr(sys, "last_value", None)
    for run, store in list(_stores.items()):
        try:
            if store.open_step is not None and failure is not None:
                store.abandon(store.open_step, f"the process ended by {type(failure).__name__} with files of it open")
                _log.warning(
                    "backstay: the files of the last folder of %s are not kept, the process ended by %s: it may not be "
                    "whole, which backstay.files.seal() says of a folder", run, type(failure).__name__,
                )  # fmt: skip
            elif store.open_step is not None:
                store.seal(store.open_step, timeout_s=EXIT_COMPLETE_S)
            else:
                store.linger()
        except (BackstayError, OSError) as error:
            _log.warning("backstay: the last files of %s are not kept: %s", run, error)
        store.close()
    _stores.clear()


def _forget_in_child() -> None:
    _stores.clear()
    _lock._at_fork_reinit()  # type: ignore[attr-defined]


register_implementation(SCHEME, BackstayFileSystem, clobber=True)
os.register_at_fork(after_in_child=_forget_in_child)
atexit.register(_close_all)
