"""What an import has for optimizers: found by parameter name, cast as torch does, refused where it is another optimizer's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from backstay.errors import IntegrityError
from backstay.format.shard import IMPORTED_KEY
from backstay.restore import load
from backstay.restore.result import Loaded
from backstay.restore.snapshot import OpenedSnapshot
from backstay.trainer import local_tensors
from backstay.trainer.optimizer_state import METADATA_KEY
from tests.kit.stored import open_stored, whole

KEYS = ("exp_avg", "exp_avg_sq", "step")


def model(seed: int, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.ModuleDict({name: nn.Linear(4, 3, dtype=dtype) for name in ("a", "b")})


def imported(
    directory: Path, value: nn.Module, keys: Sequence[str] = KEYS
) -> tuple[OpenedSnapshot, dict[str, torch.Tensor]]:
    """A snapshot as ``backstay import`` makes it, and the state in it."""
    state: dict[str, torch.Tensor] = {}
    for name, parameter in value.named_parameters():
        for key in keys:
            made = torch.tensor(7.0) if key == "step" else torch.rand(parameter.shape)
            state[f"optimizer.state.{name}.{key}"] = made
    tensors = {f"model.{name}": whole(parameter.detach()) for name, parameter in value.named_parameters()}
    tensors |= {name: whole(tensor) for name, tensor in state.items()}
    schema = [
        [key, "plain", "float32", "cpu" if key == "step" else None, [] if key == "step" else None, None] for key in keys
    ]
    names = [name for name, _ in value.named_parameters()]
    body = {"groups": [sorted(names)], "schemas": [schema], "of": dict.fromkeys(names, 0)}
    return open_stored(directory, [tensors], metadata={IMPORTED_KEY: "dcp", METADATA_KEY: json.dumps([body])})[0], state


def restore(opened: OpenedSnapshot, here: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Loaded:
    holdings = local_tensors.collect(here, optimizers, rank=0)
    target = load.Target(
        model=here, optimizers=optimizers, extra={}, rank=0, world_size=1, run="default/r",
        signature=local_tensors.model_signature(holdings),
    )  # fmt: skip
    with opened:
        return load.prepare(target, opened).load()


def test_several_optimizers_find_their_parameters_state_and_the_rest_is_said(tmp_path: Path) -> None:
    opened, state = imported(tmp_path, model(1))
    here = model(2)
    two = [torch.optim.AdamW([here["a"].weight], lr=0.3), torch.optim.Adam([here["b"].weight, here["b"].bias])]
    loaded = restore(opened, here, two)
    for optimizer, name in ((two[0], "a.weight"), (two[1], "b.weight"), (two[1], "b.bias")):
        found = optimizer.state[here.get_parameter(name)]
        assert set(found) == set(KEYS)
        assert all(torch.equal(found[key], state[f"optimizer.state.{name}.{key}"]) for key in KEYS)
    assert two[0].param_groups[0]["lr"] == 0.3
    assert "optimizer state of 3 parameters loaded (that of 1 more is left out" in loaded.result.message


def test_state_takes_the_dtype_of_its_parameter_as_load_state_dict_would_give_it(tmp_path: Path) -> None:
    opened, state = imported(tmp_path, model(1, dtype=torch.bfloat16))
    here = model(2, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(here.parameters())
    restore(opened, here, [optimizer])
    found = optimizer.state[here["a"].weight]
    assert torch.equal(found["exp_avg"], state["optimizer.state.a.weight.exp_avg"].bfloat16())
    assert found["step"].dtype == torch.float32
    for parameter in here.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert found["step"].item() == 8


def test_the_state_of_another_optimizer_is_refused_and_nothing_is_loaded(tmp_path: Path) -> None:
    for index, (make, keys) in enumerate([(torch.optim.SGD, KEYS), (torch.optim.AdamW, ("momentum_buffer",))]):
        (tmp_path / str(index)).mkdir()
        opened, _ = imported(tmp_path / str(index), model(1), keys)
        here = model(2)
        before = here["a"].weight.clone()
        optimizer = make(here.parameters(), lr=0.1)
        with pytest.raises(IntegrityError, match="another optimizer's, and nothing was loaded"):
            restore(opened, here, [optimizer])
        assert torch.equal(here["a"].weight, before)
        assert not optimizer.state
