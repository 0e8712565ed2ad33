"""The shape of optimizers' state, described and given back without stepping an optimizer.

Tensors travel as tensors; this is what lies around them: which keys each parameter has, of what kind, and the hyper-parameters.
Must not decide what state fits where: ``backstay.restore.optimizers`` does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from backstay.errors import IntegrityError
from backstay.trainer import nested_optimizers, raw_memory
from backstay.trainer.local_tensors import Holdings, States, optimizer_prefix
from backstay.trainer.restore_in_place import settle
from backstay.trainer.state import json_codec

METADATA_KEY: Final = "backstay.optimizers"

# One key of one parameter's state: [key, kind, dtype, device, shape, placements]. Kinds: "value" (in the JSON state), "plain"
# and "distributed" (tensors). ``shape`` None: the parameter's (its local part's for "plain"); ``placements`` None: its own.
KeySchema = list[Any]


def describe(
    optimizers: Sequence[torch.optim.Optimizer], holdings: Holdings, states: Sequence[States] | None = None
) -> str:
    """Static description for the shard's header: class, parameters of each group, and the schema of each parameter's state.

    ``states`` stand in for the optimizers' own (a restore that is not yet applied).
    """
    described = []
    for index, optimizer in enumerate(optimizers):
        state_of: Mapping[torch.Tensor, Any] = optimizer.state if states is None else states[index]
        schemas: dict[str, int] = {}
        of: dict[str, int] = {}
        groups = []
        distributed = []
        strides: list[Any] = []
        for group in optimizer.param_groups:
            groups.append([holdings.names[id(p)] for p in group["params"]])
            for parameter in group["params"]:
                found = state_of.get(parameter)
                if isinstance(parameter, DTensor):
                    distributed.append(holdings.names[id(parameter)])
                if isinstance(found, dict) and found:
                    schema = json.dumps([_describe_key(key, value, parameter) for key, value in found.items()])
                    of[holdings.names[id(parameter)]] = schemas.setdefault(schema, len(schemas))
                    strides += _unusual_strides(holdings.names[id(parameter)], parameter, found)
        body: dict[str, Any] = {"class": type(optimizer).__name__, "groups": groups}
        body |= {"schemas": [json.loads(schema) for schema in schemas], "of": of}
        if any(key[1] == "plain" and key[4] for schema in body["schemas"] for key in schema):
            body["distributed"] = distributed
        if strides:
            body["strides"] = strides
        described.append(body)
    return json.dumps(described, separators=(",", ":"))


def read_values(
    optimizers: Sequence[torch.optim.Optimizer], holdings: Holdings, tensors: dict[str, torch.Tensor]
) -> list[dict[str, Any]]:
    """JSON of what changes besides the parameters' tensors: hyper-parameters, scalar state, state of no parameter."""
    encoded = []
    for index, optimizer in enumerate(optimizers):
        path = f"~{optimizer_prefix(index, len(optimizers))}"
        names = holdings.names
        known = holdings.living_names
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        values: dict[str, Any] = {}
        other: dict[Any, Any] = {}
        by_key: dict[Any, Any] = optimizer.state  # keys may be other things than parameters
        for key, found in by_key.items():
            if not isinstance(key, torch.Tensor):
                other[key] = found
                continue
            kept = {k: v for k, v in found.items() if not isinstance(v, torch.Tensor)}
            if kept and id(key) in names:  # else of a parameter that was replaced: no step reads it again
                values[names[id(key)]] = kept
        body = {
            "groups": json_codec.encode(groups, f"{path}.groups", tensors, known),
            "values": json_codec.encode(values, f"{path}.values", tensors, known),
            "other": json_codec.encode(other, f"{path}.other", tensors, known),
            "frozen": [names[id(p)] for g in optimizer.param_groups for p in g["params"] if not p.requires_grad],
        }
        if nested_optimizers.has_own_state_dict(optimizer):
            held = {nested_optimizers.address(t) for t in (*(t.local for t in holdings.tensors), *tensors.values())}
            beyond = nested_optimizers.read_beyond(path.removeprefix("~"), optimizer, held)
            body["beyond"] = json_codec.encode(beyond, f"{path}.beyond", tensors, known)
        encoded.append(body)
    return encoded


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """One optimizer's state besides the tensors of its parameters, decoded.

    ``scalars``: name of a parameter → key → value. ``other``: state of no parameter. ``groups``: hyper-parameters of
    each group. ``beyond``: attributes that the optimizer's own ``state_dict()`` shows.
    """

    scalars: Mapping[str, Mapping[Any, Any]]
    other: Mapping[Any, Any]
    groups: Sequence[Mapping[str, Any]]
    beyond: Mapping[str, Any]


def attach(
    optimizers: Sequence[torch.optim.Optimizer], holdings: Holdings, states: Sequence[States], values: Sequence[Values]
) -> None:
    """Give verified ``states`` and values to the optimizers in place of all state they had; dictionaries, lists and tensors of
    the same form are filled, not replaced."""
    for optimizer, made, stored in zip(optimizers, states, values, strict=True):
        former: dict[Any, Any] = dict(optimizer.state)
        optimizer.state.clear()
        for parameter, keys in made.items():
            scalars = stored.scalars.get(holdings.names[id(parameter)], {})
            whole = {key: scalars.get(key) if value is None else value for key, value in keys.items()}
            optimizer.state[parameter] = settle(former.get(parameter), whole)
        for key, value in stored.other.items():
            optimizer.state[key] = settle(former.get(key), value)
        for group, hyper in zip(optimizer.param_groups, stored.groups, strict=True):
            for key, value in hyper.items():
                group[key] = settle(group.get(key), value)  # in place: a captured CUDA graph reads this very tensor
        nested_optimizers.write_beyond(optimizer, stored.beyond)


def _unusual_strides(name: str, parameter: torch.Tensor, found: Mapping[Any, Any]) -> list[Any]:
    """[name, key, strides] of tensors whose memory format a restore would not choose by itself."""
    own = parameter._local_tensor if isinstance(parameter, DTensor) else parameter
    listed = []
    for key, value in found.items():
        if isinstance(value, torch.Tensor):
            local = value._local_tensor if isinstance(value, DTensor) else value
            strides = raw_memory.unusual_strides(local, own if local.shape == own.shape else None)
            if strides is not None:
                listed.append([name, key, strides])
    return listed


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
