"""Reading shards into tensors: every chunk is verified in the memory it will be used from.

Bound: one copy per byte (a scattered ``preadv`` from tmpfs into the tensors) and one crc pass behind it, on two threads;
bytes go through a buffer first only where the target is not row-major CPU memory. Must not decide what to restore.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import torch
from crc32c import crc32c

from backstay.errors import IntegrityError
from backstay.manifest import CHUNK_BYTES, Manifest, TensorEntry
from backstay.trainer import memory
from backstay.trainer.sources import LocalTensor

WINDOW_BYTES: Final = 4 * CHUNK_BYTES
Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, shape


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenShard:
    """One staged shard: its commit record and a read-only descriptor that the caller closes."""

    manifest: Manifest
    fd: int

    @property
    def label(self) -> str:
        m = self.manifest
        return f"shard of rank {m.rank} at step {m.step} (attempt {m.attempt}) of {m.run}"


@dataclass(slots=True)
class _Read:
    """What one shard's bytes are read into, and what is left to do with buffers afterwards."""

    shard: OpenShard
    runs: list[tuple[int, int, memoryview]] = field(default_factory=list)  # begin, end, memory: in file order
    buffers: list[tuple[TensorEntry, torch.Tensor, LocalTensor]] = field(default_factory=list)


def load(
    shards: Sequence[OpenShard],
    targets: Sequence[LocalTensor],
    private: Mapping[str, torch.Tensor],
    *,
    thread_count: int = 2,
) -> None:
    """Fill ``targets`` (boxes, put together from all shards that have parts) and ``private`` (whole tensors, by name).

    Raises:
        IntegrityError: for a missing or differing tensor (before a byte is written), or a chunk whose digest does not match.
    """
    reads = {shard.manifest.rank: _Read(shard) for shard in shards}
    by_name: dict[str, list[tuple[_Read, TensorEntry]]] = {}
    for read in reads.values():
        for entry in read.shard.manifest.tensors:
            by_name.setdefault(entry.name, []).append((read, entry))
    problems = [text for target in targets if (text := _plan_target(target, by_name.get(target.name, [])))]
    problems += [
        text for name, tensor in private.items() if (text := _plan_private(name, tensor, by_name.get(name, [])))
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise IntegrityError(
            f"the snapshot does not fit this model: {shown}; nothing was loaded", reason="layout_mismatch"
        )
    thread_count = max(1, min(thread_count, len(os.sched_getaffinity(0))))
    with ThreadPoolExecutor(max_workers=thread_count) as pool:
        for read in reads.values():
            read.runs.sort(key=lambda run: run[0])
            _read_shard(read, pool, thread_count)
    with torch.no_grad():
        for read in reads.values():
            for entry, buffer, target in read.buffers:
                _scatter(entry, buffer, target)


def true_dtype(entry: TensorEntry) -> torch.dtype:
    dtype = getattr(torch, entry.torch_dtype.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise IntegrityError(
            f"{entry.name} has dtype {entry.torch_dtype}, which this torch ({torch.__version__}) lacks"
        )
    return dtype


def true_shape(entry: TensorEntry) -> tuple[int, ...]:
    """Shape in the true dtype (stored complex numbers may have one dimension more)."""
    return entry.shape[: len(entry.offsets)]


def _plan_target(target: LocalTensor, parts: list[tuple[_Read, TensorEntry]]) -> str:
    """Decide where the parts of ``target`` go; gives a sentence if they do not make it up."""
    if target.local.numel() == 0:
        return ""
    covered: list[Box] = []
    own: Box = (target.offsets, tuple(target.local.shape))
    for read, entry in parts:
        if entry.global_shape != target.global_shape or entry.torch_dtype != str(target.local.dtype):
            found = f"{tuple(entry.global_shape)} {entry.torch_dtype}"
            return f"{target.name} is {found} in the snapshot, {target.global_shape} {target.local.dtype} here"
        common = _intersect((entry.offsets, true_shape(entry)), own)
        if common is None or any(_intersect(common, box) for box in covered):
            continue
        covered.append(common)
        address = _direct_address(entry, target)
        if address is not None:
            _add_run(read, entry, address)
        else:
            buffer = _buffer(entry, is_pinned=target.local.device.type == "cuda")
            read.buffers.append((entry, buffer, target))
            _add_run(read, entry, buffer.data_ptr())
    count = sum(_count(shape) for _, shape in covered)
    if count != target.local.numel():
        place = f"the {target.local.numel()} elements at {target.offsets} of {target.global_shape}"
        return f"{target.name}: the snapshot has {count} of {place}"
    return ""


def _plan_private(name: str, tensor: torch.Tensor, parts: list[tuple[_Read, TensorEntry]]) -> str:
    if len(parts) != 1:
        return f"{name} is in {len(parts)} shards, expected 1"
    read, entry = parts[0]
    if entry.end > entry.begin:
        _add_run(read, entry, tensor.data_ptr())
    return ""


def _add_run(read: _Read, entry: TensorEntry, address: int) -> None:
    read.runs.append((entry.begin, entry.end, memory.view_at(address, entry.end - entry.begin)))


def _buffer(entry: TensorEntry, *, is_pinned: bool) -> torch.Tensor:
    """A copy more, because the target is on a device, not row-major, or only a part of what is stored."""
    return torch.empty(true_shape(entry), dtype=true_dtype(entry), pin_memory=is_pinned)


def _intersect(left: Box, right: Box) -> Box | None:
    offsets, shape = [], []
    for a, n, b, m in zip(left[0], left[1], right[0], right[1], strict=True):
        begin, end = max(a, b), min(a + n, b + m)
        if begin >= end:
            return None
        offsets.append(begin)
        shape.append(end - begin)
    return tuple(offsets), tuple(shape)


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _direct_address(entry: TensorEntry, target: LocalTensor) -> int | None:
    """Where the stored box lies in the target's memory if that is one run of bytes, else None."""
    local, shape = target.local, true_shape(entry)
    if not memory.is_plain_memory(local):
        return None
    if local.ndim == 0:
        return local.data_ptr()
    rows = entry.offsets[0] - target.offsets[0]
    is_inside = rows >= 0 and rows + shape[0] <= local.shape[0]
    if not is_inside or shape[1:] != tuple(local.shape[1:]) or entry.offsets[1:] != target.offsets[1:]:
        return None
    return local.data_ptr() + rows * (memory.byte_count(local) // local.shape[0])


def _scatter(entry: TensorEntry, buffer: torch.Tensor, target: LocalTensor) -> None:
    common = _intersect((entry.offsets, true_shape(entry)), (target.offsets, tuple(target.local.shape)))
    assert common is not None
    source, destination = buffer, target.local
    for dim, (begin, size) in enumerate(zip(*common, strict=True)):
        source = source.narrow(dim, begin - entry.offsets[dim], size)
        destination = destination.narrow(dim, begin - target.offsets[dim], size)
        if destination.stride(dim) == 0:  # expanded: all of them are one element
            source, destination = source.narrow(dim, 0, 1), destination.narrow(dim, 0, 1)
    destination.copy_(source)


def _read_shard(read: _Read, pool: ThreadPoolExecutor, thread_count: int) -> None:
    """Read all windows of one shard that hold anything needed; a chunk is checked whole, with bytes nobody needs in scratch."""
    size = read.shard.manifest.size_bytes
    wanted = {
        window
        for begin, end, _ in read.runs
        if end > begin
        for window in range(begin // WINDOW_BYTES, (end - 1) // WINDOW_BYTES + 1)
    }
    begins = [begin for begin, _, _ in read.runs]
    windows = iter(sorted(wanted))  # shared: each thread takes the next one, without a future for each

    def work() -> None:
        for window in windows:
            begin = window * WINDOW_BYTES
            _read_window(read, begins, begin, min(begin + WINDOW_BYTES, size))

    futures = [pool.submit(work) for _ in range(thread_count - 1)]
    try:
        work()
    finally:
        for future in futures:
            future.result()


def _read_window(read: _Read, begins: list[int], begin: int, end: int) -> None:
    """Read bytes ``begin`` to ``end`` into the runs they belong to, in pieces that no chunk border cuts, and check them."""
    pieces: list[tuple[int, memoryview]] = []
    position, index = begin, max(0, bisect_right(begins, begin) - 1)
    while position < end:
        while index < len(read.runs) and read.runs[index][1] <= position:
            index += 1
        first, last, target = read.runs[index] if index < len(read.runs) else (end, end, memoryview(b""))
        is_needed = first <= position
        stop = min(end, last if is_needed else first)
        view = target[position - first : stop - first] if is_needed else memoryview(bytearray(stop - position))
        pieces += _cut(position, stop, view)
        position = stop
    _read_exactly(read.shard, [view for _, view in pieces], begin)
    _verify(read.shard, pieces)


def _cut(begin: int, end: int, view: memoryview) -> list[tuple[int, memoryview]]:
    """(chunk, part of ``view``) for bytes ``begin`` to ``end``."""
    parts, position = [], begin
    while position < end:
        stop = min(end, (position // CHUNK_BYTES + 1) * CHUNK_BYTES)
        parts.append((position // CHUNK_BYTES, view[position - begin : stop - begin]))
        position = stop
    return parts


def _read_exactly(shard: OpenShard, views: list[memoryview], offset: int) -> None:
    while views:
        count = os.preadv(shard.fd, views[:512], offset)
        if count == 0:
            raise IntegrityError(f"{shard.label} ends at byte {offset}; not used", reason="truncated")
        offset += count
        while views and count >= views[0].nbytes:
            count -= views[0].nbytes
            views = views[1:]
        if count:
            views = [views[0][count:], *views[1:]]


def _verify(shard: OpenShard, views: list[tuple[int, memoryview]]) -> None:
    crcs: dict[int, int] = {}
    for chunk, view in views:
        crcs[chunk] = crc32c(view, crcs.get(chunk, 0))
    for chunk, crc in crcs.items():
        expected = shard.manifest.chunk_crc(chunk)
        if crc != expected:
            begin = chunk * CHUNK_BYTES
            names = [t.name for t in shard.manifest.tensors if t.begin < begin + CHUNK_BYTES and t.end > begin]
            raise IntegrityError(
                f"{shard.label}: chunk {chunk} (in {', '.join(names[:3])}) has crc32c {crc:08x}, its manifest says "
                f"{expected:08x}; the model's tensors are half written, do not train with them",
                reason="corrupt_chunk",
            )
