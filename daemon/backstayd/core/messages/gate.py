"""What ranks report of the state they loaded, and the coordinator's answer."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from backstay.protocol.messages import GateDetail, GateEntry


class GateState(enum.StrEnum):
    WAITING = "waiting"  # not every rank has reported what it loaded
    DETAIL = "detail"  # some entries differ: their ranks report which tensors
    PASSED = "passed"
    FAILED = "failed"  # ``message`` says what differs; nobody trains


@dataclass(frozen=True, slots=True, kw_only=True)
class GateReport:
    """What one rank reports of the state it loaded under a decision, before its first step.

    With neither entries nor a failure, the rank has heard that the gate is passed.
    """

    decision_id: str
    entries: tuple[GateEntry, ...] = ()
    details: tuple[GateDetail, ...] = ()
    failure: str = ""  # why it could not load


@dataclass(frozen=True, slots=True, kw_only=True)
class GateVerdict:
    """The coordinator's answer to the ranks of one decision."""

    decision_id: str
    state: GateState
    entries: tuple[str, ...] = ()  # those whose details are wanted
    message: str = ""
