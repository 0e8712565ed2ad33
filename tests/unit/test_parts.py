"""Parts of one model seen as the whole they were cut from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from backstay.adapters.pipeline_parts import merge_parts
from backstay.errors import UsageError


def whole(*layers: str) -> nn.Module:
    part = nn.Module()
    part.add_module("layers", nn.ModuleDict({name: nn.Sequential(nn.Linear(2, 2)) for name in layers}))
    part.register_buffer("scratch", torch.ones(1), persistent=False)
    return part


def test_one_part_is_itself() -> None:
    part = whole("0")
    assert merge_parts([part]) is part


def test_tensors_keep_their_names_and_identity() -> None:
    parts = [whole("0", "3"), whole("1", "2")]
    merged = merge_parts(parts)
    expected = {name: parameter for part in parts for name, parameter in part.named_parameters()}
    found = dict(merged.named_parameters())
    assert found.keys() == expected.keys()
    assert all(found[name] is parameter for name, parameter in expected.items())
    assert not list(merged.buffers()), "what is not persistent is no state"


def test_a_module_that_two_parts_share_is_there_once() -> None:
    shared = nn.Linear(2, 2)
    parts = [nn.ModuleDict({"embedding": shared}), nn.ModuleDict({"embedding": shared, "head": nn.Linear(2, 2)})]
    assert {name for name, _ in merge_parts(parts).named_parameters()} == {
        "embedding.weight",
        "embedding.bias",
        "head.weight",
        "head.bias",
    }


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(UsageError, match=r"layers\.0\.0\.weight"):
        merge_parts([whole("0"), whole("0")])
    with pytest.raises(UsageError):
        merge_parts([])
