"""Reading shards into tensors: every chunk is verified in the memory it will be used from.

Bound: one copy per byte (a scattered ``preadv`` from tmpfs into the tensors) and one crc pass behind it, on two threads;
bytes go through a window of 1 MiB first only where the target is not contiguous CPU memory. Must not decide what to restore.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import torch
from crc32c import crc32c

from backstay.errors import IntegrityError
from backstay.format import boxes
from backstay.format.boxes import Box, Range
from backstay.format.manifest import CHUNK_BYTES, Manifest, TensorEntry
from backstay.format.shard import STORAGE_RULES, shard_label
from backstay.trainer import raw_memory

WINDOW_CHUNKS: Final = 4
WINDOW_BYTES: Final = WINDOW_CHUNKS * CHUNK_BYTES

_BITS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """``box`` (of the whole tensor) of one stored entry goes to its place in ``destination``, which begins at ``origin``."""

    rank: int
    entry: TensorEntry
    box: Box
    destination: torch.Tensor
    origin: tuple[int, ...]

    @property
    def needed_bytes(self) -> int:
        return boxes.count(self.box[1]) * _item_bytes(self.entry)

    def byte_runs(self) -> list[Range]:
        """Bytes of the shard file that hold it, up to gaps that no whole chunk fits into."""
        inside = boxes.relative(self.box, self.entry.offsets)
        runs = boxes.byte_runs(inside, true_shape(self.entry), _item_bytes(self.entry), gap_bytes=CHUNK_BYTES)
        return [(self.entry.begin + begin, self.entry.begin + end) for begin, end in runs]

    def address(self) -> int | None:
        """Where these bytes can be read to at once: if they are one run in the file and one in CPU memory."""
        local, item = self.destination, _item_bytes(self.entry)
        if not raw_memory.is_plain_memory(local):
            return None
        inside = boxes.relative(self.box, self.origin)
        size = self.needed_bytes
        stored = boxes.relative(self.box, self.entry.offsets)
        for box, shape in ((inside, tuple(local.shape)), (stored, true_shape(self.entry))):
            ((begin, end), *rest) = boxes.byte_runs(box, shape, item, gap_bytes=CHUNK_BYTES)
            if rest or end - begin != size:
                return None
        return local.data_ptr() + boxes.flat_offset(inside, tuple(local.shape)) * item


@dataclass(slots=True)
class _Shard:
    """What is read of one shard. ``direct``: begin, end, address, in file order, disjoint. ``copies``: the other parts."""

    manifest: Manifest
    direct: list[tuple[int, int, int]] = field(default_factory=list)
    copies: list[Part] = field(default_factory=list)
    chunks: list[Range] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Window:
    """Consecutive chunks that are read and verified together: bytes ``begin`` to ``end`` of the file."""

    shard: _Shard
    fd: int
    begin: int
    end: int
    copies: list[Part] = field(default_factory=list)


class Reading:
    """A plan of what to read from where, made before the first byte is written.

    ``chunks``: by rank, ascending (first chunk, number of chunks) that must be there. ``needed_bytes`` counts what the
    targets take.
    """

    def __init__(self, parts: Sequence[Part], manifests: Mapping[int, Manifest]) -> None:
        self.needed_bytes = sum(part.needed_bytes for part in parts)
        self._parts = parts  # keeps the memory that addresses point to
        self._shards: dict[int, _Shard] = {}
        by_entry: dict[tuple[int, str], list[Part]] = {}
        for part in parts:
            by_entry.setdefault((part.rank, part.entry.name), []).append(part)
        needed: dict[int, list[Range]] = {}
        for (rank, _), together in by_entry.items():
            shard = self._shards.setdefault(rank, _Shard(manifests[rank]))
            for part in together:
                runs = part.byte_runs()
                needed.setdefault(rank, []).extend(runs)
                address = part.address()
                is_shared = any(p is not part and boxes.intersect(p.box, part.box) for p in together)
                if address is None or is_shared:
                    shard.copies.append(part)
                else:
                    shard.direct.append((*runs[0], address))
        for rank, shard in self._shards.items():
            shard.direct.sort()
            shard.chunks = chunk_ranges(needed[rank])
        self.chunks = {rank: shard.chunks for rank, shard in self._shards.items()}

    def run(self, descriptors: Mapping[int, int], *, thread_count: int = 2) -> None:
        """Read everything; ``descriptors`` by rank stay the caller's.

        Raises:
            IntegrityError: for a chunk whose digest does not match, naming it and the tensors in it.
        """
        windows = [w for rank, shard in self._shards.items() for w in _cut_windows(shard, descriptors[rank])]
        if not windows:
            return
        queue = iter(windows)  # shared: each thread takes the next one, without a future for each
        is_pinned = any(part.destination.device.type == "cuda" for part in self._parts)
        thread_count = max(1, min(thread_count, len(os.sched_getaffinity(0)), len(windows)))
        with ThreadPoolExecutor(max_workers=thread_count) as pool:
            futures = [pool.submit(_work, queue, is_pinned) for _ in range(thread_count - 1)]
            try:
                _work(queue, is_pinned)
            finally:
                for future in futures:
                    future.result()


def true_dtype(entry: TensorEntry) -> torch.dtype:
    """The dtype of the tensor, which the header may store under another name."""
    dtype = getattr(torch, entry.torch_dtype.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise IntegrityError(
            f"{entry.name} has dtype {entry.torch_dtype}, which this torch ({torch.__version__}) lacks; nothing was loaded",
            reason="unsupported_dtype",
        )
    return dtype


def true_shape(entry: TensorEntry) -> tuple[int, ...]:
    """Shape in the true dtype (stored complex numbers may have one dimension more)."""
    return entry.shape[: len(entry.offsets)]


def chunk_ranges(ranges: Iterable[Range]) -> list[Range]:
    """(first chunk, number of chunks), ascending and disjoint, that hold all bytes of ``ranges``."""
    chunks = sorted((begin // CHUNK_BYTES, -(-end // CHUNK_BYTES)) for begin, end in ranges if end > begin)
    return [(first, last - first) for first, last in boxes.merge(chunks)]


def _item_bytes(entry: TensorEntry) -> int:
    return STORAGE_RULES[entry.torch_dtype].item_bytes


def _cut_windows(shard: _Shard, fd: int) -> list[_Window]:
    size = shard.manifest.size_bytes
    windows = [
        _Window(shard, fd, chunk * CHUNK_BYTES, min(min(chunk + WINDOW_CHUNKS, first + length) * CHUNK_BYTES, size))
        for first, length in shard.chunks
        for chunk in range(first, first + length, WINDOW_CHUNKS)
    ]
    begins = [window.begin for window in windows]
    for part in shard.copies:
        for begin, end in part.byte_runs():
            index = bisect_right(begins, begin) - 1
            while index < len(windows) and windows[index].begin < end:
                if not windows[index].copies or windows[index].copies[-1] is not part:
                    windows[index].copies.append(part)
                index += 1
    return windows


def _work(windows: Iterator[_Window], is_pinned: bool) -> None:
    scratch = torch.empty(WINDOW_BYTES, dtype=torch.uint8, device="cpu", pin_memory=is_pinned)
    view = raw_memory.view_at(scratch.data_ptr(), WINDOW_BYTES)
    with torch.no_grad():
        for window in windows:
            pieces = _pieces(window, view)
            _read_exactly(window, [piece for _, piece in pieces])
            _verify(window, pieces)
            for part in window.copies:
                _copy_out(part, window, scratch)


def _pieces(window: _Window, scratch: memoryview) -> list[tuple[int, memoryview]]:
    """(chunk, memory) for all bytes of the window in order: targets where they can be read to at once, else scratch."""
    direct = window.shard.direct
    index = max(0, bisect_right(direct, (window.begin, window.end, 0)) - 1)
    pieces: list[tuple[int, memoryview]] = []
    position = window.begin
    while position < window.end:
        while index < len(direct) and direct[index][1] <= position:
            index += 1
        first, last, address = direct[index] if index < len(direct) else (window.end, window.end, 0)
        if first <= position:
            stop = min(window.end, last)
            view = raw_memory.view_at(address + position - first, stop - position)
        else:
            stop = min(window.end, first)
            view = scratch[position - window.begin : stop - window.begin]
        pieces += _cut(position, stop, view)
        position = stop
    return pieces


def _cut(begin: int, end: int, view: memoryview) -> list[tuple[int, memoryview]]:
    """(chunk, part of ``view``) for bytes ``begin`` to ``end``."""
    parts, position = [], begin
    while position < end:
        stop = min(end, (position // CHUNK_BYTES + 1) * CHUNK_BYTES)
        parts.append((position // CHUNK_BYTES, view[position - begin : stop - begin]))
        position = stop
    return parts


def _read_exactly(window: _Window, views: list[memoryview]) -> None:
    offset = window.begin
    while views:
        count = os.preadv(window.fd, views[:512], offset)
        if count == 0:
            raise IntegrityError(
                f"{shard_label(window.shard.manifest)} ends at byte {offset}; not used", reason="truncated"
            )
        offset += count
        while views and count >= views[0].nbytes:
            count -= views[0].nbytes
            views = views[1:]
        if count:
            views = [views[0][count:], *views[1:]]


def _verify(window: _Window, pieces: list[tuple[int, memoryview]]) -> None:
    manifest = window.shard.manifest
    crcs: dict[int, int] = {}
    for chunk, view in pieces:
        crcs[chunk] = crc32c(view, crcs.get(chunk, 0))
    for chunk, crc in crcs.items():
        expected = manifest.chunk_crc(chunk)
        if crc != expected:
            begin = chunk * CHUNK_BYTES
            names = [t.name for t in manifest.tensors if t.begin < begin + CHUNK_BYTES and t.end > begin]
            raise IntegrityError(
                f"{shard_label(manifest)}: chunk {chunk} (in {', '.join(names[:3])}) has crc32c {crc:08x}, its manifest says "
                f"{expected:08x}; the tensors being read are half written, do not train with them",
                reason="corrupt_chunk",
            )


def _copy_out(part: Part, window: _Window, scratch: torch.Tensor) -> None:
    """Copy what this window has of ``part``; an element never lies across two windows, as entries are aligned to it."""
    entry, item, shape = part.entry, _item_bytes(part.entry), true_shape(part.entry)
    low, high = max(window.begin, entry.begin), min(window.end, entry.end)
    wanted = boxes.relative(part.box, entry.offsets)
    for box in boxes.flat_boxes(shape, (low - entry.begin) // item, (high - entry.begin) // item):
        common = boxes.intersect(box, wanted)
        if common is None:
            continue
        begin = entry.begin + boxes.flat_offset(box, shape) * item - window.begin
        stored = scratch[begin : begin + boxes.count(box[1]) * item].view(true_dtype(entry)).view(box[1])
        shift = tuple(a - b for a, b in zip(part.origin, entry.offsets, strict=True))
        _copy_box(stored, boxes.relative(common, box[0]), part.destination, boxes.relative(common, shift))


def _copy_box(source: torch.Tensor, source_box: Box, destination: torch.Tensor, destination_box: Box) -> None:
    if not (destination.is_conj() or destination.is_neg()) and destination.element_size() in _BITS:
        bits = _BITS[destination.element_size()]  # whole numbers of the same size: some dtypes have no copy_
        source, destination = source.view(bits), destination.view(bits)
    for dim, size in enumerate(source_box[1]):
        source = source.narrow(dim, source_box[0][dim], size)
        destination = destination.narrow(dim, destination_box[0][dim], size)
        if destination.stride(dim) == 0:  # expanded: all of them are one element
            source, destination = source.narrow(dim, 0, 1), destination.narrow(dim, 0, 1)
    destination.copy_(source)
