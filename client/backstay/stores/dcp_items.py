"""What DCP planned for one rank, as tensors of its shard: names are DCP's fqns, boxes are its chunks, objects are bytes.

An object is stored as torch saved it, behind its length, in a uint8 tensor ``rank-00003.bytes.<fqn>`` with room to grow; only
what ``torch.load(weights_only=True)`` accepts is written or read. How the state was nested (DCP's planner_data) is JSON in
``rank-00003.nesting``. Must not communicate with the daemon.
"""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from backstay.errors import IntegrityError, UsageError
from backstay.format import shard
from backstay.trainer import raw_memory

_BYTES_NAME: Final = re.compile(r"rank-(\d{5,})\.bytes\.(.*)", re.DOTALL)
_NESTING_NAME: Final = re.compile(r"rank-(\d{5,})\.nesting")
_GRAIN_BYTES: Final = 512
_LENGTH: Final = struct.Struct("<Q")

Nesting = dict[str, tuple[str | int, ...]]  # fqn -> keys and indices that lead to it


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

    def add_bytes(self, name: str, data: bytes, capacity: int) -> int:
        """Add an object behind its length, in ``capacity`` bytes if it fits; returns the bytes it takes."""
        packed = self.payloads[name] = _pack(data, capacity)
        self.add(shard.TensorSpec.whole(name, "torch.uint8", packed.shape), packed)
        return packed.numel()


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
            object_bytes = _checked(bytes(data.getbuffer()), item.index.fqn, _thing_of(planner, item))
            found.sizes[item.index] = found.add_bytes(name, object_bytes, capacities.get(name, 0))
        else:
            found.add(_spec(item, data), data.detach())
            found.sizes[item.index] = raw_memory.byte_count(data)
    if _is_nesting(plan.planner_data):
        name = nesting_name(rank)
        found.add_bytes(name, json.dumps(plan.planner_data).encode(), capacities.get(name, 0))
    return found


def layout_of(found: Found) -> shard.Layout:
    return shard.plan_layout(found.specs.values())


def unpack(packed: bytearray, fqn: str) -> bytes:
    """The object's bytes, written again from what is safe to load, so that DCP unpickles only our own output.

    Raises:
        IntegrityError: not such bytes, or a type that ``weights_only`` does not accept.
    """
    try:
        value = torch.load(io.BytesIO(_unpacked(packed, fqn)), weights_only=True)
    except Exception as error:
        raise IntegrityError(
            f"{fqn} is of a type that is not loaded: {str(error)[:300]}; if you trust it, allow it by "
            "torch.serialization.add_safe_globals before loading",
            reason="unsafe_object",
        ) from error
    again = io.BytesIO()
    torch.save(value, again)
    return again.getvalue()


def unpack_nesting(packed: bytearray, name: str) -> Nesting:
    """The planner_data that a rank wrote; raises IntegrityError for anything else."""
    try:
        found = {fqn: tuple(path) for fqn, path in json.loads(bytes(_unpacked(packed, name))).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"{name} is not planner data: {error}; not used", reason="bad_state") from error
    if not _is_nesting(found):
        raise IntegrityError(f"{name} is not planner data; not used", reason="bad_state")
    return found


def nesting_name(rank: int) -> str:
    return f"rank-{rank:05d}.nesting"


def is_nesting_name(name: str) -> bool:
    return _NESTING_NAME.fullmatch(name) is not None


def bytes_name(rank: int, fqn: str) -> str:
    return f"rank-{rank:05d}.bytes.{fqn}"


def object_of(name: str) -> tuple[int, str] | None:
    """Rank and fqn of a stored object; None for the name of a tensor."""
    found = _BYTES_NAME.fullmatch(name)
    return (int(found.group(1)), found.group(2)) if found else None


def _spec(item: WriteItem, data: torch.Tensor) -> shard.TensorSpec:
    name, planned = item.index.fqn, item.tensor_data
    why = raw_memory.why_not_stored(data)
    if why:
        raise UsageError(f"{name} {why}", reason="bad_tensor")
    if object_of(name) or is_nesting_name(name):
        raise UsageError(f"a tensor cannot be called {name!r}: objects are stored under such names")
    if planned is None or tuple(data.shape) != tuple(planned.chunk.sizes):
        raise UsageError(f"{name}: planned as {planned}, found with shape {tuple(data.shape)}", reason="bad_tensor")
    return shard.TensorSpec(name, str(data.dtype), tuple(data.shape), tuple(planned.chunk.offsets), tuple(planned.size))


def _thing_of(planner: SavePlanner, item: WriteItem) -> Any:
    """The object itself, where the planner can look it up: what it resolves to are bytes."""
    look_up = getattr(planner, "lookup_object", None)
    return look_up(item.index) if look_up is not None else None


def _is_nesting(data: Any) -> bool:
    """Whether it is what DCP's default planners keep; other planners may keep anything, which is not stored."""
    return type(data) is dict and all(
        type(fqn) is str and isinstance(path, (tuple, list)) and path and all(type(key) in (str, int) for key in path)
        for fqn, path in data.items()
    )


def _checked(data: bytes, fqn: str, item: Any) -> bytes:
    """``data``, what torch saved of ``item``; raises UsageError, naming types, unless it can be read without trusting it."""
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:
        where, kind = _refused_part(item, fqn) or (fqn, type(item))
        name = f"{kind.__module__}.{kind.__qualname__}"
        raise UsageError(
            f"{where} cannot be saved: it is a {name}, and only tensors and plain types are stored. {_advice(kind, name)}",
            reason="unsafe_object",
        ) from error
    return data


def _refused_part(value: Any, path: str) -> tuple[str, type[Any]] | None:
    """Path and type of the first part of ``value`` that ``weights_only`` does not accept."""
    if isinstance(value, Mapping):
        inside = [(f"{path}.{key}", item) for key, item in value.items()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        inside = [(f"{path}.{index}", item) for index, item in enumerate(value)]
    else:
        inside = []
    for where, item in inside:
        if found := _refused_part(item, where):
            return found
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception:  # noqa: BLE001 - whatever it is: this is the part
        return path, type(value)
    return None


def _advice(kind: type[Any], name: str) -> str:
    own = (
        f"Convert it, or, if you trust it, allow {kind.__qualname__} by torch.serialization.add_safe_globals before saving and "
        "before loading"
    )
    if name == "numpy.ndarray":
        return "Save torch.from_numpy(array) or array.tolist() instead"
    if kind.__module__ == "numpy":
        return "Save its .item() instead"
    return "Save its .getvalue() instead" if name == "_io.BytesIO" else own


def _pack(data: bytes, capacity: int) -> torch.Tensor:
    needed = _LENGTH.size + len(data)
    if needed > capacity:
        capacity = -(-(needed + needed // 4) // _GRAIN_BYTES) * _GRAIN_BYTES
    return torch.frombuffer(bytearray((_LENGTH.pack(len(data)) + data).ljust(capacity, b"\0")), dtype=torch.uint8)


def _unpacked(packed: bytearray, name: str) -> memoryview:
    (length,) = _LENGTH.unpack(packed[: _LENGTH.size]) if len(packed) >= _LENGTH.size else (1 << 62,)
    if _LENGTH.size + length > len(packed):
        raise IntegrityError(f"{name}: {len(packed)} bytes that hold no object; not used", reason="bad_state")
    return memoryview(packed)[_LENGTH.size : _LENGTH.size + length]
