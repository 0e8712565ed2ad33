"""What snapshots came to: of one call, and in sums. Only says; decides nothing."""

from __future__ import annotations

from dataclasses import dataclass

STARTED, NOT_SCHEDULED, REFUSED, SKIPPED = "started", "not_scheduled", "refused", "skipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotStatus:
    """What became of one snapshot() call.

    ``state``: ``started`` (it is under way), ``not_scheduled`` (not a step that the ranks capture), ``refused`` (called at a
    wrong moment) or ``skipped`` (no daemon or no slot); ``reason`` says why.
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

    blocked_s: float
    fence_s: float
    waited_s: float
    wait_share: float
    started: int
    committed: int
    skipped: int
    abandoned: int
    refused: int
    last_committed_step: int
    copied_bytes: int
    hashed_bytes: int
    kept_bytes: int
    protected_step: int
    redundancy: str
    last_problem: str
    is_attached: bool
    is_synchronous: bool
