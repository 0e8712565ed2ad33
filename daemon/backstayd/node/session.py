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
from backstayd.store.paths import ShardRef
from backstayd.store.slot_holder import Holder
from backstayd.store.slots import Grant

MAX_REPORTED_BYTES: Final = 3 << 20  # of one trainer in its node's report, which carries those of all trainers


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """A snapshot whose chunks trainers here read: by a decision, from the node's peers, or in a visit, from ``addresses``."""

    offer_id: str
    run: str
    base: Base
    sources: tuple[ShardSource, ...]
    addresses: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> SnapshotKey:
        return SnapshotKey(self.base.attempt, self.base.step)

    def ref(self, source: ShardSource) -> ShardRef:
        return ShardRef(
            run=self.run, key=self.key, rank=source.rank, world_size=len(self.sources), digest=source.digest
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreAnswer:
    """The answer to a waiting restore(): a Restored or Error message, and descriptors that whoever sends them closes."""

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
    layout: str  # digest of the tensor boxes it holds; "": it takes whole shards
    collective_timeout_s: float  # of its torch.distributed, for the operator; 0: not known
    uid: int
    holder: Holder
    phase: SessionPhase = SessionPhase.ATTACHED
    attempt: int = 0
    base_step: int = 0
    allow_fresh: bool = False
    last_step: int = 0  # the newest that it has completed, as far as is known
    reserved_step: int = 0  # the newest for which it asked a slot, perhaps ahead of the step
    skipped_step: int = 0
    skip_reason: str = ""
    is_short_of_slots: bool = False
    skip_cause: SkipCause = SkipCause.NONE
    wish_step: int = 0  # it asked for a durable copy of this step or a newer one; 0: it did not
    sealed_step: int = 0  # file store: the newest step this rank declared whole
    blocked_s: float = 0.0  # what snapshots have cost it, by its own account
    waited_s: float = 0.0  # of that, for slots and for copying
    gate: GateReport | None = None  # its statements of what it loaded
    grants: dict[str, Grant] = field(default_factory=dict)  # by slot id
    answer: asyncio.Future[RestoreAnswer] | None = None
    offered: Offered | None = None  # the snapshot of another layout that was last offered to it
    staged: str = ""  # the decision of which it has fetched everything it needs
    lost_at_s: float = 0.0  # monotonic time at which its connection was lost; 0: it has one

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
        """Add what snapshots have cost it since the last call."""
        self.blocked_s += blocked_s
        self.waited_s += waited_s

    def forget_step(self, step: int) -> None:
        """The slot that was reserved for ``step`` was not used; this step, or one before it, may be asked for."""
        self.last_step = self.reserved_step = min(self.last_step, step - 1)

    def skip(
        self, step: int, reason: str, *, cause: SkipCause = SkipCause.CAPTURE, is_short_of_slots: bool = False
    ) -> bool:
        """Note that ``step`` will not be committed by this rank; ``is_short_of_slots``: snapshots come too fast.

        Returns False if this step, or a later one, was skipped before.
        """
        if step <= self.skipped_step:
            return False
        self.skipped_step, self.skip_reason = step, reason
        self.skip_cause, self.is_short_of_slots = cause, is_short_of_slots
        return True


def check_reported_size(session: Session, *, gate: GateReport | None = None) -> None:
    """Raise IntegrityError if the record of the session, and ``gate`` beside it, is larger than a report should carry."""
    size_bytes = len(json_records.dumps(session.record())) + (len(json_records.dumps(gate)) if gate is not None else 0)
    if size_bytes > MAX_REPORTED_BYTES:
        raise IntegrityError(
            f"rank {session.rank} of run {session.run} reports {size_bytes} bytes, more than {MAX_REPORTED_BYTES}; "
            "they are not sent to the coordinator",
            reason="too_large",
        )
