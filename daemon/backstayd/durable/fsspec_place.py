"""Durable storage on any file system that fsspec knows. Files are written under another name and moved when they are whole.

The manifest beside a shard is written after it, so a shard that was cut off has none. Assumes nothing that not every
file system does, so nothing here is atomic: a name is looked at right before something is moved to it.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable
from typing import Any, Final

from backstay import faults
from backstay.errors import IntegrityError, SnapshotNotFoundError
from backstayd.durable.errors import explained
from backstayd.durable.place import MAX_SMALL_BYTES, Entry, RangeReader, ShardSource

BLOCK_BYTES: Final = 8 * 1024 * 1024
REMOVED_AT_ONCE: Final = 200  # files, between two looks at whether that is still wanted


class FsspecPlace:
    """A directory of an fsspec file system."""

    is_remote = True

    def __init__(self, url: str, filesystem: Any, path: str) -> None:
        self.url = url
        self._fs = filesystem
        self._path = path

    def list(self, name: str = "") -> list[Entry]:
        path = self._at(name)
        with explained("list", self._url(name)):
            try:
                found = self._fs.ls(path, detail=True, refresh=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
            entries = []
            for item in found:
                base = str(item["name"]).rstrip("/").rpartition("/")[2]
                is_self = str(item["name"]).strip("/") == path.strip("/")
                if not is_self and not base.startswith("."):
                    entries.append(Entry(base, -1 if item["type"] == "directory" else int(item["size"] or 0)))
            return entries

    def read_small(self, name: str) -> bytes:
        with explained("read", self._url(name)):
            if int(self._fs.info(self._at(name), refresh=True)["size"] or 0) > MAX_SMALL_BYTES:
                raise IntegrityError(f"{self._url(name)} is larger than {MAX_SMALL_BYTES} bytes", reason="bad_record")
            return bytes(self._fs.cat_file(self._at(name)))

    def size_of(self, name: str) -> int | None:
        with explained("look at", self._url(name)):
            try:
                return int(self._fs.info(self._at(name), refresh=True)["size"] or 0)
            except FileNotFoundError:
                return None

    def open_read(self, name: str) -> RangeReader:
        size = self.size_of(name)
        if size is None:
            raise SnapshotNotFoundError(f"{self._url(name)} is not there", reason="gone")
        return _FsspecReader(self._fs, self._at(name), self._url(name), size)

    def put_shard(self, name: str, source: ShardSource, *, mark: str) -> bool:
        chunks, buffer = source.chunks, memoryview(bytearray(BLOCK_BYTES))
        with explained("write", self._url(name)):
            if self.size_of(name) is not None:
                return False
            self._make_parent(name)
            temporary = self._temporary(name, mark)
            with self._fs.open(temporary, "wb") as file:
                for offset in range(0, chunks.size_bytes, BLOCK_BYTES):
                    view = buffer[: min(BLOCK_BYTES, chunks.size_bytes - offset)]
                    source.spend(len(view))
                    source.read_verified(offset, view)
                    file.write(view)
                    if offset <= chunks.size_bytes // 2 < offset + len(view):
                        faults.reach("mid_upload", step=chunks.step, rank=chunks.rank)
                    source.note_done(len(view))
            return self._move(temporary, name)

    def put_small(self, name: str, data: bytes) -> None:
        with explained("write", self._url(name)):
            self._make_parent(name)
            self._fs.pipe_file(self._at(name), data)

    def create(self, name: str, data: bytes) -> bool:
        with explained("write", self._url(name)):
            if self.size_of(name) is not None:
                return False
            self._make_parent(name)
            temporary = self._temporary(name, secrets.token_hex(8))
            self._fs.pipe_file(temporary, data)
            return self._move(temporary, name)

    def remove(self, name: str) -> None:
        with explained("remove", self._url(name)), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._at(name))

    def remove_tree(self, name: str, *, check: Callable[[], None] = lambda: None) -> None:
        """What is written there after it was listed is not touched."""
        with explained("remove", self._url(name)), contextlib.suppress(FileNotFoundError):
            files = self._fs.find(self._at(name))
            for begin in range(0, len(files), REMOVED_AT_ONCE):
                check()
                self._fs.rm(files[begin : begin + REMOVED_AT_ONCE])
            self._remove_directory(name)

    def _remove_directory(self, name: str) -> None:
        with contextlib.suppress(OSError):  # not empty, or no such thing
            self._fs.rmdir(self._at(name))

    def require_root(self) -> None:
        """Object stores have no directories, so there is nothing to ask of a store that is not known."""

    def _temporary(self, name: str, mark: str) -> str:
        directory, _, base = self._at(name).rpartition("/")
        return f"{directory}/.{base}.{mark}.part"

    def _move(self, temporary: str, name: str) -> bool:
        if self.size_of(name) is not None:
            self._fs.rm_file(temporary)
            return False
        self._fs.mv(temporary, self._at(name))
        return True

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}" if name else self._path

    def _url(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def _make_parent(self, name: str) -> None:
        self._fs.makedirs(self._at(name).rpartition("/")[0], exist_ok=True)


class _FsspecReader:
    def __init__(self, filesystem: Any, path: str, url: str, size_bytes: int) -> None:
        self._fs = filesystem
        self._path = path
        self._url = url
        self.size_bytes = size_bytes

    def read_into(self, offset: int, view: memoryview) -> None:
        """The file system hands out bytes of its own: one copy, into the buffer that is verified."""
        with explained("read", self._url):
            data = self._fs.cat_file(self._path, start=offset, end=offset + len(view))
            if len(data) != len(view):
                raise IntegrityError(
                    f"{self._url} gave {len(data)} of {len(view)} bytes at {offset}", reason="truncated"
                )
            view[:] = data

    def close(self) -> None:
        """Nothing stays open."""
