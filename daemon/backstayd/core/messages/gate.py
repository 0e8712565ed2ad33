"""What ranks say of the state they loaded, and what the coordinator makes of it. Frozen values only, as :mod:`records`."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from backstay.protocol.messages import GateDetail, GateEntry


class GateState(enum.StrEnum):
    WAITING = "waiting"  # not every rank has said what it loaded
    DETAIL = "detail"  # some entries differ: their ranks say which tensors
    PASSED = "passed"
    FAILED = "failed"  # ``message`` says what differs; nobody trains


@dataclass(frozen=True, slots=True, kw_only=True)
class GateReport:
    """What one rank says of the state it loaded under a decision, before its first step. ``failure``: it could not load.

    A report with neither entries nor failure: the rank was told that the gate is passed.
    """

    decision_id: str
    entries: tuple[GateEntry, ...] = ()
    details: tuple[GateDetail, ...] = ()
    failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateVerdict:
    """The coordinator's answer to the ranks of one decision; ``entries`` names those whose details it wants."""

    decision_id: str
    state: GateState
    entries: tuple[str, ...] = ()
    message: str = ""
