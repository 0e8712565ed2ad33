"""What changed since the message before on the same stream: reports and desired state without what the other side has.

A stream carries its messages in order or breaks, so "as before" is exact; a new stream begins with a whole message. Must
not decide anything: the other side sees the same records as if each message were whole.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypeVar

from backstay.errors import IntegrityError
from backstayd.transport import convert
from backstayd.v1 import coordinator_pb2

R = TypeVar("R")


def write(record: Any, last: Any, message: Any) -> coordinator_pb2.Delta:
    """Put into ``message`` the fields of ``record`` that differ from ``last``; returns which those are.

    Both are a NodeReport or both a NodeDesired. Where nothing differs, nothing is written.
    """
    numbers = _numbers(message.DESCRIPTOR)
    changed = _changed(record, last)
    delta = coordinator_pb2.Delta(changed=[numbers[name] for name in changed])
    if not changed:
        return delta
    convert.fill_fields(record, message, [name for name in changed if name != "runs"])
    if "runs" in changed:
        before = {run.run: run for run in last.runs}
        for run in record.runs:
            part = message.runs.add()
            run_numbers = _numbers(part.DESCRIPTOR)
            names = _changed(run, before.get(run.run))
            convert.fill_fields(run, part, {"run", *names})
            delta.runs.add(changed=[run_numbers[name] for name in names])
    return delta


def read(message: Any, delta: coordinator_pb2.Delta, last: R | None) -> R:
    """The whole record that :func:`write` was given; ``last`` itself if nothing changed.

    Raises:
        IntegrityError: there is nothing that it could be a change of.
    """
    if last is None:
        raise IntegrityError("a stream began with a change of nothing", reason="bad_record")
    if not delta.changed:
        return last
    names = _names(message.DESCRIPTOR, delta.changed)
    values = convert.read_fields(type(last), message, names - {"runs"})
    values |= {name: _default(type(last), name) for name in names - {"runs"} - set(values)}
    if "runs" in names:
        values["runs"] = _read_runs(message, delta, last)
    return dataclasses.replace(last, **values)  # type: ignore[type-var]


def _read_runs(message: Any, delta: coordinator_pb2.Delta, last: Any) -> tuple[Any, ...]:
    if len(message.runs) != len(delta.runs):
        raise IntegrityError(
            f"a change names {len(message.runs)} runs and describes {len(delta.runs)}", reason="bad_record"
        )
    before = {run.run: run for run in last.runs}
    kind = convert.element_of(type(last), "runs")
    return tuple(
        _read_run(kind, part, change, before.get(part.run))
        for part, change in zip(message.runs, delta.runs, strict=True)
    )


def _read_run(kind: type[Any], part: Any, change: coordinator_pb2.RunDelta, last: Any) -> Any:
    if last is None:
        return convert.from_message(kind, part)
    if not change.changed:
        return last
    names = _names(part.DESCRIPTOR, change.changed)
    values = convert.read_fields(kind, part, names)
    values |= {name: _default(kind, name) for name in names - set(values)}
    return dataclasses.replace(last, **values)


def _changed(record: Any, last: Any) -> list[str]:
    """Names of the fields that differ; all but a run's own name where there was nothing before."""
    if record is last:
        return []
    kind: Any = type(record)
    names = _fields(kind)
    if last is None:
        return [name for name in names if name != "run"]
    return [name for name in names if _differ(getattr(record, name), getattr(last, name))]


def _differ(value: Any, other: Any) -> bool:
    return value is not other and value != other


def _default(kind: type[Any], name: str) -> Any:
    """What a field is that was sent and yet is not there: it became absent."""
    field = next(field for field in dataclasses.fields(kind) if field.name == name)
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    raise IntegrityError(f"{kind.__name__}.{name} is said to have changed and is missing", reason="bad_record")


@functools.cache
def _fields(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


@functools.cache
def _numbers(descriptor: Any) -> dict[str, int]:
    return {field.name: field.number for field in descriptor.fields}


def _names(descriptor: Any, numbers: Any) -> set[str]:
    """Fields by number; one of a later version that is not known here is skipped."""
    return {descriptor.fields_by_number[number].name for number in numbers if number in descriptor.fields_by_number}
