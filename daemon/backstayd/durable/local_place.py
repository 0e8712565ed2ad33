"""Durable storage on a file system of this machine: a disk, NFS, Lustre. Needs no package.

A file is written under a temporary name, flushed to the disk and linked to its own, which replaces nothing; the directory is
flushed too. A temporary file that a former daemon of this node left is gone on with, after its chunks were checked.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from crc32c import crc32c

from backstay import faults
from backstay.errors import CapacityError, ConfigError, IntegrityError, UnavailableError
from backstay.format.manifest import CHUNK_BYTES
from backstayd.durable.errors import NO_ROOT, explained
from backstayd.durable.place import MAX_SMALL_BYTES, Entry, RangeReader, ShardSource

WRITE_BYTES: Final = 4 * 1024 * 1024  # a multiple of the chunk length; larger buffers fall out of the cache
PART_SUFFIX: Final = ".part"
REMOVED_SUFFIX: Final = ".removed"


class LocalPlace:
    """A directory of this machine's file systems."""

    is_remote = False

    def __init__(self, url: str) -> None:
        self.url = url
        self._root = Path(_path_of(url) if url.startswith("file://") else url)

    def list(self, name: str = "") -> list[Entry]:
        with explained("list", self._url(name)):
            try:
                with os.scandir(self._root / name) as found:
                    entries = [_entry(e) for e in found if not e.name.startswith(".")]
                return [entry for entry in entries if entry is not None]
            except (FileNotFoundError, NotADirectoryError):
                return []

    def read_small(self, name: str) -> bytes:
        with explained("read", self._url(name)):
            path = self._root / name
            if path.is_symlink() and not path.exists():  # something is there, and maybe mounted again tomorrow
                raise IntegrityError(f"{self._url(name)} is a link to a file that is not there", reason="bad_record")
            if path.is_dir():
                raise IntegrityError(f"{self._url(name)} is a directory, not a file", reason="bad_record")
            if path.stat().st_size > MAX_SMALL_BYTES:
                raise IntegrityError(f"{self._url(name)} is larger than {MAX_SMALL_BYTES} bytes", reason="bad_record")
            return path.read_bytes()

    def size_of(self, name: str) -> int | None:
        with explained("look at", self._url(name)):
            try:
                return (self._root / name).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                return None

    def open_read(self, name: str) -> RangeReader:
        with explained("read", self._url(name)):
            return LocalFile(os.open(self._root / name, os.O_RDONLY | os.O_CLOEXEC), self._url(name))

    def open_file(self, name: str) -> LocalFile:
        """A regular file, which is not reached by a link.

        Raises:
            SnapshotNotFoundError: it is not there (``gone``). IntegrityError: something else is.
        """
        with explained("read", self._url(name)):
            try:
                fd = os.open(self._root / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                raise IntegrityError(f"{self._url(name)} is a symbolic link, not a file", reason="no_file") from error
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return LocalFile(fd, self._url(name))
        os.close(fd)
        raise IntegrityError(f"{self._url(name)} is not a regular file", reason="no_file")

    def put_shard(self, name: str, source: ShardSource, *, mark: str) -> bool:
        path = self._root / name
        part = path.with_name(f".{path.name}.{mark}{PART_SUFFIX}")
        with explained("write", self._url(name)):
            _make_directories(path.parent)
            fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                _fill(fd, source)
                os.fsync(fd)
            finally:
                os.close(fd)
            is_new = _link(part, path)
            part.unlink(missing_ok=True)
            _flush_directory(path.parent)
            return is_new

    def put_small(self, name: str, data: bytes) -> None:
        with explained("write", self._url(name)):
            path = self._root / name
            temporary = _write_temporary(path, data)
            temporary.rename(path)
            _flush_directory(path.parent)

    def create(self, name: str, data: bytes) -> bool:
        with explained("write", self._url(name)):
            path = self._root / name
            temporary = _write_temporary(path, data)
            try:
                is_new = _link(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            _flush_directory(path.parent)
            return is_new

    def remove(self, name: str) -> None:
        with explained("remove", self._url(name)):
            path = self._root / name
            path.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                _flush_directory(path.parent)

    def remove_tree(self, name: str, *, check: Callable[[], None] = lambda: None) -> None:
        """It is renamed first: what is written there from then on, late or anew, is not touched."""
        with explained("remove", self._url(name)):
            path = self._root / name
            check()
            with contextlib.suppress(FileNotFoundError):
                path.rename(path.with_name(f".{path.name}.{secrets.token_hex(8)}{REMOVED_SUFFIX}"))
            for removed in path.parent.glob(f".{path.name}.*{REMOVED_SUFFIX}"):  # those of a daemon that died, too
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(removed)
            parent = path.parent
            while parent != self._root and parent.is_relative_to(self._root):
                try:
                    parent.rmdir()  # an attempt without steps
                except OSError:
                    return
                parent = parent.parent

    def require_root(self) -> None:
        with explained("look at", self.url):
            if self._root.is_dir():
                return
        raise UnavailableError(
            f"cannot persist to {self.url}: the directory {self._root} does not exist on this node; mount or create it",
            reason=NO_ROOT,
        )

    def _url(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url


class LocalFile:
    """A file open for reading, which owns the descriptor ``fd``. ``file_id`` tells it from another that takes its name."""

    def __init__(self, fd: int, url: str) -> None:
        self.fd = fd
        self._url = url
        status = os.fstat(fd)
        self.size_bytes = status.st_size
        self.file_id = f"{status.st_dev}:{status.st_ino}"
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read_into(self, offset: int, view: memoryview) -> None:
        with explained("read", self._url):
            done = 0
            while done < len(view):
                count = os.preadv(self.fd, [view[done:]], offset + done)
                if count == 0:
                    raise IntegrityError(
                        f"{self._url} ends at byte {offset + done}, {len(view) - done} bytes too early",
                        reason="truncated",
                    )
                done += count

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _path_of(url: str) -> str:
    """What would be dropped from the path is refused: with it all runs would lie in one directory, or in another one."""
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or not parts.path:
        raise ConfigError(
            f"persist_url {url} is not the URL of a directory of this machine: three slashes begin its path, as in "
            "file:///mnt/ckpt, and '?' and '#' in it are written %3F and %23",
            reason="bad_url",
        )
    return unquote(parts.path)


def _entry(found: os.DirEntry[str]) -> Entry | None:
    """None for what is not there any more, or a link to it: that says nothing about the rest of the directory."""
    try:
        return Entry(found.name, -1 if found.is_dir() else found.stat().st_size)
    except FileNotFoundError:
        return None


def _fill(fd: int, source: ShardSource) -> None:
    """Write what is missing; each byte is written once, from the buffer it was verified in."""
    chunks, buffer = source.chunks, memoryview(bytearray(WRITE_BYTES))
    offset = _sound_bytes(fd, source, buffer)
    if os.fstat(fd).st_size > offset:
        os.ftruncate(fd, offset)
    while offset < chunks.size_bytes:
        view = buffer[: min(WRITE_BYTES, chunks.size_bytes - offset)]
        source.spend(len(view))
        source.read_verified(offset, view)
        _write(fd, view, offset)
        if offset <= chunks.size_bytes // 2 < offset + len(view):
            faults.reach("mid_upload", step=chunks.step, rank=chunks.rank)
        offset += len(view)
        source.note_done(len(view))


def _sound_bytes(fd: int, source: ShardSource, buffer: memoryview) -> int:
    """How much of a file that was begun before is right, in whole chunks from its start."""
    chunks = source.chunks
    length, chunk = os.fstat(fd).st_size, 0
    while chunk < chunks.chunk_count and chunk * CHUNK_BYTES + chunks.chunk_length(chunk) <= length:
        view = buffer[: chunks.chunk_length(chunk)]
        if os.preadv(fd, [view], chunk * CHUNK_BYTES) != len(view) or crc32c(view) != chunks.chunk_crc(chunk):
            break
        source.note_done(len(view))
        chunk += 1
    return min(chunk * CHUNK_BYTES, chunks.size_bytes)


def _write(fd: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        count = os.pwrite(fd, view[done:], offset + done)
        if count == 0:
            raise CapacityError("the file system took no more bytes", reason="no_space")
        done += count


def _write_temporary(path: Path, data: bytes) -> Path:
    _make_directories(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PART_SUFFIX}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        _write(fd, memoryview(data), 0)
        os.fsync(fd)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    return temporary


def _link(temporary: Path, path: Path) -> bool:
    """Publish ``temporary`` as ``path`` unless that exists: a hard link cannot replace anything."""
    try:
        os.link(temporary, path)
    except FileExistsError:  # or the answer to the first try was lost on its way: NFS
        return os.path.samefile(temporary, path)
    except OSError:  # a file system without hard links
        if path.exists():
            return False
        temporary.rename(path)
    return True


def _make_directories(path: Path) -> None:
    """Make ``path``, and make its name durable in each directory that got a new one."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        _flush_directory(directory.parent)


def _flush_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot, and need not
            os.fsync(fd)
    finally:
        os.close(fd)
