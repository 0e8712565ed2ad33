"""A nested state of any tool as named tensors and one JSON document, and back; also as one safetensors file in memory.

What is neither tensor nor plain value goes through the tool's own two functions, or is refused by its path. No pickle.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from backstay.errors import IntegrityError, UsageError
from backstay.format import shard
from backstay.trainer import raw_memory
from backstay.trainer.state import json_codec

DOCUMENT: Final = "json"  # name of the tensor that holds the JSON document
ROOT: Final = "state"
_MARK: Final = "backstay.object"

# Gives (kind, what is kept of it) for a value it knows, else None; and the inverse.
Take = Callable[[Any], tuple[str, Any] | None]
Give = Callable[[str, Any], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """``tensors`` are the living ones, by name, with the JSON document among them (:data:`DOCUMENT`)."""

    tensors: dict[str, torch.Tensor]

    def layout(self, metadata: Mapping[str, str] | None = None) -> shard.Layout:
        """Where each tensor lies in a file of all; ``metadata``: own keys of its header."""
        specs = [
            shard.TensorSpec.whole(name, str(tensor.dtype), tuple(tensor.shape))
            for name, tensor in self.tensors.items()
        ]
        return shard.plan_layout(specs, metadata=metadata)


def pack(value: Any, take: Take, *, name: str = ROOT) -> Packed:
    """Take ``value``, called ``name`` in messages, apart; tensors are not copied.

    Raises:
        UsageError: for a value that is neither plain nor one that ``take`` knows, naming its path.
    """
    tensors: dict[str, torch.Tensor] = {}
    document = json_codec.encode(_mark(value, take, name), name, tensors)
    for path, tensor in tensors.items():
        if problem := raw_memory.why_not_stored(tensor):  # a DTensor, which the codec leaves to whoever captures
            raise UsageError(f"{path} {problem}: of a DTensor, store its full_tensor()", reason="bad_tensor")
    text = bytearray(json_codec.dumps(document))
    return Packed(tensors={**tensors, DOCUMENT: torch.frombuffer(text, dtype=torch.uint8)})


def unpack(tensors: Mapping[str, torch.Tensor], give: Give, *, device: str | None = None) -> Any:
    """Inverse of :func:`pack`; raises IntegrityError for what is missing or unknown.

    Args:
        device: Where tensors are put; None: on the kind of device they were on.
    """
    if DOCUMENT not in tensors:
        raise IntegrityError("a packed state without its JSON document; nothing was loaded", reason="missing_tensor")
    with raw_memory.lent(tensors[DOCUMENT]) as view:
        document = json_codec.loads(view)
    if device is not None:
        _place(document, device)
    return _unmark(json_codec.decode(document, tensors), give)


def as_file(packed: Packed) -> bytearray:
    """A safetensors file of everything: the one copy, after which the caller may change the tensors."""
    layout = packed.layout()
    data = bytearray(layout.size_bytes)
    data[: layout.header_bytes] = layout.header
    target, whole = memoryview(data), torch.frombuffer(data, dtype=torch.uint8)
    with torch.no_grad():
        for entry in layout.entries:
            source = packed.tensors[entry.name]
            if raw_memory.is_plain_memory(source):  # as bytes: torch copies no elements of some dtypes
                with raw_memory.lent(source) as view:
                    target[entry.begin : entry.end] = view
            else:
                whole[entry.begin : entry.end].view(source.dtype).reshape(source.shape).copy_(source)
    return data


def from_file(data: memoryview) -> dict[str, torch.Tensor]:
    """The tensors of such a file, in memory of their own; raises IntegrityError for anything else."""
    layout = shard.parse_header(data)
    tensors = {}
    for entry in layout.entries:
        dtype = getattr(torch, entry.torch_dtype.removeprefix("torch."))
        tensor = tensors[entry.name] = torch.empty(entry.shape[: len(entry.offsets)], dtype=dtype, device="cpu")
        with raw_memory.lent(tensor) as view:
            view[:] = data[entry.begin : entry.end]
    return tensors


def _mark(value: Any, take: Take, path: str) -> Any:
    """``value`` with everything that ``take`` knows replaced by a marked dictionary; the same object if nothing is."""
    kind = type(value)
    if kind in (dict, collections.OrderedDict):
        if _MARK in value:
            raise UsageError(f"{path} has the key {_MARK!r}, which is reserved", reason="unsupported_state")
        items = {key: _mark(item, take, f"{path}.{key}") for key, item in value.items()}
        is_same = all(items[key] is item for key, item in value.items())
        return value if is_same else _like(value, items)
    if kind in (list, tuple):
        found = [_mark(item, take, f"{path}.{index}") for index, item in enumerate(value)]
        return value if all(a is b for a, b in zip(found, value, strict=True)) else kind(found)
    taken = take(value)
    if taken is None:
        return value
    name, body = taken
    return {_MARK: name, "body": _mark(body, take, path)}


def _like(value: Any, items: dict[Any, Any]) -> Any:
    """A dictionary of the kind of ``value`` with other items, and with the versions of modules where it has them."""
    made = type(value)(items)
    versions = json_codec.module_versions(value)
    if versions is not None:
        made._metadata = versions
    return made


def _unmark(value: Any, give: Give) -> Any:
    kind = type(value)
    if kind in (dict, collections.OrderedDict):
        if _MARK in value:
            return give(value[_MARK], _unmark(value["body"], give))
        return _like(value, {key: _unmark(item, give) for key, item in value.items()})
    if kind in (list, tuple):
        return kind(_unmark(item, give) for item in value)
    return value


def _place(document: Any, device: str) -> None:
    """Have every tensor of an encoded document put on ``device``."""
    if isinstance(document, dict):
        if "$tensor" in document:
            document["device"] = device
            return
        for item in document.values():
            _place(item, device)
    elif isinstance(document, list):
        for item in document:
            _place(item, device)
