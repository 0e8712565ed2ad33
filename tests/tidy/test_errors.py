"""The error table: every class is in it, and programs can tell them apart."""

from __future__ import annotations

import inspect

import pytest

from backstay import errors
from backstay.errors import BackstayError

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, BackstayError)]


def test_every_class_is_in_the_table_under_its_own_name() -> None:
    assert {cls.__name__: cls for cls in CLASSES} == errors.ERROR_CLASSES


def test_exit_codes_are_distinct_and_none_means_success_or_a_signal() -> None:
    codes = [cls.exit_code for cls in CLASSES]
    assert len(set(codes)) == len(codes)
    assert all(0 < code < 126 and code != 2 for code in codes)


@pytest.mark.parametrize("cls", CLASSES)
def test_each_class_says_who_acts_and_has_a_reason_for_programs(cls: type[BackstayError]) -> None:
    assert cls.__doc__
    assert cls("what failed").reason.islower()
    assert cls("what failed", reason="slot_size_mismatch").reason == "slot_size_mismatch"
    assert str(cls("what failed")) == "what failed"


def test_only_what_may_pass_by_itself_is_retryable() -> None:
    assert {cls.__name__ for cls in CLASSES if cls.is_retryable} == {"UnavailableError"}


def test_every_class_has_a_grpc_code_and_comes_back_as_itself() -> None:
    from backstayd.transport import errors as wire

    assert set(wire.CODE_OF_CLASS) == set(CLASSES)
    assert len(set(wire.CODE_OF_CLASS.values())) == len(CLASSES)
    assert all(wire.class_of(code) is cls for cls, code in wire.CODE_OF_CLASS.items())
