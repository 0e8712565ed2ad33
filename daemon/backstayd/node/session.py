"""A trainer as this node knows it: values and small rules, no sockets.

A session ends with its process (pidfd), not with its connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from backstay.errors import IntegrityError
from backstay.format import json_records
from backstay.ids import SnapshotKey
from backstayd.core.messages.decisions import Base, ShardSource
from backstayd.core.messages.gate import GateReport
from backstayd.core.messages.report import SessionPhase, SessionRecord, SkipCause
from backstayd.store.slot_holder import Holder
from backstayd.store.slots import Grant

MAX_SAID_BYTES: Final = 3 << 20  # of all that one trainer has its daemon report of it; a report carries them all


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """A snapshot that trainers here read chunks of. ``addresses``: for a visit; those of a decision are the node's peers."""

    offer_id: str
    run: str
    base: Base
    sources: tuple[ShardSource, ...]
    addresses: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> SnapshotKey:
        return SnapshotKey(self.base.attempt, self.base.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreAnswer:
    """What a waiting restore() gets: a Restored or Error message, and descriptors that the answerer closes."""

    message: Any
    fds: tuple[int, ...] = ()
    attempt: int = 0
    base_step: int = 0


@dataclass(slots=True, kw_only=True)
class Session:
    """One trainer of one world. Invariant: grants are of slots of its own rank."""

    session_id: str
    run: str
    world_id: str
    rank: int
    world_size: int
    needs: tuple[int, ...]
    layout: str  # which boxes of which tensors it holds; "": it takes whole shards
    collective_timeout_s: float  # of its torch.distributed, for the operator; 0: not known
    uid: int
    holder: Holder
    phase: SessionPhase = SessionPhase.ATTACHED
    attempt: int = 0
    base_step: int = 0
    allow_fresh: bool = False
    last_step: int = 0  # the newest that it is known to have completed
    reserved_step: int = 0  # the newest that it asked a slot for, maybe ahead of the step
    skipped_step: int = 0
    skip_reason: str = ""
    is_short_of_slots: bool = False
    skip_cause: SkipCause = SkipCause.NONE
    wish_step: int = 0  # the trainer asked for this step, or a newer one, on durable storage; 0: it did not
    sealed_step: int = 0  # file store: the newest step this rank declared whole
    blocked_s: float = 0.0  # what snapshots have cost it, as it says
    waited_s: float = 0.0  # of that, for slots and for copying
    gate: GateReport | None = None  # what it says it loaded
    grants: dict[str, Grant] = field(default_factory=dict)  # by slot id
    answer: asyncio.Future[RestoreAnswer] | None = None
    offered: Offered | None = None  # the snapshot of another layout that it was offered last
    staged: str = ""  # the decision of which it has fetched all that it needs
    lost_at_s: float = 0.0  # monotonic time at which the connection was lost; 0 while it stands

    @property
    def needed_ranks(self) -> tuple[int, ...]:
        return tuple(sorted({self.rank, *self.needs}))

    def record(self, *, persisted_step: int = 0) -> SessionRecord:
        return SessionRecord(
            world_id=self.world_id,
            rank=self.rank,
            world_size=self.world_size,
            phase=self.phase,
            allow_fresh=self.allow_fresh,
            needs=self.needed_ranks,
            last_step=self.last_step,
            skipped_step=self.skipped_step,
            skip_reason=self.skip_reason,
            is_short_of_slots=self.is_short_of_slots,
            skip_cause=self.skip_cause,
            sealed_step=self.sealed_step,
            blocked_s=round(self.blocked_s, 3),
            waited_s=round(self.waited_s, 3),
            wants_persist=self.wish_step > persisted_step,
            gate=self.gate,
        )

    def note_cost(self, blocked_s: float, waited_s: float) -> None:
        """What snapshots have cost it since it said so last."""
        self.blocked_s += blocked_s
        self.waited_s += waited_s

    def forget_step(self, step: int) -> None:
        """The slot that was reserved for ``step`` was not used; this step, or one before it, may be asked for."""
        self.last_step = self.reserved_step = min(self.last_step, step - 1)

    def skip(
        self, step: int, reason: str, *, cause: SkipCause = SkipCause.CAPTURE, is_short_of_slots: bool = False
    ) -> bool:
        """Note that ``step`` will not be committed by this rank; ``is_short_of_slots``: snapshots come too fast.

        Returns whether that is news.
        """
        if step <= self.skipped_step:
            return False
        self.skipped_step, self.skip_reason = step, reason
        self.skip_cause, self.is_short_of_slots = cause, is_short_of_slots
        return True


def check_said(session: Session, *, gate: GateReport | None = None) -> None:
    """Raise IntegrityError if what the session is reported with, and ``gate`` beside it, is more than a report should carry."""
    said_bytes = len(json_records.dumps(session.record())) + (len(json_records.dumps(gate)) if gate is not None else 0)
    if said_bytes > MAX_SAID_BYTES:
        raise IntegrityError(
            f"rank {session.rank} of run {session.run} states {said_bytes} bytes for the coordinator, more than "
            f"{MAX_SAID_BYTES}; they are not passed on",
            reason="too_large",
        )
