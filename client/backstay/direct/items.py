"""What DCP planned for one rank, as tensors of its shard: names are DCP's fqns, boxes are its chunks, objects are bytes.

An object is stored as torch saved it, behind its length, in a uint8 tensor ``rank-00003.bytes.<fqn>`` with room to grow; only
what ``torch.load(weights_only=True)`` accepts is written or read. Must not talk to the daemon.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from backstay import shard
from backstay.errors import IntegrityError, UsageError
from backstay.trainer import memory

_BYTES_NAME: Final = re.compile(r"rank-(\d{5,})\.bytes\.(.*)", re.DOTALL)
_GRAIN_BYTES: Final = 512
_LENGTH: Final = struct.Struct("<Q")


@dataclass(slots=True)
class Found:
    """One rank's part of a save. ``sources`` has every tensor, ``payloads`` those of them that are objects, both by name."""

    specs: dict[str, shard.TensorSpec] = field(default_factory=dict)
    sources: dict[str, torch.Tensor] = field(default_factory=dict)
    payloads: dict[str, torch.Tensor] = field(default_factory=dict)
    sizes: dict[MetadataIndex, int] = field(default_factory=dict)

    def size_of(self, item: WriteItem) -> int:
        return self.sizes[item.index]

    def add(self, spec: shard.TensorSpec, source: torch.Tensor) -> None:
        if spec.name in self.specs:
            raise UsageError(
                f"this rank holds two parts of {spec.name!r}; a shard has one part of each tensor: save DTensors "
                "(FSDP2) instead of ShardedTensors with several local shards",
                reason="duplicate_tensor",
            )
        self.specs[spec.name], self.sources[spec.name] = spec, source


def resolve(plan: SavePlan, planner: SavePlanner, *, rank: int, capacities: Mapping[str, int]) -> Found:
    """The tensors and objects behind a plan.

    Args:
        rank: Whose they are: objects may differ from rank to rank.
        capacities: Sizes that objects had in the save before; kept where they still fit, so that the layout stays.

    Raises:
        UsageError: something cannot be stored, by name.
    """
    found = Found()
    for item in plan.items:
        data: Any = planner.resolve_data(item)
        if item.type is WriteItemType.BYTE_IO:
            name = bytes_name(rank, item.index.fqn)
            packed = _pack(bytes(data.getbuffer()), item.index.fqn, capacities.get(name, 0))
            found.add(shard.TensorSpec.whole(name, "torch.uint8", packed.shape), packed)
            found.payloads[name] = packed
            found.sizes[item.index] = packed.numel()
        else:
            found.add(_spec(item, data), data.detach())
            found.sizes[item.index] = memory.byte_count(data)
    return found


def layout_of(found: Found) -> shard.Layout:
    return shard.plan_layout(found.specs.values())


def unpack(packed: bytearray, fqn: str) -> bytes:
    """The object's bytes, made anew from what is safe to load: what DCP unpickles then is our own writing.

    Raises:
        IntegrityError: not such bytes, or a type that ``weights_only`` does not accept.
    """
    (length,) = _LENGTH.unpack(packed[: _LENGTH.size]) if len(packed) >= _LENGTH.size else (1 << 62,)
    if _LENGTH.size + length > len(packed):
        raise IntegrityError(f"{fqn}: {len(packed)} bytes that hold no object; not used", reason="bad_state")
    try:
        value = torch.load(io.BytesIO(memoryview(packed)[_LENGTH.size : _LENGTH.size + length]), weights_only=True)
    except Exception as error:
        raise IntegrityError(
            f"{fqn} is of a type that is not loaded: {str(error)[:300]}; if you trust it, allow it by "
            "torch.serialization.add_safe_globals before loading",
            reason="unsafe_object",
        ) from error
    again = io.BytesIO()
    torch.save(value, again)
    return again.getvalue()


def bytes_name(rank: int, fqn: str) -> str:
    return f"rank-{rank:05d}.bytes.{fqn}"


def object_of(name: str) -> tuple[int, str] | None:
    """Rank and fqn of a stored object; None for the name of a tensor."""
    found = _BYTES_NAME.fullmatch(name)
    return (int(found.group(1)), found.group(2)) if found else None


def _spec(item: WriteItem, data: torch.Tensor) -> shard.TensorSpec:
    name, planned = item.index.fqn, item.tensor_data
    why = memory.why_not_stored(data)
    if why:
        raise UsageError(f"{name} {why}", reason="bad_tensor")
    if object_of(name):
        raise UsageError(f"a tensor cannot be called {name!r}: objects are stored under such names")
    if planned is None or tuple(data.shape) != tuple(planned.chunk.sizes):
        raise UsageError(f"{name}: planned as {planned}, found with shape {tuple(data.shape)}", reason="bad_tensor")
    return shard.TensorSpec(name, str(data.dtype), tuple(data.shape), tuple(planned.chunk.offsets), tuple(planned.size))


def _pack(data: bytes, fqn: str, capacity: int) -> torch.Tensor:
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:
        raise UsageError(
            f"{fqn} cannot be saved: {str(error)[:300]}. Only tensors and plain types are stored: convert it, or allow its "
            "type on saving and loading by torch.serialization.add_safe_globals",
            reason="unsafe_object",
        ) from error
    needed = _LENGTH.size + len(data)
    if needed > capacity:
        capacity = -(-(needed + needed // 4) // _GRAIN_BYTES) * _GRAIN_BYTES
    return torch.frombuffer(bytearray((_LENGTH.pack(len(data)) + data).ljust(capacity, b"\0")), dtype=torch.uint8)
