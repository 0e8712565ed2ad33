"""What an attached trainer can ask of its run, from restore to finish: each request is answered once.

A world that is not the current one gets StaleGenerationError; a step that fails here costs the trainer nothing but itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from backstay.errors import (
    BackstayError,
    CapacityError,
    IntegrityError,
    StaleGenerationError,
    UnavailableError,
    UsageError,
)
from backstay.format import json_records
from backstay.format.manifest import Manifest
from backstay.ids import MAX_COUNT
from backstay.protocol import messages
from backstayd.core.inventory.distrust import MAX_REASON
from backstayd.core.messages.desired import RunDesired
from backstayd.core.messages.report import SessionPhase
from backstayd.core.protect.footprint import slots_of
from backstayd.node import gauges
from backstayd.node.node_state import NodeContext
from backstayd.node.restores.chunk_offer import CHANGED, Offered, Work
from backstayd.node.trainers import gate_relay
from backstayd.node.trainers.connection import Connection
from backstayd.node.trainers.ownership import check_owner
from backstayd.node.trainers.session import Session
from backstayd.store.index import RunIndex
from backstayd.store.slots import Allocation, Grant, allocate

if TYPE_CHECKING:
    from backstayd.node.trainers.sessions import Sessions

logger = logging.getLogger(__name__)

PROGRESS_S: Final = 1.0
MAX_WAIT_S: Final = 600.0
MAX_GATE_S: Final = 3600.0
READER_POLL_S: Final = 0.05  # a reader that lets go of a slot rings no bell


class Requests:
    """Answers one request of one session on its connection."""

    def __init__(self, context: NodeContext, sessions: Sessions, connection: Connection, message_id: int) -> None:
        self._context = context
        self._sessions = sessions
        self._connection = connection
        self._message_id = message_id

    async def handle(self, session: Session, message: Any) -> None:
        """Answer ``message``; raises BackstayError for a refusal, ConnectionError when the trainer is gone."""
        check_owner(self._context, session.run, session.uid)
        _check_step(message)
        if isinstance(message, messages.Restore):
            await self._restore(session, message)
        elif isinstance(message, messages.Fetch):
            await self._fetch(session, message)
        elif isinstance(message, messages.Reserve):
            await self._reserve(session, message)
        elif isinstance(message, messages.Commit):
            await self._send(self._commit(session, message))
        elif isinstance(message, messages.Abandon):
            self._abandon(session, message)
            await self._send(messages.Done())
        elif isinstance(message, messages.Seal):
            self._seal(session, message)
            await self._send(messages.Done())
        elif isinstance(message, messages.AwaitSeal):
            await self._send(await self._await_seal(session, message))
        elif isinstance(message, messages.Gate):
            await self._gate(session, message)
        elif isinstance(message, messages.Distrust):
            self._check_current(session)
            gate_relay.take_distrust(self._context, session, message)
            await self._send(messages.Done())
        elif isinstance(message, messages.Persist):
            self._persist(session)
            await self._send(messages.Done())
        elif isinstance(message, messages.Finish):
            self._finish(session, message)
            await self._send(messages.Done())
        else:
            raise UsageError(f"unexpected message type {type(message).__name__}", reason="bad_request")

    async def _send(self, message: Any, fds: tuple[int, ...] = ()) -> None:
        await self._connection.send(message, message_id=self._message_id, fds=fds)

    async def _restore(self, session: Session, message: messages.Restore) -> None:
        context = self._context
        if session.phase in (SessionPhase.TRAINING, SessionPhase.ENDED):
            raise UsageError(
                f"rank {session.rank} restored already; a new restore needs a new world", reason="restored_already"
            )
        session.phase, session.allow_fresh = SessionPhase.RESTORING, message.allow_fresh
        session.staged = message.staged
        answer = session.answer = asyncio.get_running_loop().create_future()
        context.changed()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + message.deadline_s
        told_at = 0.0
        told = messages.Progress(phase="")
        while not answer.done():
            if loop.time() > deadline:
                session.phase, session.answer = SessionPhase.ATTACHED, None
                context.changed()
                raise UnavailableError(
                    f"run {session.run}: rank {session.rank} got no decision within {message.deadline_s:g} s "
                    f"({told.phase}: {told.detail})",
                    reason="deadline",
                )
            if self._connection.is_lost:
                raise ConnectionError("the trainer left while it was waiting")
            check_owner(context, session.run, session.uid)
            progress = context.progress(session)
            if progress != told or loop.time() - told_at >= PROGRESS_S:
                await self._send(progress)
                told, told_at = progress, loop.time()
            offer = await self._try_offer(session)
            if offer is not None and not answer.done():
                session.answer = None
                await self._send(offer)
                return
            await context.bell.wait(min(PROGRESS_S, deadline - loop.time()))
        session.answer = None
        if answer.cancelled():
            raise UnavailableError(
                f"the session of rank {session.rank} ended while it was waiting", reason="session_ended"
            )
        result = answer.result()
        try:
            if isinstance(result.message, messages.Restored):
                session.phase, session.attempt = SessionPhase.TRAINING, result.attempt
                session.base_step = session.last_step = result.base_step
            else:
                session.phase = SessionPhase.ATTACHED
            context.changed()
            await self._send(result.message, result.fds)
        finally:
            close_fds(result.fds)

    async def _try_offer(self, session: Session) -> messages.Offer | None:
        """The offer that a trainer of another layout must be made now; None without one, or while it cannot be made yet."""
        context = self._context
        decision = context.offer_due(session)
        if decision is None:
            return None
        offered = context.offers.of_decision(decision)
        making = asyncio.create_task(context.offers.offer(offered))
        try:
            await self._while_working(making, lambda: messages.Progress(phase="staging", detail="gathering manifests"))
            offer = making.result()
        except UnavailableError as error:
            logger.info("run %s: no offer for rank %d yet: %s", session.run, session.rank, error)
            return None
        if context.offer_due(session) is not decision:
            return None
        session.offered = offered
        return offer

    async def _fetch(self, session: Session, message: messages.Fetch) -> None:
        offered = session.offered
        if session.phase is not SessionPhase.RESTORING or offered is None or offered.offer_id != message.decision_id:
            raise UnavailableError(
                f"rank {session.rank} was not offered decision {message.decision_id:.40}; ask with Restore",
                reason=CHANGED,
            )
        await self.answer_fetch(offered, message)

    async def answer_fetch(self, offered: Offered, message: messages.Fetch) -> None:
        """Have the chunks here, saying how far that is, and send their descriptors."""
        offers, work = self._context.offers, Work()

        def progress() -> messages.Progress:
            offers.check(offered)  # a peer that does not answer is not waited for once something else is decided
            return messages.Progress(
                phase="staging",
                detail=f"chunks of step {offered.base.step}",
                done_bytes=work.done_bytes,
                total_bytes=work.total_bytes,
            )

        fetching = asyncio.create_task(offers.fetch(offered, message, work))
        await self._while_working(fetching, progress)
        answer, fds = fetching.result()
        try:
            await self._send(answer, fds)
        finally:
            close_fds(fds)

    async def _while_working(self, task: asyncio.Task[Any], progress: Callable[[], messages.Progress]) -> None:
        """Until ``task`` is done, tell the trainer about it now and then; ends it when the trainer has gone."""
        try:
            while not (await asyncio.wait({task}, timeout=PROGRESS_S))[0]:
                if self._connection.is_lost:
                    raise ConnectionError("the trainer left while it was waiting")
                await self._send(progress())
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    def _check_current(self, session: Session) -> None:
        current = self._context.current_world(session.run)
        if session.phase is not SessionPhase.TRAINING:
            raise UsageError(f"rank {session.rank} must restore() first", reason="not_restored")
        if current not in ("", session.world_id):
            raise StaleGenerationError(
                f"rank {session.rank} belongs to world {session.world_id}; run {session.run} is world {current} now: "
                "this trainer must stop",
                reason="stale_world",
            )

    async def _gate(self, session: Session, message: messages.Gate) -> None:
        """Wait until the coordinator has compared what all ranks loaded."""
        self._check_current(session)
        context, loop = self._context, asyncio.get_running_loop()
        gate_relay.take_gate(session, message)
        context.changed()
        deadline, told_at = loop.time() + min(message.deadline_s, MAX_GATE_S), 0.0
        while (answer := gate_relay.answer_gate(session, context.run_desired(session.run))) is None:
            if loop.time() > deadline:
                raise UnavailableError(
                    f"run {session.run}: not all ranks said within {message.deadline_s:g} s what they loaded",
                    reason="deadline",
                )
            if self._connection.is_lost:
                raise ConnectionError("the trainer left while it was waiting")
            if loop.time() - told_at >= PROGRESS_S:
                await self._send(messages.Progress(phase="comparing", detail="what all ranks loaded"))
                told_at = loop.time()
            await context.bell.wait(min(PROGRESS_S, max(0.0, deadline - loop.time())))
            self._check_current(session)
        context.changed()
        await self._send(answer)

    def _take_back(self, session: Session, step: int) -> None:
        """Nothing was captured into what was reserved ahead for ``step``, which may be reserved again, or one before it."""
        for grant in [grant for grant in session.grants.values() if grant.step == step]:
            del session.grants[grant.slot_id]
            self._context.store.slots.put_back(grant)
            session.forget_step(step)

    async def _reserve(self, session: Session, message: messages.Reserve) -> None:
        self._check_current(session)
        desired = self._context.run_desired(session.run)
        self._take_back(session, message.step)  # one reserved ahead that turned out to be of the wrong size
        newest = max(session.last_step, session.reserved_step, session.skipped_step)
        if message.step <= newest:
            raise UsageError(
                f"step {message.step} is not after step {newest}",
                reason="step_not_increasing",
            )
        if message.size_bytes <= 0:
            raise UsageError(f"invalid shard size: {message.size_bytes} bytes", reason="bad_size")
        try:
            with self._context.metrics.stage_seconds.labels(stage="reserve").time():
                grant = await self._await_slot(session, message)
        except CapacityError as error:
            self._skip(session, message.step, str(error))
            raise
        desired = self._context.run_desired(session.run)
        words: dict[str, Any] = {"redundancy": desired.redundancy, "protected_step": desired.protected_step}
        words["notice"] = _notice(session, desired)
        schedule = messages.ScheduleBody(**json_records.to_json(desired.schedule))
        if grant is None:
            reason = "no slot came free"
            can_come = desired.is_release_possible and self._context.is_coordinator_connected()
            if not self._context.is_coordinator_connected():
                reason = "no slot is free, and none is released while the coordinator is away"
            elif not desired.is_release_possible:
                reason = "no slot is free, and none can be released now"
            # a rank that keeps its base for the time of its probation says nothing of how fast snapshots come
            self._skip(session, message.step, reason, is_short_of_slots=can_come and desired.extra_slots == 0)
            await self._send(messages.Skipped(reason=reason, schedule=schedule, **words))
            return
        session.grants[grant.slot_id] = grant
        limit = messages.request_limit(grant.size_bytes)
        self._connection.max_frame_bytes = max(self._connection.max_frame_bytes, limit)
        session.reserved_step = message.step
        if not message.is_ahead:
            session.last_step = message.step
        fds = () if grant.slot_id in message.known_slots else (grant.fd,)
        reply = messages.Reserved(slot_id=grant.slot_id, size_bytes=grant.size_bytes, schedule=schedule, **words)
        await self._send(reply, fds)

    def _skip(self, session: Session, step: int, reason: str, *, is_short_of_slots: bool = False) -> None:
        """The rank goes past ``step`` without a slot."""
        if session.skip(step, reason, is_short_of_slots=is_short_of_slots):
            self._context.metrics.shards.of(session.run, result="skipped").inc()
        self._context.changed()

    async def _await_slot(self, session: Session, message: messages.Reserve) -> Grant | None:
        context, loop = self._context, asyncio.get_running_loop()
        index = context.store.index(session.run)
        deadline = loop.time() + min(message.wait_s, MAX_WAIT_S)
        while True:
            desired = context.run_desired(session.run)
            found = self._take(session, message, index, desired)
            if isinstance(found, Grant):
                return found
            if isinstance(found, Allocation):
                return await self._allocate(session, found, message.step)
            can_come = desired.is_release_possible and context.is_coordinator_connected()
            if not can_come or loop.time() >= deadline or self._connection.is_lost:
                return None
            await context.bell.wait(min(READER_POLL_S, deadline - loop.time()))
            self._check_current(session)

    def _take(
        self, session: Session, message: messages.Reserve, index: RunIndex, desired: RunDesired
    ) -> Grant | Allocation | None:
        """A slot, or one to make; of the extra ones only if there is room."""

        def take(limit: int) -> Grant | Allocation | None:
            return self._context.store.slots.take(
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
        slots = self._context.store.slots
        try:
            await asyncio.to_thread(allocate, allocation)
            self._check_current(session)
            if session.run not in self._context.store.runs or session not in list(self._sessions):
                raise UnavailableError("the session ended while its slot was being made", reason="session_ended")
        except BaseException:
            slots.give_up(allocation)
            raise
        return slots.add(allocation, step=step, holder=session.holder.record)

    def _commit(self, session: Session, message: messages.Commit) -> messages.Committed:
        metrics = self._context.metrics
        self._check_current(session)
        session.note_cost(*gauges.note_cost(metrics, session.run, message.cost))
        grant = session.grants.get(message.slot_id)
        if grant is None or grant.step != message.step:
            raise UnavailableError(
                f"slot {message.slot_id} is not granted to rank {session.rank} for step {message.step} (any more)",
                reason="no_grant",
            )
        try:
            is_ours = functools.partial(_check_identity, session, grant)
            with metrics.stage_seconds.labels(stage="commit").time():
                shard = self._context.store.slots.commit(grant, message.manifest, check=is_ours)
        except BackstayError as error:
            self._give_back(session, grant, f"commit refused: {error}", result="refused")
            raise
        del session.grants[grant.slot_id]
        session.last_step = max(session.last_step, message.step)
        metrics.shards.of(session.run, result="committed").inc()
        metrics.stage_bytes.of(session.run, stage="commit").inc(grant.size_bytes)
        metrics.committed_step.of(session.run).set(grant.step)
        metrics.committed_timestamp_seconds.of(session.run).set(self._context.clock.unix_s())
        self._context.changed()
        desired = self._context.run_desired(session.run)
        return messages.Committed(
            digest=shard.digest,
            schedule=messages.ScheduleBody(**json_records.to_json(desired.schedule)),
            redundancy=desired.redundancy,
            protected_step=desired.protected_step,
            notice=_notice(session, desired),
        )

    def _abandon(self, session: Session, message: messages.Abandon) -> None:
        reason = message.reason[:MAX_REASON] or "abandoned"
        session.note_cost(*gauges.note_cost(self._context.metrics, session.run, message.cost))
        if message.is_unused:  # the step may never come, and where the interval shrinks, one before it does
            self._take_back(session, message.step)
            self._context.changed()
            return
        is_short = message.is_short_of_slots and self._context.run_desired(session.run).extra_slots == 0
        granted = [grant for grant in session.grants.values() if grant.step == message.step]
        if granted:
            session.skip(message.step, reason, is_short_of_slots=is_short)
        else:
            self._skip(session, message.step, reason, is_short_of_slots=is_short)
        for grant in granted:
            self._give_back(session, grant, reason, result="torn")
        self._context.changed()

    def _give_back(self, session: Session, grant: Grant, reason: str, *, result: str) -> None:
        session.grants.pop(grant.slot_id, None)
        self._context.store.slots.put_back(grant)
        session.skip(grant.step, reason)
        self._context.metrics.shards.of(session.run, result=result).inc()
        self._context.changed()

    def _persist(self, session: Session) -> None:
        """Say to the coordinator that the newest protected snapshot should be on durable storage now."""
        self._check_current(session)
        desired = self._context.run_desired(session.run)
        if desired.storage is None and self._context.is_coordinator_connected():
            raise UsageError(
                "the coordinator has no durable storage; set persist_url in its configuration", reason="no_storage"
            )
        session.wish_step = max(1, desired.protected_step)
        self._context.changed()

    def _seal(self, session: Session, message: messages.Seal) -> None:
        """One rank says that all files of a step are written; every rank of the world hears it through the coordinator."""
        self._check_current(session)
        if message.step <= session.base_step:
            raise UsageError(
                f"step {message.step} cannot be sealed: this world began from step {session.base_step}",
                reason="step_not_increasing",
            )
        session.sealed_step = max(session.sealed_step, message.step)
        self._context.changed()

    async def _await_seal(self, session: Session, message: messages.AwaitSeal) -> messages.Sealed:
        context, loop = self._context, asyncio.get_running_loop()
        deadline = loop.time() + min(message.wait_s, MAX_WAIT_S)
        while True:
            self._check_current(session)
            desired = context.run_desired(session.run)
            is_ours = desired.world_id == session.world_id
            here = [s.sealed_step for s in self._sessions.of_run(session.run) if s.world_id == session.world_id]
            sealed = messages.Sealed(
                step=max([*here, desired.sealed_step if is_ours else 0]),
                protected_step=desired.protected_step,
                complete_step=desired.complete_step if is_ours else 0,
            )
            is_there = (
                sealed.complete_step >= message.complete_step
                if message.complete_step
                else sealed.step > message.after_step
            )
            if is_there or loop.time() >= deadline or self._connection.is_lost:
                return sealed
            await context.bell.wait(min(PROGRESS_S, deadline - loop.time()))

    def _finish(self, session: Session, message: messages.Finish) -> None:
        self._sessions.put_back(session)
        if message.keep:
            self._sessions.leave(session)
            return
        self._check_current(session)
        session.phase = SessionPhase.ENDED
        self._context.timeline.add("finished", session.run, f"rank {session.rank} finished at step {session.last_step}")
        self._context.changed()


def _notice(session: Session, desired: RunDesired) -> str:
    """What keeps the snapshots of this world from becoming complete; "" if nothing does."""
    missing = desired.missing
    is_ours = missing is not None and missing.is_training and missing.world_id == session.world_id
    return missing.sentence if missing is not None and is_ours else ""


def _check_step(message: Any) -> None:
    """Everything is counted on from a step: past MAX_COUNT nobody could."""
    step = getattr(message, "step", 0)
    if not 0 <= step < MAX_COUNT:
        raise UsageError(f"step {step} is out of range: a step is 0 to {MAX_COUNT - 1}", reason="bad_step")


def _check_identity(session: Session, grant: Grant, manifest: Manifest) -> None:
    found = {
        "run": manifest.run,
        "attempt": manifest.attempt,
        "step": manifest.step,
        "rank": manifest.rank,
        "world size": manifest.world_size,
        "world": manifest.world_id,
        "size": manifest.size_bytes,
    }
    expected = {
        "run": session.run,
        "attempt": session.attempt,
        "step": grant.step,
        "rank": session.rank,
        "world size": session.world_size,
        "world": session.world_id,
        "size": grant.size_bytes,
    }
    for name, value in expected.items():
        if found[name] != value:
            raise IntegrityError(
                f"the manifest says {name} {found[name]}, this session's is {value}; nothing was published",
                reason="wrong_identity",
            )


def close_fds(fds: tuple[int, ...]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
