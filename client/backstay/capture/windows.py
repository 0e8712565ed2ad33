"""The windows of a shard that is being captured: what is copied and hashed together, by any number of threads.

Must not decide what is kept: it copies and hashes every chunk that it is not told to leave out.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

import torch

from backstay import faults
from backstay.capture.plan import Piece
from backstay.digest import Digester
from backstay.manifest import CHUNK_BYTES
from backstay.trainer import memory

if TYPE_CHECKING:
    from backstay.capture.filling import Capture

WINDOW_BYTES: Final = (
    4 * CHUNK_BYTES
)  # fits the L2 cache, and few enough windows that taking the GIL back does not show

_Run = tuple[int, int, int]  # first byte in the file, byte behind the last, address of the source


class Windows:
    """The windows of one shard, taken one after the other by any number of threads, also while more are added.

    Invariant: each window is taken once, and each chunk lies in one window or is left out for good.
    """

    def __init__(self, capture: Capture, slot: memory.Mapping, *, rank: int) -> None:
        layout = capture.plan.layout
        self.slot, self._capture, self._rank = slot, capture, rank
        self.digester = Digester(layout)
        self.chunk_count = -(-layout.size_bytes // CHUNK_BYTES)
        self.hashed_bytes = 0
        self._size_bytes = layout.size_bytes
        self._header = torch.frombuffer(bytearray(layout.header), dtype=torch.uint8)  # the first run points to it
        self._runs: tuple[list[_Run], list[int]] = ([], [])  # and where each begins; replaced as a whole
        self._left: deque[tuple[int, int]] = deque()
        self._taken: list[range] = []  # chunks in windows that were added before
        self._middle = self._count = -1  # which window is in the middle, and how many there are once all were added
        self._begun, self._copied = itertools.count(), itertools.count(1)

    def add(self, pieces: Iterable[Piece], left_out: Sequence[range], *, is_all: bool = False) -> None:
        """Have all chunks copied and hashed that are not left out (nor were added before).

        Args:
            pieces: Where their bytes come from; what no piece has is in the slot already.
            left_out: Chunks, ascending.
            is_all: Nothing is added after this.
        """
        runs = [(0, self._header.numel(), self._header.data_ptr())]
        runs += [(p.begin, p.end, p.source.data_ptr()) for p in pieces]
        self._runs = runs, [begin for begin, _, _ in runs]
        wanted = gaps(sorted((*self._taken, *left_out), key=lambda chunks: chunks.start), self.chunk_count)
        spans = _windows(wanted, self._size_bytes)
        self._taken += wanted
        self.hashed_bytes += sum(end - begin for begin, end in spans)
        if self._middle < 0 and spans:
            self._middle = len(spans) // 2
        if is_all:
            self._count = len(_windows(self._taken, self._size_bytes))
        self._left.extend(spans)

    def drop(self) -> None:
        """Take none of those that are left."""
        self._left.clear()

    def work(self) -> None:
        """Copy and hash until none is left."""
        while self._left:
            try:
                begin, end = self._left.popleft()
            except IndexError:  # another thread took it
                return
            if next(self._begun) == self._middle:
                faults.reach("mid_copy", rank=self._rank, step=self._capture.step)
            self._copy(begin, end)
            if next(self._copied) == self._count:
                self._capture.mark_copied()  # the last digest need not hold up the fence
            self.digester.update_span(self.slot.view(begin, end), begin // CHUNK_BYTES)

    def _copy(self, begin: int, end: int) -> None:
        runs, begins = self._runs
        position = bisect_right(begins, begin) - 1
        while position < len(runs) and runs[position][0] < end:
            first, last, address = runs[position]
            low, high = max(first, begin), min(last, end)
            if low < high:
                memory.copy_bytes(self.slot.address + low, address + low - first, high - low)
            position += 1


def gaps(taken: Iterable[range], chunk_count: int) -> list[range]:
    """The chunks between ``taken`` ones, which are ascending."""
    found, begin = [], 0
    for chunks in (*taken, range(chunk_count, chunk_count)):
        if chunks.start > begin:
            found.append(range(begin, chunks.start))
        begin = chunks.stop
    return found


def _windows(wanted: Iterable[range], size_bytes: int) -> list[tuple[int, int]]:
    """Bytes of the windows that these chunks are copied and hashed in."""
    return [
        (first * CHUNK_BYTES, min(first * CHUNK_BYTES + WINDOW_BYTES, chunks.stop * CHUNK_BYTES, size_bytes))
        for chunks in wanted
        for first in range(chunks.start, chunks.stop, WINDOW_BYTES // CHUNK_BYTES)
    ]
