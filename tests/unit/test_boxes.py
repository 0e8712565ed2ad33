"""Arithmetic of boxes, against index sets."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from backstay.format import boxes
from backstay.format.boxes import Box

SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


@st.composite
def whole_and_boxes(draw: st.DrawFn, box_count: int) -> tuple[tuple[int, ...], list[Box]]:
    whole = draw(SHAPES)
    found = []
    for _ in range(box_count):
        offsets = tuple(draw(st.integers(0, size - 1)) for size in whole)
        shape = tuple(draw(st.integers(1, size - offset)) for size, offset in zip(whole, offsets, strict=True))
        found.append((offsets, shape))
    return whole, found


def indices(box: Box) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(o, o + n) for o, n in zip(*box, strict=True))))


def flat(index: tuple[int, ...], whole: tuple[int, ...]) -> int:
    position = 0
    for i, size in zip(index, whole, strict=True):
        position = position * size + i
    return position


@given(whole_and_boxes(2))
def test_what_two_boxes_share_and_what_is_left_are_exact_and_disjoint(case: tuple[tuple[int, ...], list[Box]]) -> None:
    _, (one, other) = case
    common = boxes.intersect(one, other)
    assert (indices(common) if common else set()) == indices(one) & indices(other)
    if common is not None:
        left = boxes.subtract(one, common)
        assert set().union(*map(indices, left)) == indices(one) - indices(common)
        assert sum(boxes.count(shape) for _, shape in left) == len(indices(one)) - len(indices(common))


@given(whole_and_boxes(1), st.sampled_from([1, 2, 8]), st.sampled_from([1, 3, 16, 1000]))
def test_byte_runs_hold_the_box_and_no_long_gap(case: tuple[tuple[int, ...], list[Box]], item: int, gap: int) -> None:
    whole, (box,) = case
    wanted = {flat(index, whole) * item + byte for index in indices(box) for byte in range(item)}
    runs = boxes.byte_runs(box, whole, item, gap_bytes=gap)
    read = [byte for begin, end in runs for byte in range(begin, end)]
    assert read == sorted(set(read))
    assert wanted <= set(read)
    for (_, end), (begin, _) in itertools.pairwise(runs):
        assert begin - end >= gap
    for begin, end in runs:
        holes = [b for a, b in itertools.pairwise(sorted(wanted & set(range(begin, end)))) if b - a > gap]
        assert not holes
        assert begin in wanted
        assert end - 1 in wanted


@given(SHAPES, st.data())
def test_flat_boxes_are_the_elements_in_a_range_and_few(shape: tuple[int, ...], data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, math.prod(shape)))
    end = data.draw(st.integers(begin, math.prod(shape)))
    found = boxes.flat_boxes(shape, begin, end)
    positions = [sorted(flat(index, shape) for index in indices(box)) for box in found]
    assert [p for part in positions for p in part] == list(range(begin, end))
    assert len(found) <= 2 * len(shape) + 1
    assert [boxes.flat_offset(box, shape) for box in found] == [part[0] for part in positions]


def test_a_huge_column_is_one_run_as_its_gaps_hold_no_chunk() -> None:
    assert boxes.byte_runs(((0, 10), (10_000_000, 10)), (10_000_000, 100), 4, gap_bytes=1 << 18) == [
        (40, (10_000_000 - 1) * 400 + 80)
    ]
