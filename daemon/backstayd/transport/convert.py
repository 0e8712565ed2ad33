"""Records of ``core`` to generated messages and back, by field name. Knows of particular records only which are worth
sharing, and which can lose a part.

A record field with a default that is not proto3's zero is ``optional`` on the wire, so that a sender of version N-1
that does not know it gives the default; unknown fields are ignored. A value of an enum that this version does not know costs
the least part of a message that stands for itself (an entry of a report, a decision), never the message, and is said once.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import logging
import types
import typing
from collections.abc import Callable, Container
from typing import Any, Final, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from backstay.errors import IntegrityError, InvariantError
from backstayd.core.messages.decisions import Decision
from backstayd.core.messages.desired import NodeDesired, RunDesired
from backstayd.core.messages.durable import StorageDesired
from backstayd.core.messages.plans import Plan
from backstayd.core.messages.report import NodeReport, RunReport

logger = logging.getLogger(__name__)

_OF_PARTS = frozenset({NodeReport, RunReport, NodeDesired, RunDesired, StorageDesired})  # each part stands for itself
_said: set[tuple[str, str]] = set()  # by record and enum, not by value: a stranger has as many of these as it likes

M = TypeVar("M", bound=Message)
R = TypeVar("R")


class UnknownValueError(IntegrityError):
    """An enum value of a newer version."""


def to_message(record: Any, message_type: type[M]) -> M:
    """The record as a message of the type that mirrors it."""
    message = message_type()
    fill_fields(record, message)
    return message


def from_message(cls: type[R], message: Message) -> R:
    """The message as a record.

    Raises:
        IntegrityError: for an enum value this version does not know, where nothing can be left out, and for a message
            without a part that the record cannot be without.
    """
    values = read_fields(cls, message)
    kind: Any = cls
    missing = _required(kind) - values.keys()
    if missing:
        raise IntegrityError(
            f"received {cls.__name__} without required fields: {', '.join(sorted(missing))}", reason="bad_record"
        )
    return cls(**values)


def read_fields(cls: type[Any], message: Message, names: Container[str] | None = None) -> dict[str, Any]:
    """Values of the fields ``names`` (all of them: None) that are there; as :func:`from_message`."""
    values: dict[str, Any] = {}
    can_lose = cls in _OF_PARTS
    for name, kind, is_tuple, can_be_absent in _fields(cls):
        if (names is not None and name not in names) or (can_be_absent(message) and not message.HasField(name)):
            continue
        value = getattr(message, name)
        if can_lose and (dataclasses.is_dataclass(kind) or issubclass(kind, enum.Enum)):
            known = [
                item
                for item in (_or_none(kind, item) for item in (value if is_tuple else (value,)))
                if item is not None
            ]
            if is_tuple or known:
                values[name] = tuple(known) if is_tuple else known[0]
        else:
            values[name] = tuple(_value(kind, item) for item in value) if is_tuple else _value(kind, value)
    return values


@functools.cache
def _required(cls: Any) -> frozenset[str]:
    """Names of the fields without a default."""
    missing = dataclasses.MISSING
    return frozenset(f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing)


def element_of(cls: type[Any], name: str) -> type[Any]:
    """The type of the field, or of its elements if it is a tuple."""
    return next(kind for field, kind, _, _ in _fields(cls) if field == name)


def _value(kind: type[Any], value: Any) -> Any:
    if kind in _SHARED:
        return _shared_value(kind, value)
    if dataclasses.is_dataclass(kind):
        return from_message(kind, value)
    if issubclass(kind, enum.Enum):
        try:
            return _enum_members(kind)[value]
        except KeyError:
            raise UnknownValueError(
                f"{kind.__name__} {value} is not known to this version", reason="bad_record"
            ) from None
    return value


def _or_none(kind: type[Any], value: Any) -> Any:
    """The value, or None if it holds an enum value of a newer version."""
    try:
        return _value(kind, value)
    except UnknownValueError as error:
        known = (kind.__name__, str(error).partition(" ")[0])
        if known not in _said:
            _said.add(known)
            logger.warning("a %s is left out: %s; the other side is newer", kind.__name__, error)
        return None


def fill_fields(record: Any, message: Any, names: Container[str] | None = None) -> None:
    """Put the fields ``names`` (all of them: None) of the record into the message."""
    for name, kind, is_tuple, _ in _fields(type(record)):
        if names is not None and name not in names:
            continue
        value = getattr(record, name)
        if dataclasses.is_dataclass(kind):
            if is_tuple:
                target = getattr(message, name)
                for item in value:
                    _fill(item, target.add())
            elif value is not None:
                target = getattr(message, name)
                target.SetInParent()
                _fill(value, target)
        elif is_tuple:
            getattr(message, name).extend(value)
        elif issubclass(kind, enum.Enum):
            setattr(message, name, _enum_numbers(kind)[value])
        elif value is not None:
            setattr(message, name, value)


class _Shared:
    """Converted records by key, the oldest dropped when the words they were made from exceed the limit."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._used_bytes = 0
        self._kept: dict[Any, tuple[Any, bytes]] = {}

    def get(self, key: Any) -> tuple[Any, bytes] | None:
        return self._kept.get(key)

    def add(self, key: Any, record: Any, words: bytes) -> None:
        while self._kept and self._used_bytes + len(words) > self._limit_bytes:
            self._used_bytes -= len(self._kept.pop(next(iter(self._kept)))[1])
        self._kept[key] = (record, words)
        self._used_bytes += len(words)


# What every node of a job reports and is told in the same words: one record for all of them, converted once.
_SHARED: Final = frozenset({Decision, Plan})
_words_of = _Shared(16 << 20)  # by id of the record, which is kept so that the id stays its own
_record_of = _Shared(16 << 20)  # by type and words


def _fill(record: Any, message: Any) -> None:
    """A record inside another."""
    if type(record) not in _SHARED:
        fill_fields(record, message)
        return
    known = _words_of.get(id(record))
    if known is None:
        fill_fields(record, message)
        _words_of.add(id(record), record, message.SerializeToString())
    else:
        message.MergeFromString(known[1])


def _shared_value(kind: type[Any], message: Message) -> Any:
    words = message.SerializeToString()
    known = _record_of.get((kind, words))
    if known is not None:
        return known[0]
    record = from_message(kind, message)
    _record_of.add((kind, words), record, words)
    return record


_Field = tuple[str, type[Any], bool, Callable[[Message], bool]]
_fields_of: dict[Any, tuple[_Field, ...]] = {}


def _fields(cls: Any) -> tuple[_Field, ...]:
    """Per field: name, element type, is it a tuple, may it be absent on the wire."""
    found = _fields_of.get(cls)
    if found is None:
        hints = typing.get_type_hints(cls)
        fields = dataclasses.fields(cls)
        found = _fields_of[cls] = tuple((f.name, *_element(hints[f.name]), _presence(f.name)) for f in fields)
    return found


def _element(hint: Any) -> tuple[type[Any], bool]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return arguments[0], True
    if origin in (typing.Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return inner, False
    if not isinstance(hint, type):
        raise InvariantError(f"no wire form for {hint!r}")
    return hint, False


def _presence(name: str) -> Callable[[Message], bool]:
    def has_presence(message: Message) -> bool:
        return _has_presence(message.DESCRIPTOR.fields_by_name[name])

    return has_presence


@functools.cache
def _has_presence(field: FieldDescriptor) -> bool:
    return bool(field.has_presence)


@functools.cache
def _enum_numbers(kind: type[enum.Enum]) -> dict[Any, int]:
    """Members in order are 1, 2, ...; 0 is the never-sent UNSPECIFIED. A test compares with the proto."""
    return {member: number for number, member in enumerate(kind, 1)}


@functools.cache
def _enum_members(kind: type[enum.Enum]) -> dict[int, Any]:
    return {number: member for member, number in _enum_numbers(kind).items()}
