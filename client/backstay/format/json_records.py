"""Frozen dataclasses to JSON objects and back, for the local protocol, the files on tmpfs and the coder's jobs.

Field names are kept as they are (the proto3 JSON mapping accepts them), unknown fields are ignored so that version N
reads N-1 and N+1, missing fields take their defaults. What protobuf could not carry is refused: numbers that are not finite
or need more than 64 bits, text that is not Unicode. Must not know any particular record.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import math
import operator
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from backstay.errors import IntegrityError, UsageError

T = TypeVar("T")
_INT64_MIN, _INT64_MAX = -(1 << 63), (1 << 63) - 1
_PLAIN = frozenset((str, int, float, bool, type(None)))
_Fields = tuple[tuple[str, ...], Callable[[Any], Any]]
_fields: dict[type[Any], _Fields] = {}


def to_json(value: Any) -> Any:
    """Turn a record (dataclass), enum, tuple, list, dict or scalar into plain JSON values."""
    kind = type(value)
    if kind in _PLAIN:  # first, and below without a call each: a manifest has thousands of them
        return value
    if kind is tuple or kind is list:
        return [item if type(item) in _PLAIN else to_json(item) for item in value]
    if kind is dict:
        return {key: item if type(item) in _PLAIN else to_json(item) for key, item in value.items()}
    fields = _fields.get(kind) or _learn_fields(kind)
    if fields:
        names, read = fields
        found = dict(zip(names, read(value), strict=True))
        for name, item in found.items():
            if type(item) not in _PLAIN:
                found[name] = to_json(item)
        return found
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return to_json(list(value))
    return to_json(dict(value)) if isinstance(value, dict) else value


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


def _learn_fields(kind: type[Any]) -> _Fields | None:
    """Names of a dataclass's fields and what reads all of them at once; None for anything else."""
    if not dataclasses.is_dataclass(kind):
        return None
    names = tuple(field.name for field in dataclasses.fields(kind))
    if len(names) > 1:
        read: Callable[[Any], Any] = operator.attrgetter(*names)
    else:  # attrgetter gives one value, not a tuple of one
        read = lambda value: [getattr(value, name) for name in names]  # noqa: E731
    return _fields.setdefault(kind, (names, read))


def _build(kind: Any, value: Any) -> Any:
    return _builder(kind)(value)


@functools.cache
def _builder(kind: Any) -> Callable[[Any], Any]:
    """The function that builds a ``kind`` from JSON; made once per type, because a manifest has thousands of values."""
    if dataclasses.is_dataclass(kind):
        return _dataclass_builder(typing.cast("type[Any]", kind))
    origin = typing.get_origin(kind)
    arguments = typing.get_args(kind)
    if origin is tuple:
        return _tuple_builder(arguments)
    if origin is dict:
        return _dict_builder(_builder(arguments[1]))
    if origin in (typing.Union, types.UnionType):
        (inner,) = (a for a in arguments if a is not type(None))
        build = _builder(inner)
        return lambda value: None if value is None else build(value)
    if kind is Any:
        return lambda value: value
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind
    return _scalar_builder(kind)


def _dataclass_builder(kind: type[Any]) -> Callable[[Any], Any]:
    hints = typing.get_type_hints(kind)
    fields = [(f.name, hints[f.name]) for f in dataclasses.fields(kind)]
    builders: list[tuple[str, Callable[[Any], Any]]] = []  # filled at first use: a record may contain its own kind

    def build(value: Any) -> Any:
        if not isinstance(value, dict):
            raise TypeError(f"expected an object, found {type(value).__name__}")
        if not builders:
            builders.extend([(name, _builder(hint)) for name, hint in fields])
        return kind(**{name: field(value[name]) for name, field in builders if name in value})

    return build


def _tuple_builder(arguments: tuple[Any, ...]) -> Callable[[Any], Any]:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        item = _builder(arguments[0])
        return lambda value: tuple([item(part) for part in _a_list(value)])
    items = [_builder(argument) for argument in arguments]
    return lambda value: tuple([build(part) for build, part in zip(items, _a_list(value), strict=True)])


def _a_list(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):  # text and objects can be iterated over, too
        raise TypeError(f"expected a list, found {type(value).__name__}")
    return value


def _dict_builder(item: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: {key: item(part) for key, part in value.items()}


def _scalar_builder(kind: Any) -> Callable[[Any], Any]:
    if kind is int:
        return _an_integer
    if kind is str:
        return _a_text

    def build(value: Any) -> Any:
        found = type(value)
        if found is not kind:
            if kind is float and found is int:
                return float(value)
            if not isinstance(value, kind):
                raise _another_type(kind, value)
        if kind is float and not math.isfinite(value):
            raise ValueError(f"{value} is no number")
        return value

    return build


def _an_integer(value: Any) -> Any:
    if type(value) is not int:  # a bool is an int to isinstance
        raise _another_type(int, value)
    if not _INT64_MIN <= value <= _INT64_MAX:
        raise ValueError("a number does not fit in 64 bits")
    return value


def _a_text(value: Any) -> Any:
    if not isinstance(value, str):
        raise _another_type(str, value)
    if not value.isascii():
        value.encode()  # raises for half a surrogate pair
    return value


def _another_type(kind: Any, value: Any) -> TypeError:
    return TypeError(f"expected {kind.__name__}, found {type(value).__name__}")
