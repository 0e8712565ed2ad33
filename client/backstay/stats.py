"""The outcome of one snapshot() call, and sums over all of them."""

from __future__ import annotations

from dataclasses import dataclass

STARTED, NOT_SCHEDULED, REFUSED, SKIPPED = "started", "not_scheduled", "refused", "skipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotStatus:
    """The outcome of one snapshot() call.

    ``state``: ``started`` (it is under way), ``not_scheduled`` (not a step that the ranks capture), ``refused`` (called at a
    wrong moment) or ``skipped`` (no daemon or no slot); ``reason``: why.
    """

    step: int
    state: str
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Sums since restore(). ``blocked_s`` is the time in snapshot(), ``fence_s`` that in the fence: what the trainer paid.
    ``waited_s`` of the latter was waiting for a slot or for the copy, ``wait_share`` its part of the time of the last few
    snapshots: above 0.05 on any rank, all ranks take fewer.
    ``copied_bytes`` went into slots, ``hashed_bytes`` were digested, ``kept_bytes`` were neither: their slot held them."""

    blocked_s: float = 0.0
    fence_s: float = 0.0
    waited_s: float = 0.0
    wait_share: float = 0.0
    started: int = 0
    committed: int = 0
    skipped: int = 0
    abandoned: int = 0
    refused: int = 0
    last_committed_step: int = -1
    copied_bytes: int = 0
    hashed_bytes: int = 0
    kept_bytes: int = 0
    protected_step: int = 0
    redundancy: str = ""
    last_problem: str = ""
    is_attached: bool = False
    is_synchronous: bool = False
