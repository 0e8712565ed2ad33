"""Requests of a trainer that captures: reserve a slot, commit what it filled, or abandon it.

A failure here costs the trainer only that one snapshot.
"""

from __future__ import annotations

import asyncio
import functools
from typing import Any, Final

from backstay.errors import BackstayError, CapacityError, IntegrityError, UnavailableError, UsageError
from backstay.format.manifest import Manifest
from backstay.protocol import messages
from backstayd.core.inventory.distrust import MAX_REASON
from backstayd.core.messages.desired import RunDesired
from backstayd.core.messages.report import SkipCause
from backstayd.core.protect.groups import slots_of
from backstayd.node import job_metrics
from backstayd.node.node_state import NodeState
from backstayd.node.session import Session
from backstayd.node.trainers.connection import MAX_WAIT_S, Call
from backstayd.node.trainers.sessions import Sessions
from backstayd.store.index import RunIndex
from backstayd.store.slots import Allocation, Grant, allocate

READER_POLL_S: Final = 0.05  # a reader that releases a slot notifies nobody


class SlotRequests:
    def __init__(self, node: NodeState, sessions: Sessions) -> None:
        self._node = node
        self._sessions = sessions

    def _take_back(self, session: Session, step: int) -> None:
        """Undo a reservation for ``step`` that was not used: that step, or one before it, may be reserved again."""
        for grant in [grant for grant in session.grants.values() if grant.step == step]:
            del session.grants[grant.slot_id]
            self._node.store.slots.put_back(grant)
            session.forget_step(step)

    async def reserve(self, call: Call, session: Session, message: messages.Reserve) -> None:
        self._sessions.check_current(session)
        self._take_back(session, message.step)  # a slot reserved ahead turned out to be of the wrong size
        newest = max(session.last_step, session.reserved_step, session.skipped_step)
        if message.step <= newest:
            raise UsageError(f"step {message.step} is not after step {newest}", reason="step_not_increasing")
        if message.size_bytes <= 0:
            raise UsageError(f"invalid shard size: {message.size_bytes} bytes", reason="bad_size")
        try:
            with self._node.metrics.stage_seconds.labels(stage="reserve").time():
                grant = await self._await_slot(call, session, message)
        except CapacityError as error:
            self._skip(session, message.step, str(error))
            raise
        desired = self._node.run_desired(session.run)
        if grant is None:
            reason = "no slot came free"
            can_come = desired.is_release_possible and self._node.link.is_connected
            if not self._node.link.is_connected:
                reason = "no slot is free, and none is released while the coordinator is away"
            elif not desired.is_release_possible:
                reason = "no slot is free, and none can be released now"
            # where a slot is held back, for probation or an upload, a skip does not mean that snapshots come too fast
            self._skip(session, message.step, reason, is_short_of_slots=can_come and desired.extra_slots == 0)
            await call.send(messages.Skipped(reason=reason, **_standing(session, desired)))
            return
        session.grants[grant.slot_id] = grant
        call.allow_frames(messages.request_limit(grant.size_bytes))
        session.reserved_step = message.step
        if not message.is_ahead:
            session.last_step = message.step
        fds = () if grant.slot_id in message.known_slots else (grant.fd,)
        reply = messages.Reserved(slot_id=grant.slot_id, size_bytes=grant.size_bytes, **_standing(session, desired))
        await call.send(reply, fds)

    def _skip(
        self,
        session: Session,
        step: int,
        reason: str,
        *,
        cause: SkipCause = SkipCause.NO_SLOT,
        is_short_of_slots: bool = False,
    ) -> None:
        """The rank skips ``step`` because it has no slot."""
        if session.skip(step, reason, cause=cause, is_short_of_slots=is_short_of_slots):
            self._node.metrics.shards.of(session.run, result="skipped").inc()
        self._node.changed()

    async def _await_slot(self, call: Call, session: Session, message: messages.Reserve) -> Grant | None:
        node, loop = self._node, asyncio.get_running_loop()
        index = node.store.index(session.run)
        deadline = loop.time() + min(message.wait_s, MAX_WAIT_S)
        while True:
            desired = node.run_desired(session.run)
            found = self._take(session, message, index, desired)
            if isinstance(found, Grant):
                return found
            if isinstance(found, Allocation):
                return await self._allocate(session, found, message.step)
            can_come = desired.is_release_possible and node.link.is_connected
            if not can_come or loop.time() >= deadline or call.is_lost:
                return None
            await node.waiters.wait(min(READER_POLL_S, deadline - loop.time()))
            self._sessions.check_current(session)

    def _take(
        self, session: Session, message: messages.Reserve, index: RunIndex, desired: RunDesired
    ) -> Grant | Allocation | None:
        """A free slot, or one to allocate; an extra one only if there is room."""

        def take(limit: int) -> Grant | Allocation | None:
            return self._node.store.slots.take(
                index,
                rank=session.rank,
                step=message.step,
                size_bytes=message.size_bytes,
                holder=session.holder.record,
                limit=limit,
                world_size=session.world_size,
            )

        found = take(slots_of(desired.keep))
        if found is not None or desired.extra_slots == 0:
            return found
        try:
            return take(slots_of(desired.keep) + desired.extra_slots)
        except CapacityError:
            return None

    async def _allocate(self, session: Session, allocation: Allocation, step: int) -> Grant:
        slots = self._node.store.slots
        try:
            await asyncio.to_thread(allocate, allocation)
            self._sessions.check_current(session)
            if session.run not in self._node.store.runs or session not in list(self._sessions):
                raise UnavailableError("the session ended while its slot was being allocated", reason="session_ended")
        except BaseException:
            slots.give_up(allocation)
            raise
        return slots.add(allocation, step=step, holder=session.holder.record)

    def commit(self, session: Session, message: messages.Commit) -> messages.Committed:
        metrics = self._node.metrics
        self._sessions.check_current(session)
        session.note_cost(*job_metrics.note_cost(metrics, session.run, message.cost))
        grant = session.grants.get(message.slot_id)
        if grant is None or grant.step != message.step:
            raise UnavailableError(
                f"slot {message.slot_id} is no longer granted to rank {session.rank} for step {message.step}",
                reason="no_grant",
            )
        try:
            is_ours = functools.partial(_check_identity, session, grant)
            with metrics.stage_seconds.labels(stage="commit").time():
                shard = self._node.store.slots.commit(grant, message.manifest, check=is_ours)
        except BackstayError as error:
            self._give_back(session, grant, f"commit refused: {error}", result="refused")
            raise
        del session.grants[grant.slot_id]
        session.last_step = max(session.last_step, message.step)
        metrics.shards.of(session.run, result="committed").inc()
        metrics.stage_bytes.of(session.run, stage="commit").inc(grant.size_bytes)
        metrics.committed_step.of(session.run).set(grant.step)
        metrics.committed_timestamp_seconds.of(session.run).set(self._node.clock.unix_s())
        self._node.changed()
        desired = self._node.run_desired(session.run)
        return messages.Committed(digest=shard.digest, **_standing(session, desired))

    def abandon(self, session: Session, message: messages.Abandon) -> None:
        reason = message.reason[:MAX_REASON] or "abandoned"
        session.note_cost(*job_metrics.note_cost(self._node.metrics, session.run, message.cost))
        if message.is_unused:  # the step may never come, and where the interval shrinks, one before it does
            self._take_back(session, message.step)
            self._node.changed()
            return
        is_short = message.is_short_of_slots and self._node.run_desired(session.run).extra_slots == 0
        cause = SkipCause.NO_SLOT if message.is_short_of_slots else SkipCause.CAPTURE
        granted = [grant for grant in session.grants.values() if grant.step == message.step]
        if granted:
            session.skip(message.step, reason, cause=cause, is_short_of_slots=is_short)
        else:
            self._skip(session, message.step, reason, cause=cause, is_short_of_slots=is_short)
        for grant in granted:
            self._give_back(session, grant, reason, result="torn")
        self._node.changed()

    def _give_back(self, session: Session, grant: Grant, reason: str, *, result: str) -> None:
        session.grants.pop(grant.slot_id, None)
        self._node.store.slots.put_back(grant)
        session.skip(grant.step, reason)
        self._node.metrics.shards.of(session.run, result=result).inc()
        self._node.changed()


def _standing(session: Session, desired: RunDesired) -> dict[str, Any]:
    """The state of the run, for every answer to a capturing trainer; ``notice``: why snapshots do not become complete."""
    missing = desired.missing
    is_ours = missing is not None and missing.is_training and missing.world_id == session.world_id
    return {
        "schedule": desired.schedule,
        "redundancy": desired.redundancy,
        "protected_step": desired.protected_step,
        "notice": missing.sentence if missing is not None and is_ours else "",
    }


def _check_identity(session: Session, grant: Grant, manifest: Manifest) -> None:
    fields = {
        "run": (manifest.run, session.run),
        "attempt": (manifest.attempt, session.attempt),
        "step": (manifest.step, grant.step),
        "rank": (manifest.rank, session.rank),
        "world size": (manifest.world_size, session.world_size),
        "world": (manifest.world_id, session.world_id),
        "size": (manifest.size_bytes, grant.size_bytes),
    }
    for name, (found, expected) in fields.items():
        if found != expected:
            raise IntegrityError(
                f"the manifest has {name} {found}, this session has {expected}; nothing was published",
                reason="wrong_identity",
            )
