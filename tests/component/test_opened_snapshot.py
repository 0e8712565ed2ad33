"""Reading parts of snapshots: any cut of any tensor, only the chunks it needs, each verified, none twice."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from backstay.errors import IntegrityError, SnapshotNotFoundError
from backstay.format.manifest import CHUNK_BYTES
from backstay.format.shard import STORAGE_RULES
from backstay.restore.snapshot import ReadTarget
from tests.kit.stored import Stored, open_stored, raw_bytes, whole


def rows(tensor: torch.Tensor, sizes: list[int], dim: int = 0) -> list[Stored]:
    """``tensor`` cut along ``dim`` into parts of these sizes."""
    parts, begin = [], 0
    for size in sizes:
        offsets = tuple(begin if d == dim else 0 for d in range(tensor.ndim))
        parts.append((tensor.narrow(dim, begin, size), offsets, tuple(tensor.shape)))
        begin += size
    assert begin == tensor.shape[dim]
    return parts


def target(name: str, tensor: torch.Tensor, *offsets: int) -> ReadTarget:
    return ReadTarget(name=name, tensor=tensor, offsets=offsets)


def test_four_row_shards_become_three_with_hardly_a_byte_more_than_needed(tmp_path: Path) -> None:
    value = torch.randn(12_000, 512)
    opened, source, _ = open_stored(tmp_path, [{"w": part} for part in rows(value, [3000] * 4)])
    with opened:
        for rank in range(3):
            part = torch.empty(4000, 512)
            fetched, needed = opened.fetched_bytes, opened.needed_bytes
            opened.read([target("w", part, 4000 * rank, 0)])
            assert torch.equal(part, value[4000 * rank : 4000 * (rank + 1)])
            assert opened.needed_bytes - needed == 4000 * 512 * 4
            assert opened.fetched_bytes - fetched <= 1.05 * 4000 * 512 * 4
    assert len(source.fetched) == len(set(source.fetched)), "no chunk was fetched twice"


def test_columns_of_long_rows_take_only_their_chunks(tmp_path: Path) -> None:
    value = torch.randn(6, 1_000_000)
    opened, source, _ = open_stored(tmp_path, [{"w": part} for part in rows(value, [3, 3])])
    part = torch.empty(6, 100_000)
    with opened:
        opened.read([target("w", part, 0, 300_000)])
    assert torch.equal(part, value[:, 300_000:400_000])
    assert len(source.fetched) <= 6 * 3, "two or three chunks for each of six rows of 400 kB, of 92 in all"


def test_random_cuts_of_all_dtypes_come_back_bit_for_bit(tmp_path: Path) -> None:
    dice = random.Random(7)
    tensors: dict[str, torch.Tensor] = {}
    for index, name in enumerate(sorted(STORAGE_RULES)):
        shape = [(), (7,), (9, 40), (5, 6, 7), (2, 3, 0), (3, 130, 5, 4)][index % 6]
        dtype = getattr(torch, name.removeprefix("torch."), None)
        if dtype is None:
            continue
        size = STORAGE_RULES[name].item_bytes
        count = size * int(torch.tensor(shape).prod()) if shape else size
        raw = torch.tensor(
            [dice.randrange(2 if name == "torch.bool" else 256) for _ in range(count)], dtype=torch.uint8
        )
        tensors[name] = raw.view(dtype).view(shape)
    ranks: list[dict[str, Stored]] = [{} for _ in range(3)]
    for name, tensor in tensors.items():
        if tensor.ndim == 0 or tensor.numel() == 0:
            ranks[dice.randrange(3)][name] = whole(tensor)
            continue
        dim = dice.randrange(tensor.ndim)
        cut = sorted(dice.randrange(tensor.shape[dim] + 1) for _ in range(2))
        for rank, part in enumerate(rows(tensor, [cut[0], cut[1] - cut[0], tensor.shape[dim] - cut[1]], dim)):
            ranks[rank][name] = part
    opened, _, _ = open_stored(tmp_path, ranks)
    with opened:
        for name, tensor in tensors.items():
            assert raw_bytes(opened.read_tensor(name)) == raw_bytes(tensor), name
            for _ in range(8):
                offsets = [dice.randrange(size) if size else 0 for size in tensor.shape]
                shape = [
                    dice.randint(1, size - o) if size else 0 for size, o in zip(tensor.shape, offsets, strict=True)
                ]
                expected = tensor
                for dim, (offset, size) in enumerate(zip(offsets, shape, strict=True)):
                    expected = expected.narrow(dim, offset, size)
                part = torch.empty(shape[::-1], dtype=tensor.dtype).permute(list(reversed(range(len(shape)))))
                if dice.random() < 0.5:
                    part = torch.empty(shape, dtype=tensor.dtype)
                opened.read([target(name, part, *offsets)])
                assert raw_bytes(part) == raw_bytes(expected), (name, offsets, shape)


def test_two_targets_of_the_same_bytes_and_overlapping_ones_are_all_filled(tmp_path: Path) -> None:
    value = torch.arange(1_000_000, dtype=torch.float32).reshape(1000, 1000)
    opened, source, _ = open_stored(tmp_path, [{"w": part} for part in rows(value, [400, 600])])
    one, two, three = torch.empty(1000, 1000), torch.empty(1000, 1000), torch.empty(500, 10)
    with opened:
        opened.read([target("w", one, 0, 0), target("w", two, 0, 0), target("w", three, 250, 17)])
    assert torch.equal(one, value)
    assert torch.equal(two, value)
    assert torch.equal(three, value[250:750, 17:27])
    assert len(source.fetched) == len(set(source.fetched))


def test_copies_of_the_same_box_are_read_from_one_of_them(tmp_path: Path) -> None:
    value = torch.randn(100, 100)
    opened, _, _ = open_stored(tmp_path, [{"w": whole(value)}, {"w": whole(value)}, {"w": rows(value, [50, 50])[1]}])
    part = torch.zeros(100, 100)
    with opened:
        opened.read([target("w", part, 0, 0)])
        assert opened.needed_bytes == 40_000
    assert torch.equal(part, value)


def test_expanded_and_conjugated_targets_are_filled(tmp_path: Path) -> None:
    value = torch.arange(3, dtype=torch.float32).reshape(3, 1).expand(3, 5)
    numbers = torch.randn(4, dtype=torch.complex64)
    opened, _, _ = open_stored(tmp_path, [{"e": whole(value), "c": whole(numbers)}])
    expanded, conjugated = torch.empty(3, 1).expand(3, 5), torch.empty(4, dtype=torch.complex64).conj()
    with opened:
        opened.read([target("e", expanded, 0, 0), target("c", conjugated, 0)])
    assert torch.equal(expanded, value)
    assert torch.equal(conjugated, numbers)


def test_aliases_names_and_metadata(tmp_path: Path) -> None:
    state = torch.tensor(list(json.dumps({"format": 1}).encode()), dtype=torch.uint8)
    opened, _, _ = open_stored(
        tmp_path, [{"w": whole(torch.ones(3)), "rank-00000.state.json": whole(state)}],
        metadata={"mine": "yes"}, aliases={"v": "w"},
    )  # fmt: skip
    with opened:
        assert opened.names() == ("rank-00000.state.json", "w")
        assert torch.equal(opened.read_tensor("v"), torch.ones(3))
        assert opened.metadata(0) == {"mine": "yes"}
        assert opened.read_state(0) == {"format": 1}
        assert opened.tensor("w").shape == (3,)
        with pytest.raises(SnapshotNotFoundError, match="no tensor 'x' among its 2"):
            opened.tensor("x")


def test_what_does_not_fit_is_named_before_a_byte_is_written(tmp_path: Path) -> None:
    value = torch.randn(10, 4)
    opened, source, _ = open_stored(tmp_path, [{"w": rows(value, [4, 6])[0], "fine": whole(value)}])
    fine = torch.zeros(10, 4)
    cases = {
        "x is not in the snapshot": target("x", torch.empty(3), 0),
        r"w is torch.float32 in the snapshot, torch.float64 here": target(
            "w", torch.empty(2, 4, dtype=torch.float64), 0, 0
        ),
        r"w has shape \(10, 4\) in the snapshot": target("w", torch.empty(2, 5), 0, 0),
        r"w: 24 of the 40 elements at \(0, 0\) of \(10, 4\) are in no shard": target("w", torch.empty(10, 4), 0, 0),
    }
    with opened:
        for message, wrong in cases.items():
            with pytest.raises(IntegrityError, match=message + ".*nothing was loaded"):
                opened.read([target("fine", fine, 0, 0), wrong])
        assert not fine.any()
        assert not source.fetched


def test_a_flipped_byte_is_found_in_header_direct_and_copied_bytes(tmp_path: Path) -> None:
    value = torch.randn(1000, 200)
    for place in (100, 500_000):
        for destination in (torch.empty(1000, 200), torch.empty(1000, 100)):
            again, _, paths = open_stored(tmp_path, [{"w": whole(value)}])
            data = bytearray(paths[0].read_bytes())
            data[place] ^= 1
            paths[0].write_bytes(data)
            read = again.metadata if place < 4096 else again.read
            argument: Any = 0 if place < 4096 else [target("w", destination, 0, 0)]
            with again, pytest.raises(IntegrityError, match=f"chunk {place // CHUNK_BYTES} "):
                read(argument)
