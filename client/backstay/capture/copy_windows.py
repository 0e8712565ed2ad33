"""The windows of a shard that is being captured: what is copied and hashed together, by any number of threads.

Must not decide what is kept: it copies and hashes every chunk that the capture does not keep.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterable
from typing import Final

import torch

from backstay import faults
from backstay.capture.capture import Capture
from backstay.capture.shard_plan import Piece
from backstay.format.digest import Digester
from backstay.format.manifest import CHUNK_BYTES
from backstay.trainer import raw_memory

WINDOW_BYTES: Final = 4 * CHUNK_BYTES  # fits the L2 cache; few enough that taking the GIL back does not show

_Run = tuple[int, int, int]  # first byte in the file, byte behind the last, address of the source


class Windows:
    """The windows of one shard, taken one after the other by any number of threads.

    Invariant: each window is taken once, and each chunk lies in one window or is kept.

    Args:
        pieces: Where the bytes come from; what no piece has is in the slot already.
    """

    def __init__(self, capture: Capture, slot: raw_memory.Mapping, pieces: Iterable[Piece], *, rank: int) -> None:
        layout = capture.plan.layout
        self._slot, self._capture, self._rank = slot, capture, rank
        self.digester = Digester(layout)
        self._header = torch.frombuffer(bytearray(layout.header), dtype=torch.uint8)  # the first run points to it
        self._runs: list[_Run] = [(0, self._header.numel(), self._header.data_ptr())]
        self._runs += [(p.begin, p.end, p.source.data_ptr()) for p in pieces]
        self._begins = [begin for begin, _, _ in self._runs]
        self._spans = _windows(capture.kept.chunks, layout.size_bytes)
        self.hashed_bytes = sum(end - begin for begin, end in self._spans)
        self._next, self._copied = itertools.count(), itertools.count(1)

    def work(self) -> None:
        """Copy and hash until none is left."""
        while (index := next(self._next)) < len(self._spans):
            if index == len(self._spans) // 2:
                faults.reach("mid_copy", rank=self._rank, step=self._capture.step)
            begin, end = self._spans[index]
            self._copy(begin, end)
            if next(self._copied) == len(self._spans):
                self._capture.mark_copied()  # the last digest need not hold up the fence
            self.digester.update_span(self._slot.view(begin, end), begin // CHUNK_BYTES)

    def _copy(self, begin: int, end: int) -> None:
        position = bisect_right(self._begins, begin) - 1
        while position < len(self._runs) and self._runs[position][0] < end:
            first, last, address = self._runs[position]
            low, high = max(first, begin), min(last, end)
            if low < high:
                raw_memory.copy_bytes(self._slot.address + low, address + low - first, high - low)
            position += 1


def _windows(kept: Iterable[range], size_bytes: int) -> list[tuple[int, int]]:
    """Bytes of the windows to copy and hash: all chunks but those that the slot keeps, which are ascending."""
    chunk_count = -(-size_bytes // CHUNK_BYTES)
    gaps, begin = [], 0
    for chunks in (*kept, range(chunk_count, chunk_count)):
        gaps.append(range(begin, chunks.start))
        begin = chunks.stop
    return [
        (first * CHUNK_BYTES, min(first * CHUNK_BYTES + WINDOW_BYTES, gap.stop * CHUNK_BYTES, size_bytes))
        for gap in gaps
        for first in range(gap.start, gap.stop, WINDOW_BYTES // CHUNK_BYTES)
    ]
