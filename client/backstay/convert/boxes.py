"""Putting a tensor together from boxes of its bytes. Plain memory, no torch.

Bound: one slice copy per run of bytes that is contiguous in both the box and the whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from backstay.errors import IntegrityError
from backstay.manifest import TensorEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """``shape`` elements at ``offsets`` of a whole tensor."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def overlaps(self, other: Box) -> bool:
        pairs = zip(self.offsets, self.shape, other.offsets, other.shape, strict=True)
        return bool(self.count and other.count) and all(a < b + m and b < a + n for a, n, b, m in pairs)


def stored_box(entry: TensorEntry) -> Box:
    """The box of an entry in its stored form: stored dtypes may have dimensions after the tensor's own."""
    return Box(offsets=(*entry.offsets, *(0 for _ in trailing(entry))), shape=entry.shape)


def trailing(entry: TensorEntry) -> tuple[int, ...]:
    """Dimensions of the stored form that the tensor itself lacks (a complex number as two floats)."""
    return entry.shape[len(entry.offsets) :]


def whole_shape(entry: TensorEntry) -> tuple[int, ...]:
    """Shape of the whole tensor in its stored form."""
    return (*entry.global_shape, *trailing(entry))


def item_bytes(entry: TensorEntry) -> int:
    """Bytes of one stored element; 0 for an empty entry."""
    count = math.prod(entry.shape)
    return (entry.end - entry.begin) // count if count else 0


def place(part: memoryview, box: Box, whole: memoryview, shape: Sequence[int], *, item: int) -> None:
    """Copy the row-major bytes of ``box`` to their places in the row-major bytes of a tensor of ``shape``."""
    if box.count == 0:
        return
    split = len(shape)  # dimensions from here on are contiguous in both
    while split > 0 and (split == len(shape) or box.shape[split] == shape[split]):
        split -= 1
    run = math.prod(box.shape[split:]) * item
    strides = [math.prod(shape[dim + 1 :]) * item for dim in range(len(shape))]
    first = sum(offset * stride for offset, stride in zip(box.offsets, strides, strict=True))
    position = 0
    for index in itertools.product(*(range(size) for size in box.shape[:split])):
        begin = first + sum(i * stride for i, stride in zip(index, strides, strict=False))
        whole[begin : begin + run] = part[position : position + run]
        position += run


def choose_cover(name: str, boxes: Iterable[Box], shape: Sequence[int]) -> list[int]:
    """Indexes of boxes that make up the whole tensor, each element once.

    Raises:
        IntegrityError: elements are missing, or two boxes that differ overlap.
    """
    chosen: list[tuple[int, Box]] = []
    for index, box in enumerate(boxes):
        if any(box == other for _, other in chosen) or box.count == 0:
            continue
        clash = next((other for _, other in chosen if box.overlaps(other)), None)
        if clash is not None:
            raise IntegrityError(
                f"{name}: the parts at {box.offsets} {box.shape} and at {clash.offsets} {clash.shape} overlap; not used",
                reason="layout_mismatch",
            )
        chosen.append((index, box))
    count = sum(box.count for _, box in chosen)
    if count != math.prod(shape):
        raise IntegrityError(
            f"{name}: the snapshot has {count} of {math.prod(shape)} elements; not used", reason="layout_mismatch"
        )
    return [index for index, _ in chosen]
