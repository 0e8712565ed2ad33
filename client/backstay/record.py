"""Frozen dataclasses to JSON objects and back, for the local protocol, the files on tmpfs and the coder's jobs.

Field names are kept as they are (the proto3 JSON mapping accepts them), unknown fields are ignored so that version N
reads N-1 and N+1, missing fields take their defaults. Must not know any particular record.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import types
import typing
from typing import Any, TypeVar

from backstay.errors import IntegrityError, UsageError

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """Turn a record (dataclass), enum, tuple, list, dict or scalar into plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    return value


def from_json(cls: type[T], value: Any) -> T:
    """Build a ``cls`` from plain JSON values.

    Raises:
        IntegrityError: if the value does not have the record's shape.
    """
    try:
        return typing.cast("T", _build(cls, value))
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError, UsageError) as error:
        raise IntegrityError(f"not a valid {getattr(cls, '__name__', cls)}: {error}", reason="bad_record") from error


def dumps(value: Any) -> bytes:
    """Canonical JSON bytes of a record: sorted keys, no blanks; equal records give equal bytes."""
    return json.dumps(to_json(value), sort_keys=True, separators=(",", ":")).encode()


def loads(cls: type[T], data: bytes | str) -> T:
    """Inverse of :func:`dumps`; raises IntegrityError on anything malformed."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"not a valid {cls.__name__}: {error}", reason="bad_record") from error
    return from_json(cls, value)


@functools.cache
def _field_types(cls: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _build(kind: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise TypeError(f"expected an object, found {type(value).__name__}")
        fields = _field_types(typing.cast("Any", kind))
        return typing.cast("Any", kind)(**{name: _build(fields[name], value[name]) for name in fields if name in value})
    origin = typing.get_origin(kind)
    arguments = typing.get_args(kind)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"expected a list, found {type(value).__name__}")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_build(arguments[0], item) for item in value)
        return tuple(_build(kind_, item) for kind_, item in zip(arguments, value, strict=True))
    if origin is dict:
        if not isinstance(value, dict):
            raise TypeError(f"expected an object, found {type(value).__name__}")
        return {key: _build(arguments[1], item) for key, item in value.items()}
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        (inner,) = (a for a in arguments if a is not type(None))
        return _build(inner, value)
    if kind is Any:
        return value
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind(value)
    if kind is float and isinstance(value, int):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"expected {kind.__name__}, found {type(value).__name__}")
    return value
