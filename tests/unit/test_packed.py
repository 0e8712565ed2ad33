"""A tool's nested state as tensors and JSON, and back, without pickle."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch

from backstay.errors import IntegrityError, UsageError
from backstay.trainer.state import packing


class Scaler:
    def __init__(self, scale: float) -> None:
        self.scale, self.window = scale, [1, 2]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scaler) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


def take(value: Any) -> tuple[str, Any] | None:
    return ("Scaler", vars(value)) if isinstance(value, Scaler) else None


def give(kind: str, body: Any) -> Any:
    assert kind == "Scaler"
    made = Scaler(0.0)
    made.__dict__.update(body)
    return made


STATE: dict[str, Any] = {
    "weights": collections.OrderedDict(a=torch.randn(3, 5).t(), b=torch.arange(7, dtype=torch.bfloat16)),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "scaler": Scaler(2.0),
    "nested": [(1, Scaler(3.0)), {"none": None, "shape": torch.Size([2, 3])}],
    7: {"int keys": True},
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b and type(a) is type(b))


def test_a_state_comes_back_from_its_tensors_and_from_a_file() -> None:
    made = packing.pack(STATE, take)
    assert made.tensors["state.weights.a"].data_ptr() == STATE["weights"]["a"].data_ptr(), "tensors are not copied"
    assert same(packing.unpack(made.tensors, give), STATE)
    data = packing.as_file(made)
    assert same(packing.unpack(packing.from_file(memoryview(data)), give), STATE)


def test_the_file_is_an_ordinary_safetensors_file() -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    data = packing.as_file(packing.pack(STATE, take))
    assert torch.equal(safetensors.load(bytes(data))["state.weights.a"], STATE["weights"]["a"])


def test_tensors_come_back_where_they_are_wanted() -> None:
    found = packing.unpack(packing.pack({"a": torch.ones(2)}, take).tensors, give, device="meta")
    assert found["a"].device.type == "meta"


def test_what_would_need_pickle_is_refused_by_its_path() -> None:
    with pytest.raises(UsageError, match=r"state\.nested\.0\.1 is a .*can only be stored by pickle"):
        packing.pack(STATE, lambda value: None if isinstance(value, Scaler) and value.scale == 3.0 else take(value))
    with pytest.raises(UsageError, match="reserved"):
        packing.pack({"x": {"backstay.object": 1}}, take)


def test_a_damaged_file_is_refused() -> None:
    data = packing.as_file(packing.pack({"a": torch.ones(2)}, take))
    with pytest.raises(IntegrityError):
        packing.from_file(memoryview(data)[:-1])
    with pytest.raises(IntegrityError, match="without its JSON"):
        packing.unpack({}, give)
