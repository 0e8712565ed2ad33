"""Open files of ``backstay://``, as Python's io and fsspec know them: one that is read, one that is written.

Must not know directories.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from backstay.stores.file_store import FileStore


class ReadFile(io.BufferedReader):
    """A file that is read from memory; ``size`` as fsspec has it."""

    def __init__(self, path: str, data: memoryview) -> None:
        super().__init__(_View(path, data))
        self.path, self.size = path, data.nbytes


class _View(io.RawIOBase):
    """Bytes in memory without a copy of them."""

    mode = "rb"

    def __init__(self, name: str, data: memoryview) -> None:
        self.name, self._data, self._position = name, data, 0

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


class WriteFile(io.RawIOBase):
    """A file being written; it is there when it is closed, or in a transaction (``autocommit`` False) committed.

    Invariant: while it is neither there nor given up, its step is held open.

    Args:
        name: Its name in ``store``; ``step`` that it belongs to, None if it lies in no folder.
        on_end: Called once, when it is there or given up.
    """

    _is_ready = False  # an object whose making failed is closed too, when it dies

    def __init__(
        self, path: str, store: FileStore, name: str, step: int | None, *, begin: bytes, autocommit: bool,
        on_end: Callable[[], None],
    ) -> None:  # fmt: skip
        super().__init__()
        self.path, self.store, self.step = path, store, step
        self.mode = "wb"
        self._name, self._autocommit, self._on_end = name, autocommit, on_end
        self._data = bytearray(begin)
        self._position = len(self._data)
        self._is_ended = False
        if step is not None:
            store.hold(step, name)
        self._is_ready = True

    @property
    def size(self) -> int:
        return len(self._data)

    def commit(self) -> None:
        """Make it a file of its step; nothing if it is one already, or was given up."""
        if self._is_ended or not self._is_ready:
            return
        try:
            if self.step is None:
                self.store.carry(self._name, self._data)
            else:
                self.store.write(self.step, self._name, self._data)
        finally:
            self._end()

    def discard(self) -> None:
        """Whatever is written to it, there will be no file."""
        if not self._is_ended and self._is_ready:
            self._end()

    def _end(self) -> None:
        self._is_ended = True
        if self.step is not None:
            self.store.release()
        self._on_end()

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

    def truncate(self, size: int | None = None) -> int:
        """Cut or extend with zeros to ``size`` (the position); the position stays, as of any file."""
        size = self._position if size is None else size
        del self._data[size:]
        self._data.extend(bytes(size - len(self._data)))
        return size

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        if self._autocommit:
            self.commit()
