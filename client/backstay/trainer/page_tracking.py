"""Asks the kernel which pages of ordinary memory were not written to since the last check.

Userfaultfd in its asynchronous write-protect mode and the PAGEMAP_SCAN ioctl (Linux 6.7 and later; no privilege needed).
Reports "clean" only where the kernel guarantees it; must never deliver a fault to the training process, nor touch its bytes.
"""

from __future__ import annotations

import bisect
import ctypes
import fcntl
import os
import platform
import struct
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from backstay.trainer import raw_memory

PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
MAX_RANGES: Final = 4096  # each may split a mapping of the process in three; the kernel allows 65,530 by default

_libc = ctypes.CDLL(None, use_errno=True)
_SYSCALL: Final = {"x86_64": 323, "aarch64": 282}.get(platform.machine())
_USER_MODE_ONLY: Final = (
    1  # what an unprivileged process may ask for; asynchronous mode handles all faults in the kernel
)
_FEATURES: Final = 1 << 15 | 1 << 13 | 1 << 0  # WP_ASYNC, WP_UNPOPULATED, PAGEFAULT_FLAG_WP


def _ioctl(direction: int, kind: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | kind << 8 | number


_API: Final = _ioctl(3, 0xAA, 0x3F, 24)
_REGISTER: Final = _ioctl(3, 0xAA, 0x00, 32)
_UNREGISTER: Final = _ioctl(2, 0xAA, 0x01, 16)
_WRITE_PROTECT: Final = _ioctl(3, 0xAA, 0x06, 24)
_SCAN: Final = _ioctl(3, ord("f"), 16, 96)
_CHECK_ASYNC: Final = 1 << 1  # fail unless the whole range is registered
_WRITTEN: Final = 1 << 1
_TABLE_BYTES: Final = 512 * PAGE_BYTES  # what one page table maps

Range = tuple[int, int]  # addresses of the first byte and of the byte behind the last

_open_watches: weakref.WeakSet[PageWatch] = weakref.WeakSet()


class PageWatch:
    """Watches page-aligned ranges of private anonymous memory of this process.

    Invariant: of a range that was freed, mapped again, moved, shared, or that another thread unregistered, nothing is ever
    reported as clean. Not inherited by forked children. For one thread at a time.
    """

    def __init__(self) -> None:
        """Raises OSError where the kernel lacks this or forbids it."""
        if _SYSCALL is None or PAGE_BYTES != 4096:
            raise OSError(f"no write tracking on {platform.machine()} with pages of {PAGE_BYTES} bytes")
        self._fd = _libc.syscall(_SYSCALL, os.O_CLOEXEC | os.O_NONBLOCK | _USER_MODE_ONLY)
        if self._fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"userfaultfd: {os.strerror(code)}")
        self._pagemap = -1
        self._watched: set[Range] = set()
        try:
            fcntl.ioctl(self._fd, _API, struct.pack("QQQ", 0xAA, _FEATURES, 0))
            self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            self._region = (ctypes.c_uint64 * 3)()
            self._scan(0, 0)  # an older kernel does not know this request
        except OSError:
            self.close()
            raise
        _open_watches.add(self)

    def watch(self, ranges: Sequence[Range]) -> set[Range]:
        """Watch exactly these from now on; those that can be watched are returned, and are not clean until protected."""
        wanted = set(_watchable(ranges))
        for gone in self._watched - wanted:
            self._try(_UNREGISTER, struct.pack("QQ", gone[0], gone[1] - gone[0]))
        new = wanted - self._watched
        failed = {one for one in new if not self._try(_REGISTER, struct.pack("QQQQ", one[0], one[1] - one[0], 2, 0))}
        self._watched = wanted - failed
        return set(self._watched)

    def protect(self, one: Range) -> bool:
        """Begin to notice writes to a watched range; False if the registered memory was replaced."""
        return one in self._watched and self._try(_WRITE_PROTECT, struct.pack("QQQ", one[0], one[1] - one[0], 1))

    def is_clean(self, one: Range) -> bool:
        """Whether no page of a watched range was written, dropped or replaced since it was protected.

        A page that was dropped and is not back counts as written, unless all its neighbours went with it: the kernel is silent
        about page tables that are gone. So one byte of each is read first, which brings the table back without the mark.
        """
        begin, end = one
        if one not in self._watched:
            return False
        bytes(raw_memory.view_at(begin, end - begin)[::_TABLE_BYTES])
        bytes(raw_memory.view_at(end - 1, 1))
        try:
            return self._scan(begin, end) == 0
        except OSError:
            return False

    def close(self) -> None:
        """Stop watching; idempotent."""
        for fd in (self._fd, self._pagemap):
            if fd >= 0:
                os.close(fd)
        self._fd = self._pagemap = -1
        self._watched = set()

    def _scan(self, begin: int, end: int) -> int:
        """Whether any page is written (1) or none (0): one region is asked for, in the form the kernel answers fastest."""
        check = _CHECK_ASYNC if end > begin else 0
        region = ctypes.addressof(self._region)
        arguments = struct.pack("12Q", 96, check, begin, end, 0, region, 1, 1, 0, _WRITTEN, 0, _WRITTEN)
        return fcntl.ioctl(self._pagemap, _SCAN, bytearray(arguments))

    def _try(self, request: int, arguments: bytes) -> bool:
        try:
            fcntl.ioctl(self._fd, request, bytearray(arguments))
        except OSError:
            return False
        return True


def inner_pages(address: int, count: int) -> Range:
    """The whole pages within ``count`` bytes at ``address``; empty as ``(x, x)``."""
    begin = -(-address // PAGE_BYTES) * PAGE_BYTES
    return begin, max(begin, (address + count) // PAGE_BYTES * PAGE_BYTES)


def _watchable(ranges: Sequence[Range]) -> list[Range]:
    """Those that lie in private anonymous memory; the largest, if there are too many."""
    private = _private_memory()
    begins = [begin for begin, _ in private]
    found = []
    for begin, end in ranges:
        index = bisect.bisect_right(begins, begin) - 1
        if begin < end and index >= 0 and end <= private[index][1]:
            found.append((begin, end))
    return sorted(found, key=lambda one: one[0] - one[1])[:MAX_RANGES]


def _private_memory() -> list[Range]:
    """Runs of private anonymous mappings, ascending."""
    runs: list[Range] = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if (
            fields[1][3:4] != "p"
            or fields[4] != "0"
            or (len(fields) > 5 and not fields[5].startswith(("[heap", "[anon:")))
        ):
            continue
        begin, end = (int(part, 16) for part in fields[0].split("-"))
        if runs and runs[-1][1] == begin:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((begin, end))
    return runs


def _forget_in_child() -> None:
    for watch in list(_open_watches):
        watch.close()  # the child's memory is not watched by them


os.register_at_fork(after_in_child=_forget_in_child)
