"""What a capture puts into a slot: every dtype and shape, every kind of state, each byte and digest right."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from backstay.capture import shard_plan
from backstay.capture.byte_check import changed_tensors
from backstay.capture.capture import Capture
from backstay.capture.fill import Filler
from backstay.errors import UsageError
from backstay.format import shard
from backstay.format.digest import verify_chunks
from backstay.trainer import local_tensors
from backstay.trainer.raw_memory import Mapping
from backstay.trainer.state import json_codec
from tests.kit.wording import refuses

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8,
    torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64, torch.complex128, torch.complex32,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="backstay-trainer-", dir="/dev/shm") as name:
        yield Path(name)


def make_plan(model: nn.Module, *optimizers: torch.optim.Optimizer, rank: int = 0) -> shard_plan.Plan:
    holdings = local_tensors.collect(model, optimizers, rank=rank)
    return shard_plan.build(holdings, rank=rank, dynamic={}, state=b"{}", metadata={})


def fill(made: shard_plan.Plan, path: Path, *, threads: int = 2) -> tuple[Mapping, Capture]:
    """Capture into a fresh file and check every digest against the bytes in it."""
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, made.layout.size_bytes)
    fd = os.open(path, os.O_RDWR)
    slot = Mapping(fd, is_writable=True, size_bytes=made.layout.size_bytes)
    os.close(fd)
    made.stage({}, b"{}")
    capture = Capture(made, 1, is_checked=True, ready=None)
    assert capture.begin(slot)
    filler = Filler(rank=0, thread_count=threads)
    digests = filler.fill(capture, slot)
    filler.close()
    manifest = shard.build_manifest(
        made.layout, run="default/r", attempt=1, step=1, rank=0, world_size=1, world_id="w",
        chunk_crcs=digests.chunk_crcs, tensor_crcs=digests.tensor_crcs,
    )  # fmt: skip
    verify_chunks(slot.view(), manifest, 0)
    assert capture.state == "copied"
    return slot, capture


class Zoo(nn.Module):
    """A buffer of every dtype, in odd sizes and strides."""

    def __init__(self) -> None:
        super().__init__()
        for index, dtype in enumerate(DTYPES):
            raw = torch.randint(0, 2, (7, 5), generator=torch.Generator().manual_seed(index))
            name = str(dtype).removeprefix("torch.")
            self.register_buffer(f"b_{name}", raw.to(dtype))
            self.register_buffer(f"scalar_{name}", raw[0, 0].to(dtype))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("turned", torch.arange(20.0).reshape(4, 5).t())
        self.register_buffer("conjugate", torch.complex(torch.rand(3), torch.rand(3)).conj())
        self.register_buffer("forgotten", torch.rand(3), persistent=False)
        self.turned_parameter = nn.Parameter(torch.rand(6, 300).t())


def test_every_dtype_shape_and_stride_arrives_bit_for_bit(directory: Path) -> None:
    model = Zoo()
    slot, _ = fill(make_plan(model), directory / "shard")
    layout = shard.parse_header(slot.view())
    names = {entry.name for entry in layout.entries}
    assert "model.forgotten" not in names
    for name, tensor in model.state_dict().items():
        entry = layout.entry(f"model.{name}")
        found = slot.tensor(entry.begin, entry.end, tensor.dtype, tuple(tensor.shape))
        left, right = (t.resolve_conj().contiguous().reshape(-1).view(torch.uint8) for t in (found, tensor))
        assert torch.equal(left, right), name


def test_a_captured_shard_opens_with_plain_safetensors(directory: Path) -> None:
    model = nn.Linear(33, 17)
    fill(make_plan(model), directory / "shard")
    with safe_open(str(directory / "shard"), framework="pt") as file:
        assert torch.equal(file.get_tensor("model.weight"), model.weight)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_shard_of_many_windows_is_whole_whatever_the_number_of_threads(directory: Path, threads: int) -> None:
    model = nn.ParameterList([nn.Parameter(torch.rand(400_001)) for _ in range(5)])
    slot, capture = fill(make_plan(model), directory / "shard", threads=threads)
    for index, parameter in enumerate(model):
        entry = capture.plan.layout.entry(f"model.{index}")
        assert torch.equal(slot.tensor(entry.begin, entry.end, torch.float32, (400_001,)), parameter)


def test_tied_weights_are_stored_once_and_named_as_alias() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    model["head"].weight = model["embed"].weight
    made = make_plan(model)
    assert [entry.name for entry in made.layout.entries if "weight" in entry.name] == ["model.embed.weight"]
    assert made.layout.aliases == {"model.head.weight": "model.embed.weight"}


def test_state_that_an_optimizer_shares_between_parameters_makes_no_other_layout() -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters())
    fresh = local_tensors.collect(model, [optimizer], rank=0)
    shared = torch.zeros(256)
    for parameter in model.parameters():
        optimizer.state[parameter]["map"] = shared
    trained = local_tensors.collect(model, [optimizer], rank=0)
    assert trained.aliases == {"optimizer.state.bias.map": "optimizer.state.weight.map"}
    assert local_tensors.layout_signature(trained) == local_tensors.layout_signature(fresh)
    assert local_tensors.model_signature(trained) == local_tensors.model_signature(fresh)


def test_an_update_that_nothing_announced_is_seen_by_its_bytes(directory: Path) -> None:
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.rand(2, 100)).sum().backward()
    optimizer.step()
    _, capture = fill(make_plan(model, optimizer), directory / "shard")
    assert changed_tensors(capture) == []
    before = model[1].weight._version
    model[1].weight.data[3, 4] += 1.0
    optimizer.state[model[0].bias]["exp_avg"].data[0] += 1.0
    assert model[1].weight._version == before
    assert sorted(changed_tensors(capture)) == ["model.1.weight", "optimizer.state.0.bias.exp_avg"]


def test_replicas_divide_what_they_share_into_boxes_without_gap_or_overlap() -> None:
    tensors = [torch.rand(rows, 5) for rows in (1, 2, 3, 7, 4001, 9000)] + [
        torch.rand(()),
        torch.empty(0, 4),
        torch.rand(50_000),
    ]
    for count in (2, 3, 5):
        held = [
            local_tensors.LocalTensor(
                name=f"model.{i}", living=t, local=t, offsets=(0,) * t.ndim, global_shape=tuple(t.shape),
                replicas=tuple(range(10, 10 + count)), is_eager=False, owner={}, key=0,
            )
            for i, t in enumerate(tensors)
        ]  # fmt: skip
        sizes = []
        parts: dict[str, list[tuple[int, int]]] = {}
        for rank in range(10, 10 + count):
            boxes = shard_plan.own_boxes(held, rank=rank)
            sizes.append(sum(box.numel() for _, box, _ in boxes))
            for tensor, box, offsets in boxes:
                begin = offsets[0] if offsets else 0
                parts.setdefault(tensor.name, []).append((begin, begin + (box.shape[0] if box.ndim else 1)))
        for tensor in held:
            position = 0
            for begin, end in sorted(parts[tensor.name]):
                assert begin == position
                position = end
            assert position == (tensor.local.shape[0] if tensor.local.ndim else 1)
        assert max(sizes) - min(sizes) <= 20_000, sizes  # a small tensor and a row or so


def test_the_plan_notices_what_moved_appeared_or_was_replaced() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    holdings = local_tensors.collect(model, [optimizer], rank=0)
    assert holdings.is_current()
    model(torch.rand(3, 4)).sum().backward()
    assert holdings.is_current()
    optimizer.step()
    assert not holdings.is_current(), "momentum buffers appeared"
    for change in ("data", "replace", "state", "strides", "order", "number", "dtype"):
        optimizer.state[model[0].bias]["average"] = 0.5
        holdings = local_tensors.collect(model, [optimizer], rank=0)
        assert holdings.is_current()
        if change == "data":
            model[0].weight.data = model[0].weight.data.clone()
        elif change == "replace":
            model[1] = nn.BatchNorm1d(4)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        elif change == "state":
            optimizer.load_state_dict(optimizer.state_dict())
        elif change == "strides":
            model[0].weight.data = model[0].weight.data.t()
        elif change == "order":
            optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][::-1]
        elif change == "number":
            optimizer.state[model[0].bias]["average"] = torch.tensor(0.5)
        else:
            model.double()
        assert not holdings.is_current(), change


def test_collecting_neither_steps_the_optimizer_nor_draws_random_numbers() -> None:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    before, weight = torch.get_rng_state(), model.weight.clone()
    make_plan(model, optimizer)
    assert not optimizer.state
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model.weight, weight)


def test_wrappers_leave_no_trace_in_names() -> None:
    inner = nn.Sequential(nn.Linear(2, 2))
    names = {t.name for t in local_tensors.collect(torch.compile(inner), [], rank=0).tensors}
    assert names == {"model.0.weight", "model.0.bias"}


def test_things_that_are_private_to_a_rank_carry_its_number() -> None:
    names = {t.name for t in local_tensors.collect(nn.BatchNorm1d(2), [], rank=3).tensors}
    assert "rank-00003.model.running_mean" in names


def test_what_cannot_be_stored_is_refused_by_name() -> None:
    with refuses(UsageError, "unsupported_tensor", "model.weight"):
        make_plan(nn.Linear(2, 2, device="meta"))
    with pytest.raises(UsageError, match=r"model\.weight .*forward"):
        make_plan(nn.LazyLinear(2))


VALUES = [
    None, True, 3, -(2**70), 1.5, float("inf"), "text", b"\x00\xff", (1, [2, (3,)]), {1: "a", (2, 3): "b"}, {"$x": 1}, {1, 2},
    complex(1, -2), torch.float16, torch.Size([1, 2]), random.Random(3).getstate(), {"a": {"b": [None]}},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_plain_state_goes_through_json_and_back(value: object) -> None:
    found = json_codec.decode(json_codec.loads(json_codec.dumps(json_codec.encode(value, "extra", {})) + b"   "), {})
    assert found == value
    assert type(found) is type(value)


def test_arrays_and_nan_go_through_json_and_back() -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(6, dtype=numpy.int16).reshape(2, 3)
    tensors: dict[str, torch.Tensor] = {}
    encoded = json_codec.encode({"a": array, "n": float("nan"), "t": torch.ones(2)}, "x", tensors)
    found = json_codec.decode(json_codec.loads(json_codec.dumps(encoded)), tensors)
    assert (found["a"] == array).all()
    assert found["a"].dtype == array.dtype
    assert found["n"] != found["n"]
    assert list(tensors) == ["x.t"]


def test_state_that_needs_pickle_is_refused_with_its_path() -> None:
    with pytest.raises(UsageError, match=r"loader\.inner\.1 is a .*Odd.*pickle"):
        json_codec.encode({"inner": [1, Odd()]}, "loader", {})


class Odd:
    """A class of the user's own."""
