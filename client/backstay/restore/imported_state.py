"""What an imported snapshot has for this rank's optimizers: tensors by parameter name, no state of any rank.

The script's hyper-parameters, generators and extras stay as they are. Must not guess: another optimizer's state is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.distributed.tensor import DTensor

from backstay.errors import IntegrityError
from backstay.restore.optimizers import make_distributed
from backstay.restore.snapshot import OpenedSnapshot, ReadTarget
from backstay.trainer import distributed_tensors, optimizer_state
from backstay.trainer.local_tensors import Holdings

_ADAM: Final = frozenset({"step", "exp_avg", "exp_avg_sq"})
_KEYS: Final[Mapping[type, frozenset[str]]] = {  # what each keeps for a parameter, without what options add
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.SGD: frozenset({"momentum_buffer"}),
    torch.optim.Adagrad: frozenset({"step", "sum"}),
    torch.optim.RMSprop: frozenset({"step", "square_avg"}),
}
_OPTIONAL: Final = frozenset({"max_exp_avg_sq", "momentum_buffer", "grad_avg"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedPlan:
    """New state to be read into, as it is stored: by optimizer, parameter and key. ``targets``: what to read into it."""

    states: Sequence[dict[torch.Tensor, dict[str, torch.Tensor]]]
    targets: Sequence[ReadTarget]
    note: str


def stored_names(holdings: Holdings, opened: OpenedSnapshot) -> dict[str, str]:
    """Tensors here that are in the snapshot under another of their names: other tools keep one name of tied weights."""
    stored = set(opened.names())
    return {
        name: alias for alias, name in holdings.aliases.items() if name not in stored and alias in stored
    }  # fmt: skip


def plan(
    optimizers: Sequence[torch.optim.Optimizer], holdings: Holdings, opened: OpenedSnapshot, own_rank: int
) -> ImportedPlan:
    """Find the state of each parameter by its name; attaches nothing.

    Raises:
        IntegrityError: it is the state of another optimizer, or of another shape.
    """
    bodies = json.loads(opened.metadata(own_rank).get(optimizer_state.METADATA_KEY, "[]"))
    described: dict[str, list[Any]] = {
        name: body["schemas"][index] for body in bodies for name, index in body["of"].items()
    }
    renamed = stored_names(holdings, opened)
    states, targets, used, without = [], [], set(), 0
    for optimizer in optimizers:
        made: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = _name_of(parameter, holdings, renamed)
                schema = described.get(name)
                if schema is None:
                    without += 1
                    continue
                used.add(name)
                _check_keys(optimizer, name, [key[0] for key in schema])
                made[parameter] = {key[0]: _make(key, parameter, group) for key in schema}
                targets += [_target(name, key, value) for key, value in made[parameter].items()]
        states.append(made)
    return ImportedPlan(states=states, targets=targets, note=_note(len(described), len(used), without))


def settle(
    found: ImportedPlan,
    optimizers: Sequence[torch.optim.Optimizer],
    holdings: Holdings,
) -> str:
    """Give what was read to the optimizers, in place of all state they had, in their parameters' dtype as torch's
    ``load_state_dict`` does; returns its description."""
    if not found.targets:
        return ""
    for optimizer, made in zip(optimizers, found.states, strict=True):
        optimizer.state.clear()
        for parameter, keys in made.items():
            optimizer.state[parameter] = {
                key: value if key == "step" or not parameter.is_floating_point() else value.to(parameter.dtype)
                for key, value in keys.items()
            }
    return optimizer_state.describe(optimizers, holdings)


def _name_of(parameter: torch.Tensor, holdings: Holdings, renamed: Mapping[str, str]) -> str:
    """The parameter's name in the snapshot."""
    name = holdings.names[id(parameter)]
    return renamed.get(f"model.{name}", f"model.{name}").removeprefix("model.")


def _check_keys(optimizer: torch.optim.Optimizer, name: str, keys: Sequence[str]) -> None:
    expected = _KEYS.get(type(optimizer))
    if expected is None or (expected <= set(keys) and set(keys) - expected <= _OPTIONAL):
        return
    raise IntegrityError(
        f"the imported state of {name} is {sorted(keys)}, a {type(optimizer).__name__} keeps {sorted(expected)}: it is another "
        "optimizer's, and nothing was loaded. Build the optimizer it was made by, or import the model without it (from its "
        "safetensors files)",
        reason="wrong_optimizers",
    )


def _make(key: Sequence[Any], parameter: torch.Tensor, group: Mapping[str, Any]) -> torch.Tensor:
    """Memory for one key: cut like the parameter, or a scalar where the optimizer wants it."""
    name, _, dtype_name, _, shape, _ = key
    dtype = getattr(torch, dtype_name)
    if name == "step" or shape is not None:
        local = parameter._local_tensor if isinstance(parameter, DTensor) else parameter
        is_on_device = bool(group.get("capturable") or group.get("fused")) or name != "step"
        return torch.empty(tuple(shape or ()), dtype=dtype, device=local.device if is_on_device else "cpu")
    if isinstance(parameter, DTensor):
        return make_distributed(parameter, dtype, tuple(parameter.shape), None, is_same_cut=False)
    return torch.empty_like(parameter.detach(), dtype=dtype, requires_grad=False)


def _target(name: str, key: str, value: torch.Tensor) -> ReadTarget:
    stored = f"optimizer.state.{name}.{key}"
    if isinstance(value, DTensor):
        local, offsets, *_ = distributed_tensors.place_distributed(stored, value)
        return ReadTarget(name=stored, tensor=local, offsets=offsets)
    return ReadTarget(name=stored, tensor=value, offsets=(0,) * value.ndim)


def _note(stored: int, used: int, without: int) -> str:
    if not used:
        left = (
            f" (state of {stored} parameters is in the snapshot, none of which an optimizer has here)" if stored else ""
        )
        return f"imported: model loaded, optimizer fresh{left}, generators and extras untouched"
    odd = [f"{without} parameters had none"] if without else []
    odd += [f"that of {stored - used} more is left out, as no optimizer has them here"] if stored > used else []
    shown = f" ({'; '.join(odd)})" if odd else ""
    return (
        f"imported: model and optimizer state of {used} parameters loaded{shown}, hyper-parameters, generators and extras "
        "untouched"
    )
