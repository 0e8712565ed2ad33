"""The fsspec scheme ``backstay://<job>/<run_id>/<folder>/<file>``: tools that only know checkpoint folders write into memory.

    dcp.save(state, checkpoint_id="backstay://llm/gpt-7b-3/step-100")

Files that the ranks write into one folder become one snapshot, of the step that the folder's name ends with. Must not
interpret what is in a file, nor show a folder that is not whole.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import sys
import threading
from typing import Any, Final

import torch.distributed as dist
from fsspec.core import has_magic
from fsspec.registry import register_implementation
from fsspec.spec import AbstractFileSystem
from fsspec.transaction import Transaction

from backstay import ids
from backstay.errors import BackstayError, UsageError
from backstay.stores.file_store import DEFAULT_COMPLETE_S, FileStore
from backstay.stores.folder_urls import SCHEME, enter_step, folder_of, move, split_path, step_of
from backstay.stores.open_files import ReadFile, WriteFile
from backstay.trainer.process_group import World, current_world

_log = logging.getLogger("backstay")

__all__ = ["BackstayFileSystem", "FileStore", "begin", "finish", "seal", "store_of"]

EXIT_COMPLETE_S: Final = 10.0
_RANK_METADATA: Final = re.compile(r"__\d+\.metadata")

_stores: dict[str, FileStore] = {}
_begun: dict[str, int] = {}  # how often this process began a run: names the world ids
_lock = threading.RLock()


def begin(url: str, *, socket: str | None = None, allow_fresh: bool = False, deadline_s: float = 600.0) -> int | None:
    """Join the world of the run of ``url`` on all ranks, and return the step of its files; None for a new run.

    The first use of the file system does the same; call this where not every rank uses it, or to begin again.

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
        place = current_world()
        step = store.begin(
            place=place, world_id=_agree_on_id(run, place), allow_fresh=allow_fresh, deadline_s=deadline_s
        )
        _stores[run] = store
        return step


def seal(url: str, *, timeout_s: float = DEFAULT_COMPLETE_S) -> None:
    """Declare that all ranks wrote all files of the folder ``url``; returns when every rank's part is in memory.

    One rank calls it, or all do.

    Raises:
        UnavailableError: not complete in time: the folder counts as not written, the one before stays.
    """
    _run, name = _split(url)
    store = store_of(url)
    step = step_of(f"{name}/file", store) if name else store.open_step
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


class _Transaction(Transaction):
    """fsspec's transaction: when it ends well, its files are there, and their folders are whole."""

    def complete(self, commit: bool = True) -> None:
        written = [file for file in self.files if isinstance(file, WriteFile)]
        try:
            super().complete(commit)
        finally:
            for file in written:
                file.discard()  # of those that are not there: an error came before them
        for store, step in {(file.store, file.step) for file in written if commit and file.step is not None}:
            store.seal(step)


class BackstayFileSystem(AbstractFileSystem):
    """Files in the memory of the nodes. Directories exist as far as files lie in them, or ``makedirs`` named them."""

    protocol = SCHEME
    root_marker = ""
    transaction_type = _Transaction

    def __init__(self, socket: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._socket = socket
        self._directories: set[str] = set()
        self._handles: dict[str, WriteFile] = {}

    # ---- looking

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        run, name = split_path(path)
        files = self._names(run, name)
        if name in files:
            return {"name": path, "size": files[name], "type": "file"}
        within = f"{path}/"
        is_directory = (
            not name
            or path in self._directories
            or any(file.startswith(f"{name}/") for file in files)
            or any(directory.startswith(within) for directory in tuple(self._directories))
        )
        if not is_directory:
            raise FileNotFoundError(f"{SCHEME}://{path}")
        return {"name": path, "size": 0, "type": "directory"}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = self._strip_protocol(path)
        itself = self.info(path)
        if itself["type"] == "file":
            return [itself] if detail else [path]
        run, name = split_path(path)
        found: dict[str, dict[str, Any]] = {}
        start = f"{path}/" if path else ""
        below: dict[str, int | None] = dict.fromkeys(self._directories)  # None: a directory
        below |= {f"{run}/{file}": size for file, size in self._names(run, name).items()}
        for full, size in below.items():
            if full.startswith(start) and full != path:
                first, _slash, rest = full[len(start) :].partition("/")
                is_directory = bool(rest) or size is None
                kind = "directory" if is_directory else "file"
                found[start + first] = {"name": start + first, "size": 0 if is_directory else size, "type": kind}
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
        run, name = split_path(path)
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
        """Delete open files, globs and directories of them; a whole sealed folder goes by itself, and is left alone."""
        given = [self._strip_protocol(each) for each in ([path] if isinstance(path, str) else path)]
        for each in given:
            if each in self._handles:
                self.rm_file(each)
            elif not recursive and not has_magic(each) and self.info(each)["type"] == "directory":
                raise IsADirectoryError(f"{SCHEME}://{each}")
            else:
                found = self.expand_path(each, recursive=recursive, maxdepth=maxdepth)
                self._rm_all(found, is_folder=recursive and found[0] == each and len(found) > 1)

    def _rm_all(self, paths: list[str], *, is_folder: bool) -> None:
        for each in reversed(paths):
            run, name = split_path(each)
            if each in self._directories or (self.exists(each) and self.info(each)["type"] == "directory"):
                self.rmdir(each)
            elif is_folder:
                self._store(run).remove(name)
            else:
                self.rm_file(each)

    def mv(self, path1: str, path2: str, recursive: bool = False, maxdepth: int | None = None, **_: Any) -> None:
        """Rename a file or directory that is not sealed, also into another folder if nothing else is open.

        To ``.metadata`` (DCP): its folder is whole; returns when all ranks' parts are.
        """
        old, new = self._strip_protocol(path1), self._strip_protocol(path2)
        if new in self._directories or self.isdir(new):
            new = f"{new}/{old.rpartition('/')[2]}"
        (run, name), (new_run, new_name) = split_path(old), split_path(new)
        store = self._store(run)
        directories = {each for each in self._directories if each == old or each.startswith(f"{old}/")}
        seen = {each for each in self._names(run, name) if each == name or each.startswith(f"{name}/")}
        if not seen and not directories:
            raise FileNotFoundError(f"{SCHEME}://{old}")
        if not name or not new_name or run != new_run or not seen <= store.open_names():
            raise PermissionError(f"{SCHEME}://{old} cannot be renamed to {new}: only open files, within one run")
        move(store, name, new_name)
        self._directories = self._directories - directories | {new + each[len(old) :] for each in directories}
        step, last = step_of(new_name, store), new_name.rpartition("/")[2]
        if step is None:
            return
        if last == ".metadata":
            store.seal(step)
        elif _RANK_METADATA.fullmatch(last):  # every rank has one (use_collectives=False), and commits for itself
            store.commit(step)

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        if self.isdir(path1):
            self.makedirs(path2, exist_ok=True)
        else:
            self.pipe_file(path2, self.cat_file(path1))

    def _open(
        self, path: str, mode: str = "rb", block_size: Any = None, autocommit: bool = True, **_: Any
    ) -> ReadFile | WriteFile:
        path = self._strip_protocol(path)
        run, name = split_path(path)
        store = self._store(run)
        if mode == "rb":
            if name not in self._names(run, name):
                raise FileNotFoundError(f"{SCHEME}://{path}: no such file in memory")
            return ReadFile(path, store.read(name))
        if mode not in ("wb", "ab", "xb"):
            raise ValueError(f"{SCHEME}://{path}: mode {mode!r} is not supported; use rb, wb, ab or xb")
        is_there = mode != "wb" and self.exists(path)
        if mode == "xb" and is_there:
            raise FileExistsError(f"{SCHEME}://{path}")
        begin = bytes(store.read(name)) if mode == "ab" and is_there else b""

        def on_end() -> None:
            if self._handles.get(path) is handle:
                del self._handles[path]

        step = enter_step(name, store)
        handle = WriteFile(path, store, name, step, begin=begin, autocommit=autocommit, on_end=on_end)
        self._handles[path] = handle
        return handle

    def _names(self, run: str, name: str) -> dict[str, int]:
        """Name and size of all visible files of a run; waits until what this rank committed under ``name`` is complete."""
        if not run:
            return {}
        store = self._store(run)
        self._settle(store, name)
        found, folder = store.names(), f"{store.open_folder}/"
        if store.open_step is None:
            return found
        # A folder without a step that is being rewritten shows nothing of its former content.
        own = store.open_names()
        return {each: size for each, size in found.items() if each in own or not each.startswith(folder)}

    def _settle(self, store: FileStore, name: str) -> None:
        store.settle(folder_of(f"{name}/")[1])

    def _store(self, run: str) -> FileStore:
        return store_of(f"{SCHEME}://{run}", socket=self._socket)


def _split(url: Any) -> tuple[str, str]:
    """``job/run_id`` and the rest of a URL."""
    text = url.removeprefix(f"{SCHEME}://").strip("/") if isinstance(url, str) else ""
    run, name = split_path(text)
    if not run or "://" in text:
        raise UsageError(f"{url!r} names no run: write {SCHEME}://<job>/<run_id>/<folder>", reason="bad_url")
    return run, name


def _agree_on_id(run: str, place: World) -> str:
    """The same world id on all ranks without a collective: the first rank draws it."""
    own = ids.new_incarnation()
    if place.size == 1:
        return own
    count = _begun[run] = _begun.get(run, 0) + 1
    shared = dist.distributed_c10d._get_default_store()
    return str(shared.compare_set(f"backstay/{run}/{count}", "", own).decode())


def _close_all() -> None:
    """At the end of the process: seal what is open, commit what others seal, detach; the memory stays.

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
