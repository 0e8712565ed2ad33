"""The shape of optimizers' state, and state made anew on a fresh optimizer without stepping it.

Tensors travel as tensors; this is what lies around them: which keys each parameter has, of what kind, and the hyper-parameters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from backstay.errors import IntegrityError
from backstay.trainer import state
from backstay.trainer.sources import Holdings, optimizer_prefix

METADATA_KEY: Final = "backstay.optimizers"

# One key of one parameter's state: [key, kind, dtype, device, shape, placements]. Kinds: "value" (in the JSON state), "plain"
# and "distributed" (tensors). ``shape`` None: the parameter's (its local part's for "plain"); ``placements`` None: its own.
KeySchema = list[Any]


def describe(optimizers: Sequence[torch.optim.Optimizer], holdings: Holdings) -> str:
    """Static description for the shard's header: parameters of each group, and the schema of each parameter's state."""
    described = []
    for optimizer in optimizers:
        schemas: dict[str, int] = {}
        of: dict[str, int] = {}
        groups = []
        for group in optimizer.param_groups:
            groups.append([holdings.names[id(p)] for p in group["params"]])
            for parameter in group["params"]:
                found = optimizer.state.get(parameter)
                if isinstance(found, dict) and found:
                    schema = json.dumps([_describe_key(key, value, parameter) for key, value in found.items()])
                    of[holdings.names[id(parameter)]] = schemas.setdefault(schema, len(schemas))
        described.append({"groups": groups, "schemas": [json.loads(schema) for schema in schemas], "of": of})
    return json.dumps(described, separators=(",", ":"))


def read_values(
    optimizers: Sequence[torch.optim.Optimizer], holdings: Holdings, tensors: dict[str, torch.Tensor]
) -> list[dict[str, Any]]:
    """JSON of what changes and is no tensor of a parameter: hyper-parameters, scalar state, state of no parameter."""
    encoded = []
    for index, optimizer in enumerate(optimizers):
        path = f"~{optimizer_prefix(index, len(optimizers))}"
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        values: dict[str, Any] = {}
        other: dict[Any, Any] = {}
        by_key: dict[Any, Any] = optimizer.state  # keys may be other things than parameters
        for key, found in by_key.items():
            if not isinstance(key, torch.Tensor):
                other[key] = found
                continue
            kept = {k: v for k, v in found.items() if not isinstance(v, torch.Tensor)}
            if kept and id(key) in holdings.names:  # else of a parameter that was replaced: no step reads it again
                values[holdings.names[id(key)]] = kept
        encoded.append(
            {
                "groups": state.encode(groups, f"{path}.groups", tensors),
                "values": state.encode(values, f"{path}.values", tensors),
                "other": state.encode(other, f"{path}.other", tensors),
            }
        )
    return encoded


def make_states(
    optimizers: Sequence[torch.optim.Optimizer], holdings: Holdings, description: str
) -> list[dict[torch.Tensor, dict[Any, Any]]]:
    """State dictionaries as the snapshot has them: tensors of the optimizer where they fit, new ones elsewhere.

    Nothing is attached to the optimizers yet. "value" keys hold None until :func:`apply`.

    Raises:
        IntegrityError: if optimizers, groups or parameters are not those of the snapshot.
    """
    described = json.loads(description)
    if len(described) != len(optimizers):
        raise IntegrityError(
            f"the snapshot has {len(described)} optimizers, this Snapshotter has {len(optimizers)}; nothing was loaded",
            reason="wrong_optimizers",
        )
    states = []
    for index, (optimizer, stored) in enumerate(zip(optimizers, described, strict=True)):
        _check_groups(
            index, [[holdings.names[id(p)] for p in g["params"]] for g in optimizer.param_groups], stored["groups"]
        )
        made: dict[torch.Tensor, dict[Any, Any]] = {}
        for fqn, schema in stored["of"].items():
            parameter = _parameter(optimizer, holdings, fqn)
            existing = optimizer.state.get(parameter) or {}
            made[parameter] = {key[0]: _make(key, parameter, existing.get(key[0])) for key in stored["schemas"][schema]}
        states.append(made)
    return states


def apply(
    optimizers: Sequence[torch.optim.Optimizer],
    holdings: Holdings,
    states: Sequence[Mapping[torch.Tensor, dict[Any, Any]]],
    encoded: Sequence[Mapping[str, Any]],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Attach verified ``states`` and the decoded values to the optimizers; replaces all state they had."""
    for optimizer, made, body in zip(optimizers, states, encoded, strict=True):
        values = state.decode(body["values"], tensors)
        optimizer.state.clear()
        for parameter, keys in made.items():
            scalars = values.get(holdings.names[id(parameter)], {})
            optimizer.state[parameter] = {
                key: scalars.get(key) if value is None else value for key, value in keys.items()
            }
        optimizer.state.update(state.decode(body["other"], tensors))
        for group, stored in zip(optimizer.param_groups, state.decode(body["groups"], tensors), strict=True):
            for key, value in stored.items():
                if isinstance(group.get(key), torch.Tensor) and isinstance(value, torch.Tensor):
                    group[key].copy_(value)  # in place: a captured CUDA graph reads this very tensor
                else:
                    group[key] = value


def _describe_key(key: str, value: Any, parameter: torch.Tensor) -> KeySchema:
    if not isinstance(value, torch.Tensor):
        return [key, "value", None, None, None, None]
    dtype, device = str(value.dtype).removeprefix("torch."), value.device.type
    if not isinstance(value, DTensor):
        local = parameter._local_tensor if isinstance(parameter, DTensor) else parameter
        shape = None if value.shape == local.shape else list(value.shape)
        return [key, "plain", dtype, device, shape, None]
    is_like = (
        isinstance(parameter, DTensor) and value.shape == parameter.shape and value.placements == parameter.placements
    )
    placements = None if is_like else [_describe_placement(key, p) for p in value.placements]
    return [key, "distributed", dtype, device, None if is_like else list(value.shape), placements]


def _describe_placement(key: str, placement: Any) -> int:
    """-1 for Replicate, else the dimension that is sharded."""
    if isinstance(placement, Replicate):
        return -1
    if type(placement) is Shard:
        return placement.dim
    raise IntegrityError(
        f"optimizer state {key!r} has placement {placement}, unlike its parameter; it cannot be stored"
    )


def _check_groups(index: int, found: list[list[str]], expected: list[list[str]]) -> None:
    if found == expected:
        return
    ours, theirs = {n for g in found for n in g}, {n for g in expected for n in g}
    raise IntegrityError(
        f"optimizer {index} has other parameters than in the snapshot: {len(found)} groups of {[len(g) for g in found]}, "
        f"expected {len(expected)} of {[len(g) for g in expected]}; missing {sorted(theirs - ours)[:5]}, "
        f"unexpected {sorted(ours - theirs)[:5]}; nothing was loaded",
        reason="wrong_parameters",
    )


def _parameter(optimizer: torch.optim.Optimizer, holdings: Holdings, fqn: str) -> torch.Tensor:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if holdings.names[id(parameter)] == fqn:
                return parameter
    raise IntegrityError(f"the snapshot has optimizer state of {fqn!r}, which no group has; nothing was loaded")


def _make(schema: KeySchema, parameter: torch.Tensor, existing: Any) -> Any:
    key, kind, dtype_name, device_type, shape, placements = schema
    if kind == "value":
        return None
    dtype = getattr(torch, dtype_name)
    if kind == "plain":
        local = parameter._local_tensor if isinstance(parameter, DTensor) else parameter
        device = torch.device("cpu") if device_type == "cpu" else local.device
        if shape is None:
            made = torch.empty_like(local.detach(), dtype=dtype, device=device, requires_grad=False)
        else:
            made = torch.empty(shape, dtype=dtype, device=device)
        return existing if _is_like(existing, made) else made
    if not isinstance(parameter, DTensor):
        raise IntegrityError(
            f"optimizer state {key!r} is sharded in the snapshot, its parameter is not; nothing was loaded"
        )
    made = _make_distributed(parameter, dtype, shape, placements)
    return existing if _is_like(existing, made) else made


def _is_like(existing: Any, made: torch.Tensor) -> bool:
    if not isinstance(existing, torch.Tensor) or isinstance(existing, DTensor) != isinstance(made, DTensor):
        return False
    if existing.shape != made.shape or existing.dtype != made.dtype or existing.device != made.device:
        return False
    return not isinstance(made, DTensor) or (isinstance(existing, DTensor) and existing.placements == made.placements)


def _make_distributed(
    parameter: DTensor, dtype: torch.dtype, shape: list[int] | None, placements: list[int] | None
) -> DTensor:
    mesh = parameter.device_mesh
    if shape is None or placements is None:
        local = torch.empty_like(parameter._local_tensor.detach(), dtype=dtype)
        return DTensor.from_local(
            local, mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    whole = torch.Size(shape)
    chosen = [Replicate() if dim < 0 else Shard(dim) for dim in placements]
    local_shape, _ = compute_local_shape_and_global_offset(whole, mesh, chosen)
    local = torch.empty(local_shape, dtype=dtype, device=parameter._local_tensor.device)
    stride = torch.empty(whole, device="meta").stride()
    return DTensor.from_local(local, mesh, chosen, run_check=False, shape=whole, stride=stride)
