"""Records to wire messages and back: nothing is lost, fields match, unknown things are handled, errors keep their class."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import given, settings
from hypothesis import strategies as st

from backstay.errors import ERROR_CLASSES, BackstayError, IntegrityError, UnavailableError
from backstay.ids import Generation
from backstay.protocol.messages import Schedule
from backstayd.core.messages import decisions, desired, durable, gate, plans, report, tombstone
from backstayd.core.messages.decisions import Interruption, Ledger
from backstayd.core.messages.desired import NodeDesired
from backstayd.core.messages.report import NodeIdentity, NodeReport, RunReport, SessionPhase
from backstayd.transport import convert, errors
from backstayd.v1 import coordinator_pb2

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a record, by its annotations; tuples are short."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields = {f.name: values_of(hints[f.name]) for f in dataclasses.fields(kind)}
        return st.builds(typing.cast("type[Any]", kind), **fields)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return st.lists(values_of(arguments[0]), max_size=2).map(tuple)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (a for a in arguments if a is not type(None))
        return st.none() | values_of(inner)
    if issubclass(kind, enum.Enum):
        return st.sampled_from(list(kind))
    simple = {
        bool: st.booleans(),
        int: st.integers(-(2**63), 2**63 - 1),
        float: st.floats(allow_nan=False),
        str: TEXT,
    }
    return simple[kind]


@settings(max_examples=40, deadline=None)
@given(values_of(NodeReport))
def test_a_report_survives_the_wire(report: NodeReport) -> None:
    message = convert.to_message(report, coordinator_pb2.NodeReport)
    again = coordinator_pb2.NodeReport.FromString(message.SerializeToString())
    assert convert.from_message(NodeReport, again) == report


@settings(max_examples=40, deadline=None)
@given(values_of(NodeDesired))
def test_desired_state_survives_the_wire(desired: NodeDesired) -> None:
    message = convert.to_message(desired, coordinator_pb2.NodeDesired)
    again = coordinator_pb2.NodeDesired.FromString(message.SerializeToString())
    assert convert.from_message(NodeDesired, again) == desired


MODULES = (decisions, desired, durable, gate, plans, report, tombstone)


def record_named(name: str) -> Any:
    """The record that a message mirrors; None if no module of them has it."""
    return next((getattr(m, name) for m in MODULES if hasattr(m, name)), None)


def message_types() -> dict[str, Descriptor]:
    return dict(coordinator_pb2.DESCRIPTOR.message_types_by_name)


def test_messages_mirror_the_records_field_for_field() -> None:
    compared = 0
    for name, descriptor in message_types().items():
        elsewhere = {"Generation": Generation, "Interruption": Interruption, "Ledger": Ledger}
        cls = record_named(name) or elsewhere.get(name)
        if cls is None:
            key_or_envelope = {"SnapshotKey", "SyncRequest", "SyncResponse", "Delta", "RunDelta"}
            assert name in key_or_envelope, f"{name} mirrors no record"
            continue
        assert {f.name for f in dataclasses.fields(cls)} == {f.name for f in descriptor.fields}, name
        compared += 1
    assert compared > 20


def test_enums_have_the_members_of_the_records_in_order() -> None:
    for name, descriptor in coordinator_pb2.DESCRIPTOR.enum_types_by_name.items():
        members = list(record_named(name))
        numbers = [(value.name.removeprefix(descriptor.values[0].name.removesuffix("UNSPECIFIED")), value.number)
                   for value in descriptor.values]  # fmt: skip
        assert numbers == [("UNSPECIFIED", 0), *((m.name, i) for i, m in enumerate(members, 1))], name


def test_a_field_whose_default_is_not_zero_is_optional_on_the_wire() -> None:
    for name, descriptor in message_types().items():
        cls = record_named(name)
        if cls is None:
            continue
        for field in dataclasses.fields(cls):
            wire: FieldDescriptor = descriptor.fields_by_name[field.name]
            is_scalar = wire.message_type is None and wire.enum_type is None and not isinstance(field.default, tuple)
            if is_scalar and field.default is not dataclasses.MISSING and field.default not in (0, "", False, 0.0):
                assert wire.has_presence, f"{name}.{field.name} of version N-1 would read as zero"


def test_a_sender_that_does_not_know_a_field_gives_its_default() -> None:
    message = coordinator_pb2.Schedule(from_step=7)
    assert convert.from_message(Schedule, message) == Schedule(from_step=7)
    assert Schedule().interval_steps == 1


def test_an_enum_value_of_a_later_version_is_refused() -> None:
    message = coordinator_pb2.SessionRecord(world_id="w", rank=0, world_size=1)
    message.phase = 99  # type: ignore[assignment]
    with pytest.raises(IntegrityError, match="SessionPhase 99"):
        convert.from_message(report.SessionRecord, message)
    message.phase = coordinator_pb2.SESSION_PHASE_ATTACHED
    assert convert.from_message(report.SessionRecord, message).phase is SessionPhase.ATTACHED


def test_what_a_newer_sender_says_costs_the_least_part_of_its_report() -> None:
    node = report.NodeIdentity(name="n1", incarnation="1", bulk_address="n1:1")
    sessions = tuple(
        report.SessionRecord(world_id="w", rank=rank, world_size=2, phase=SessionPhase.TRAINING) for rank in range(2)
    )
    run = report.RunReport(run="a/b", sessions=sessions, staging=decisions.Staging(decision_id="d", state="ready"))  # type: ignore[arg-type]
    message = convert.to_message(report.NodeReport(node=node, sequence=1, runs=(run,)), coordinator_pb2.NodeReport)
    message.runs[0].sessions[0].phase = 99  # type: ignore[assignment]
    message.runs[0].staging.state = 77  # type: ignore[assignment]
    found = convert.from_message(report.NodeReport, message)
    assert [session.rank for session in found.runs[0].sessions] == [1]
    assert found.runs[0].staging is None
    assert found.node == node


def test_a_decision_with_a_source_of_an_unknown_kind_is_left_out_as_a_whole() -> None:
    source = decisions.ShardSource(rank=0, size_bytes=1, digest="d", kind=decisions.SourceKind.LOCAL)
    decision = decisions.Decision(
        decision_id="d", generation=Generation(1, "c"), run="a/b", world_id="w", world_size=1, attempt=1,
        outcome=decisions.Outcome.EXACT, sources=(source,),
    )  # fmt: skip
    wanted = desired.NodeDesired(
        generation=Generation(1, "c"), runs=(desired.RunDesired(run="a/b", decision=decision),)
    )
    message = convert.to_message(wanted, coordinator_pb2.NodeDesired)
    message.runs[0].decision.sources[0].kind = 99  # type: ignore[assignment]
    message.runs[0].decision_phase = 88  # type: ignore[assignment]
    (run,) = convert.from_message(desired.NodeDesired, message).runs
    assert run.decision is None
    assert run.decision_phase is decisions.DecisionPhase.PREPARE


def test_every_error_class_has_its_own_code_and_comes_back_as_itself() -> None:
    assert set(errors.CODE_OF_CLASS) == set(ERROR_CLASSES.values())
    assert len(set(errors.CODE_OF_CLASS.values())) == len(errors.CODE_OF_CLASS)
    for cls, code in errors.CODE_OF_CLASS.items():
        assert errors.code_of(cls("x")) is code
        assert errors.class_of(code) is cls


def test_codes_that_grpc_makes_itself_mean_that_nobody_answered() -> None:
    for code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        assert errors.class_of(code) is UnavailableError
        assert errors.class_of(code).is_retryable
    assert errors.class_of(grpc.StatusCode.ALREADY_EXISTS) is BackstayError


def test_an_error_of_a_derived_class_is_sent_as_its_nearest_known_one() -> None:
    class SpecialIntegrityError(IntegrityError):
        pass

    assert errors.code_of(SpecialIntegrityError("x")) is grpc.StatusCode.DATA_LOSS


def test_a_stranger_with_a_new_enum_value_each_time_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    sound = NodeReport(
        node=NodeIdentity(name="n", incarnation="i", bulk_address="h:1"), sequence=1, runs=(RunReport(run="j/r"),)
    )
    convert._said.clear()
    for value in range(1000, 1100):
        message = convert.to_message(sound, coordinator_pb2.NodeReport)
        message.runs[0].staging.state = value  # type: ignore[attr-defined]
        assert convert.from_message(NodeReport, message).runs[0].staging is None
    assert len([line for line in caplog.messages if "left out" in line]) == 1
