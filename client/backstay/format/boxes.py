"""Arithmetic of boxes: what two parts of a tensor share, what is left of one, and which bytes a box is.

A box is (offsets, shape). Pure numbers: no tensors, no files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

Box = tuple[tuple[int, ...], tuple[int, ...]]
Range = tuple[int, int]  # begin, end


def count(shape: Sequence[int]) -> int:
    """Elements of a shape."""
    return math.prod(shape)


def intersect(left: Box, right: Box) -> Box | None:
    """The elements that both have; None if there are none."""
    offsets, shape = [], []
    for a, n, b, m in zip(left[0], left[1], right[0], right[1], strict=True):
        begin, end = max(a, b), min(a + n, b + m)
        if begin >= end:
            return None
        offsets.append(begin)
        shape.append(end - begin)
    return tuple(offsets), tuple(shape)


def subtract(box: Box, hole: Box) -> list[Box]:
    """``box`` without ``hole``, which lies inside it: up to two boxes for each dimension."""
    left = []
    offsets, shape = list(box[0]), list(box[1])
    for dim, (begin, size) in enumerate(zip(*hole, strict=True)):
        before, after = begin - offsets[dim], offsets[dim] + shape[dim] - begin - size
        for first, length in ((offsets[dim], before), (begin + size, after)):
            if length:
                left.append((
                    (*offsets[:dim], first, *offsets[dim + 1 :]),
                    (*shape[:dim], length, *shape[dim + 1 :]),
                ))  # fmt: skip
        offsets[dim], shape[dim] = begin, size
    return left


def byte_runs(box: Box, whole: Sequence[int], item_bytes: int, *, gap_bytes: int) -> list[Range]:
    """Runs of bytes that ``box`` is in row-major memory of shape ``whole``; gaps below ``gap_bytes`` are part of a run.

    ``box`` is not empty and its offsets count within ``whole``. There are at most (bytes of whole / gap_bytes) + 1 runs.
    """
    runs: list[Range] = [(0, item_bytes)]
    step = item_bytes  # bytes from one index of this dimension to the next
    for dim in reversed(range(len(whole))):
        first, size = box[0][dim], box[1][dim]
        begin, end = runs[0][0], runs[-1][1]
        if len(runs) == 1 and (size == 1 or step - (end - begin) < gap_bytes):
            runs = [(first * step + begin, (first + size - 1) * step + end)]
        else:
            indices = range(first, first + size)
            runs = merge(((i * step + b, i * step + e) for i in indices for b, e in runs), gap_bytes=gap_bytes)
        step *= whole[dim]
    return runs


def merge(ranges: Iterable[Range], *, gap_bytes: int = 1) -> list[Range]:
    """Ascending ranges with those joined that overlap or lie closer than ``gap_bytes``."""
    joined: list[Range] = []
    for begin, end in ranges:
        if joined and begin - joined[-1][1] < gap_bytes:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def flat_boxes(shape: Sequence[int], begin: int, end: int) -> list[Box]:
    """The elements ``begin`` to ``end`` of row-major memory as boxes: at most two for each dimension and one more."""
    if begin >= end:
        return []
    if not shape:
        return [((), ())]
    row = math.prod(shape[1:])
    first, last = begin // row, end // row
    head, tail = begin - first * row, end - last * row
    if first == last or (first + 1 == last and head and not tail):
        inner = flat_boxes(shape[1:], head, tail or row)
        return [((first, *offsets), (1, *sizes)) for offsets, sizes in inner]
    found = []
    if head:
        found += [((first, *o), (1, *s)) for o, s in flat_boxes(shape[1:], head, row)]
        first += 1
    if first < last:
        found.append(((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    if tail:
        found += [((last, *o), (1, *s)) for o, s in flat_boxes(shape[1:], 0, tail)]
    return found


def flat_offset(box: Box, whole: Sequence[int]) -> int:
    """Index of the first element of ``box`` in row-major memory of shape ``whole``."""
    index = 0
    for first, size in zip(box[0], whole, strict=True):
        index = index * size + first
    return index


def relative(box: Box, origin: Sequence[int]) -> Box:
    """The same box with offsets counted from ``origin``."""
    return tuple(a - b for a, b in zip(box[0], origin, strict=True)), box[1]
