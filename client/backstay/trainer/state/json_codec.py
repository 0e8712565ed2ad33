"""Non-tensor state as JSON with tags, tensors apart; there and back without pickle.

Dicts with text keys, lists, text, numbers and None are themselves; everything else is an object with one ``$`` key.
Must not guess: what has no tag is refused with the path to it.
"""

from __future__ import annotations

import base64
import collections
import io
import json
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from backstay.errors import IntegrityError, UsageError
from backstay.trainer import raw_memory

STATE_FORMAT: Final = 1  # of the document that a rank's state.json holds
_MAX_DEPTH = 64


def encode(value: Any, path: str, tensors: dict[str, torch.Tensor], names: Mapping[int, str] | None = None) -> Any:
    """JSON form of ``value``; tensors in it are put into ``tensors`` under their path.

    Args:
        value: What a ``state_dict()`` gave.
        path: Dotted name of ``value``, for messages and for the names of its tensors.
        tensors: Receives path → tensor (the living one, not a copy).
        names: id of a tensor that is captured by itself → its name; a reference by name is stored then.

    Raises:
        UsageError: for a value that would need pickle, naming the path and its type.
    """
    return _encode(value, path, _Found(tensors, names or {}, {}), 0)


def decode(value: Any, tensors: Mapping[str, torch.Tensor], named: Mapping[str, torch.Tensor] | None = None) -> Any:
    """Inverse of :func:`encode`; raises IntegrityError for a missing tensor or an unknown tag.

    Args:
        value: The encoded value.
        tensors: By path, the tensors it refers to.
        named: By name, the tensors it refers to that were captured by themselves.
    """
    return _decode(value, _Known(tensors, named or {}, {}))


def _decode(value: Any, known: _Known) -> Any:
    if isinstance(value, list):
        return [_decode(item, known) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next((key for key in value if key.startswith("$")), None)
    if tag is None:
        return {key: _decode(item, known) for key, item in value.items()}
    return _decode_tagged(tag, value, known)


class _Found(NamedTuple):
    tensors: dict[str, torch.Tensor]
    names: Mapping[int, str]
    encoded: dict[int, Any]  # by id of a tensor: one object in two places stays one


class _Known(NamedTuple):
    tensors: Mapping[str, torch.Tensor]
    named: Mapping[str, torch.Tensor]
    decoded: dict[str, torch.Tensor]  # by path


def tensor_paths(value: Any) -> set[str]:
    """Paths of the tensors that an encoded value refers to."""
    if isinstance(value, list):
        return {path for item in value for path in tensor_paths(item)}
    if not isinstance(value, dict):
        return set()
    if "$tensor" in value:
        return {value["$tensor"]}
    return {path for item in value.values() for path in tensor_paths(item)}


def is_same(left: Any, right: Any) -> bool:
    """Whether two decoded values are equal, tensors and arrays by their bytes, numbers that are none included."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        is_alike = left.shape == right.shape and left.dtype == right.dtype
        return is_alike and bool(torch.equal(_bytes_of(left), _bytes_of(right)))
    if isinstance(left, dict):
        is_alike = len(left) == len(right) and all(a is b or is_same(a, b) for a, b in zip(left, right, strict=True))
        return is_alike and all(is_same(a, b) for a, b in zip(left.values(), right.values(), strict=True))
    if isinstance(left, (list, tuple, collections.deque)):
        return len(left) == len(right) and all(is_same(a, b) for a, b in zip(left, right, strict=True))
    if hasattr(left, "tobytes"):
        return bool(left.tobytes() == right.tobytes())
    return bool(left == right or (left != left and right != right))


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def dumps(value: Any) -> bytes:
    """JSON bytes of an encoded value, keys in their order (dict order is state)."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def loads(data: bytes | memoryview) -> Any:
    """Inverse of :func:`dumps`, blanks at the end allowed."""
    try:
        return json.loads(bytes(data))
    except ValueError as error:
        raise IntegrityError(
            f"state in the shard is not JSON: {error}; nothing was loaded from it", reason="bad_state"
        ) from error


def _encode(value: Any, path: str, found: _Found, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise UsageError(
            f"{path} is nested more than {_MAX_DEPTH} deep; it cannot be stored", reason="unsupported_state"
        )
    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        return value if -(2**63) <= value < 2**64 else {"$int": str(value)}
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, torch.Tensor):
        return _encode_tensor(value, path, found)
    if kind in (dict, collections.OrderedDict, collections.defaultdict, collections.Counter):
        return _encode_dict(value, path, found, depth)
    if kind in (list, tuple) and _are_integers(value):  # Python's generator has 625 of them
        return list(value) if kind is list else {"$tuple": list(value)}
    if kind is list:
        return [_encode(item, f"{path}.{index}", found, depth + 1) for index, item in enumerate(value)]
    if kind in (tuple, set, frozenset, collections.deque):
        items = sorted(value, key=repr) if kind in (set, frozenset) else value
        body: dict[str, Any] = {
            f"${kind.__name__}": [
                _encode(item, f"{path}.{index}", found, depth + 1) for index, item in enumerate(items)
            ]
        }
        if kind is collections.deque:
            body["maxlen"] = value.maxlen
        return body
    return _encode_special(value, path)


def _encode_tensor(value: torch.Tensor, path: str, found: _Found) -> Any:
    if id(value) in found.names:
        return {"$named": found.names[id(value)]}
    if id(value) in found.encoded:
        return found.encoded[id(value)]
    problem = raw_memory.why_not_stored(value._local_tensor if isinstance(value, DTensor) else value)
    if problem:
        raise UsageError(f"{path} {problem}", reason="unsupported_tensor")
    while path in found.tensors:
        path += "'"  # {"a": {"b": …}, "a.b": …} and {1: …, "1": …} would share a name
    found.tensors[path] = value.detach()
    encoded: dict[str, Any] = {
        "$tensor": path,
        "device": value.device.type,
        "parameter": isinstance(value, torch.nn.Parameter),
    }
    if not isinstance(value, DTensor) and (strides := raw_memory.unusual_strides(value)):
        encoded["stride"] = strides
    found.encoded[id(value)] = encoded
    return encoded


def _are_integers(items: Sequence[Any]) -> bool:
    """Whether all are integers that JSON takes as they are."""
    return set(map(type, items)) == {int} and min(items) >= -(2**63) and max(items) < 2**64


def _encode_dict(value: dict[Any, Any], path: str, found: _Found, depth: int) -> Any:
    if type(value) is dict and all(type(key) is str and not key.startswith("$") for key in value):
        return {key: _encode(item, f"{path}.{key}", found, depth + 1) for key, item in value.items()}
    kind = "OrderedDict" if isinstance(value, collections.OrderedDict) else "dict"
    if isinstance(value, collections.Counter):
        kind = "Counter"
    elif isinstance(value, collections.defaultdict) and value.default_factory is not None:
        kind = f"defaultdict:{getattr(value.default_factory, '__name__', '')}"
        if value.default_factory not in (int, float, list, dict, set, str):
            raise _refusal(value.default_factory, path + " (default factory)")
    odd = [key for key in value if isinstance(key, torch.Tensor) and id(key) not in found.names]
    if odd:
        raise UsageError(
            f"{path} has a tensor of shape {tuple(odd[0].shape)} as a key, which means nothing in another process: use "
            "names or numbers as keys",
            reason="unsupported_state",
        )
    pairs = [
        [_encode(key, f"{path}.key{index}", found, depth + 1), _encode(item, f"{path}.{key}", found, depth + 1)]
        for index, (key, item) in enumerate(value.items())
    ]
    body = {"$dict": pairs, "kind": kind}
    versions = module_versions(value)
    if versions is not None:
        body["metadata"] = _encode(versions, f"{path}.metadata", found, depth + 1)
    return body


def module_versions(value: Any) -> Any:
    """What ``Module.state_dict()`` attaches to its result: each module's version, by which loading knows what to convert."""
    return getattr(value, "_metadata", None) if isinstance(value, collections.OrderedDict) else None


def _encode_special(value: Any, path: str) -> Any:
    kind = type(value)
    if kind in (bytes, bytearray):
        return {f"${kind.__name__}": base64.b64encode(value).decode()}
    if kind is complex:
        return {"$complex": [repr(value.real), repr(value.imag)]}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"$device": str(value)}
    if kind is torch.Size:
        return {"$size": list(value)}
    if isinstance(value, pathlib.PurePath):
        return {"$path": str(value)}
    encoded = _encode_numpy(value)
    return encoded if encoded is not None else _encode_by_torch(value, path)


def _encode_numpy(value: Any) -> Any:
    numpy = sys.modules.get("numpy")
    if numpy is None or not (type(value) is numpy.ndarray or isinstance(value, numpy.generic)):
        return None  # a subclass has more than its elements: the mask of a masked array
    array = numpy.asarray(value)
    if array.dtype.hasobject or array.dtype.fields is not None:
        return None
    data = base64.b64encode(numpy.ascontiguousarray(array).tobytes()).decode()
    return {
        "$ndarray": data,
        "dtype": array.dtype.str,
        "shape": list(array.shape),
        "scalar": isinstance(value, numpy.generic),
    }


def _encode_by_torch(value: Any, path: str) -> Any:
    """Bytes that ``torch.load(weights_only=True)`` accepts (its allow-listed classes), else a refusal."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception as error:
        raise _refusal(value, path) from error
    return {"$torch": base64.b64encode(buffer.getvalue()).decode()}


def _refusal(value: Any, path: str) -> UsageError:
    kind = type(value)
    return UsageError(
        f"{path} is a {kind.__module__}.{kind.__qualname__}, which can only be stored by pickle; backstay stores dicts, lists, "
        "tuples, numbers, text, bytes, arrays and tensors: return those from state_dict(), or use an optimizer of those",
        reason="unsupported_state",
    )


def _decode_tagged(tag: str, value: dict[str, Any], known: _Known) -> Any:
    body = value[tag]
    if tag == "$tensor":
        return _decode_tensor(value, known)
    if tag == "$named":
        if body not in known.named:
            raise IntegrityError(f"state refers to {body!r}, which is not here", reason="missing_tensor")
        return known.named[body]
    sequences: dict[str, Any] = {"$tuple": tuple, "$set": set, "$frozenset": frozenset}
    if tag in sequences:
        return sequences[tag](_decode(item, known) for item in body)
    if tag == "$deque":
        return collections.deque((_decode(item, known) for item in body), maxlen=value.get("maxlen"))
    if tag == "$dict":
        return _decode_dict(value, known)
    if tag == "$ndarray":
        np = _numpy()
        array = np.frombuffer(base64.b64decode(body), dtype=np.dtype(value["dtype"])).reshape(value["shape"]).copy()
        return array[()] if value["scalar"] else array
    if tag == "$torch":
        return torch.load(io.BytesIO(base64.b64decode(body)), weights_only=True)
    simple = _SIMPLE.get(tag)
    if simple is None:
        raise IntegrityError(
            f"state has the unknown tag {tag!r}; it was written by a newer version", reason="bad_state"
        )
    return simple(body)


def _numpy() -> Any:
    try:
        import numpy as np
    except ModuleNotFoundError as error:
        raise IntegrityError(
            "the snapshot has numpy arrays and this environment has no numpy; nothing was loaded: pip install numpy",
            reason="missing_package",
        ) from error
    return np


def _decode_tensor(value: dict[str, Any], known: _Known) -> torch.Tensor:
    path = value["$tensor"]
    if path in known.decoded:
        return known.decoded[path]
    if path not in known.tensors:
        raise IntegrityError(f"state refers to tensor {path!r}, which is not in the snapshot", reason="missing_tensor")
    tensor = known.tensors[path]
    if value["device"] != "cpu" and tensor.device.type == "cpu":
        tensor = tensor.to(value["device"])
    if "stride" in value and not isinstance(tensor, DTensor):  # kernels round by them: another order is another sum
        laid = torch.empty_strided(tensor.shape, value["stride"], dtype=tensor.dtype, device=tensor.device)
        tensor = laid.copy_(tensor)
    known.decoded[path] = torch.nn.Parameter(tensor) if value["parameter"] else tensor
    return known.decoded[path]


def _decode_dict(value: dict[str, Any], known: _Known) -> Any:
    pairs = [(_decode(key, known), _decode(item, known)) for key, item in value["$dict"]]
    kind, _, factory = value["kind"].partition(":")
    if kind == "defaultdict":
        factories: dict[str, Any] = {"int": int, "float": float, "list": list, "dict": dict, "set": set, "str": str}
        return collections.defaultdict(factories[factory], pairs)
    if kind == "Counter":
        return collections.Counter(dict(pairs))
    if kind != "OrderedDict":
        return dict(pairs)
    decoded: Any = collections.OrderedDict(pairs)
    if "metadata" in value:
        decoded._metadata = _decode(value["metadata"], known)
    return decoded


_SIMPLE: dict[str, Any] = {
    "$int": int,
    "$float": float,
    "$bytes": base64.b64decode,
    "$bytearray": lambda body: bytearray(base64.b64decode(body)),
    "$complex": lambda body: complex(float(body[0]), float(body[1])),
    "$dtype": lambda body: getattr(torch, body),
    "$device": torch.device,
    "$size": torch.Size,
    "$path": pathlib.PurePath,
}
