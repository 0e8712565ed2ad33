"""Putting a tensor together from the stored parts of it, in plain memory. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from backstay.errors import IntegrityError
from backstay.format import boxes
from backstay.format.boxes import Box
from backstay.format.manifest import TensorEntry


def stored_box(entry: TensorEntry) -> Box:
    """The box of an entry in its stored form: stored dtypes may have dimensions after the tensor's own."""
    return (*entry.offsets, *(0 for _ in _trailing(entry))), entry.shape


def whole_shape(entry: TensorEntry) -> tuple[int, ...]:
    """Shape of the whole tensor in its stored form."""
    return (*entry.global_shape, *_trailing(entry))


def item_bytes(entry: TensorEntry) -> int:
    """Bytes of one stored element; 0 for an empty entry."""
    count = math.prod(entry.shape)
    return (entry.end - entry.begin) // count if count else 0


def place(part: memoryview, box: Box, whole: memoryview, shape: Sequence[int], *, item: int) -> None:
    """Copy the row-major bytes of ``box`` to their places in those of a tensor of ``shape``: one slice for each run."""
    if boxes.count(box[1]) == 0:
        return
    position = 0
    for begin, end in boxes.byte_runs(box, shape, item, gap_bytes=1):
        whole[begin:end] = part[position : position + end - begin]
        position += end - begin


def choose_cover(name: str, parts: Iterable[Box], shape: Sequence[int]) -> list[int]:
    """Indexes of boxes that make up the whole tensor, each element once.

    Raises:
        IntegrityError: elements are missing, or two boxes that differ overlap.
    """
    chosen: list[tuple[int, Box]] = []
    for index, box in enumerate(parts):
        if any(box == other for _, other in chosen) or boxes.count(box[1]) == 0:
            continue
        clash = next((other for _, other in chosen if boxes.intersect(box, other)), None)
        if clash is not None:
            raise IntegrityError(
                f"{name}: the parts at {box[0]} {box[1]} and at {clash[0]} {clash[1]} overlap; not used",
                reason="layout_mismatch",
            )
        chosen.append((index, box))
    count = sum(boxes.count(box[1]) for _, box in chosen)
    if count != math.prod(shape):
        raise IntegrityError(
            f"{name}: the snapshot has {count} of {math.prod(shape)} elements; not used", reason="layout_mismatch"
        )
    return [index for index, _ in chosen]


def _trailing(entry: TensorEntry) -> tuple[int, ...]:
    """Dimensions of the stored form that the tensor itself lacks (a complex number as two floats)."""
    return entry.shape[len(entry.offsets) :]
