"""What an attached trainer can ask of its run, from restore to finish: each request is answered once.

A world that is not the current one gets StaleGenerationError.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from backstay.errors import UsageError
from backstay.ids import MAX_COUNT
from backstay.protocol import messages
from backstayd.core.messages.decisions import Staging
from backstayd.core.messages.report import SessionPhase
from backstayd.node.node_state import NodeState
from backstayd.node.restores.chunks import Chunks
from backstayd.node.session import Offered, Session
from backstayd.node.trainers import gate_relay
from backstayd.node.trainers.connection import MAX_WAIT_S, PROGRESS_S, Call
from backstayd.node.trainers.restore_requests import RestoreRequests
from backstayd.node.trainers.sessions import Sessions
from backstayd.node.trainers.slot_requests import SlotRequests
from backstayd.node.trainers.users import check_owner


class Requests:
    """Answers requests of attached trainers. ``staging``: as for :class:`RestoreRequests`."""

    def __init__(
        self, node: NodeState, sessions: Sessions, chunks: Chunks, staging: Callable[[str], Staging | None]
    ) -> None:
        self._node = node
        self._sessions = sessions
        self._restores = RestoreRequests(node, chunks, staging)
        self._slots = SlotRequests(node, sessions)

    async def answer_fetch(self, call: Call, offered: Offered, message: messages.Fetch) -> None:
        """A Fetch of a reader of ``offered`` that has no session."""
        await self._restores.answer_fetch(call, offered, message)

    async def handle(self, call: Call, session: Session, message: Any) -> None:
        """Answer ``message``; raises BackstayError to refuse it, ConnectionError when the trainer is gone."""
        check_owner(self._node, session.run, session.uid)
        _check_step(message)
        if isinstance(message, messages.Restore):
            await self._restores.restore(call, session, message)
        elif isinstance(message, messages.Fetch):
            await self._restores.fetch(call, session, message)
        elif isinstance(message, messages.Reserve):
            await self._slots.reserve(call, session, message)
        elif isinstance(message, messages.Commit):
            await call.send(self._slots.commit(session, message))
        elif isinstance(message, messages.AwaitSeal):
            await call.send(await self._await_seal(call, session, message))
        elif isinstance(message, messages.Gate):
            await gate_relay.compare(self._node, self._sessions, call, session, message)
        else:
            self._obey(session, message)
            await call.send(messages.Done())

    def _obey(self, session: Session, message: Any) -> None:
        """Carry out a request whose answer is Done."""
        if isinstance(message, messages.Abandon):
            self._slots.abandon(session, message)
        elif isinstance(message, messages.Seal):
            self._seal(session, message)
        elif isinstance(message, messages.Distrust):
            self._sessions.check_current(session)
            gate_relay.take_distrust(self._node, session, message)
        elif isinstance(message, messages.Persist):
            self._persist(session)
        elif isinstance(message, messages.Finish):
            self._finish(session, message)
        else:
            raise UsageError(f"unexpected message type {type(message).__name__}", reason="bad_request")

    def _persist(self, session: Session) -> None:
        """Have the report ask for a durable copy of the newest protected snapshot."""
        self._sessions.check_current(session)
        desired = self._node.run_desired(session.run)
        if desired.storage is None and self._node.link.is_connected:
            raise UsageError(
                "the coordinator has no durable storage; set persist_url in its configuration", reason="no_storage"
            )
        session.wish_step = max(1, desired.protected_step)
        self._node.changed()

    def _seal(self, session: Session, message: messages.Seal) -> None:
        """A rank declares that all files of a step are written; the coordinator passes it on to every rank of the world."""
        self._sessions.check_current(session)
        if message.step <= session.base_step:
            raise UsageError(
                f"cannot seal step {message.step}: this world began from step {session.base_step}",
                reason="step_not_increasing",
            )
        session.sealed_step = max(session.sealed_step, message.step)
        self._node.changed()

    async def _await_seal(self, call: Call, session: Session, message: messages.AwaitSeal) -> messages.Sealed:
        node, loop = self._node, asyncio.get_running_loop()
        deadline = loop.time() + min(message.wait_s, MAX_WAIT_S)
        while True:
            self._sessions.check_current(session)
            desired = node.run_desired(session.run)
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
            if is_there or loop.time() >= deadline or call.is_lost:
                return sealed
            await node.waiters.wait(min(PROGRESS_S, deadline - loop.time()))

    def _finish(self, session: Session, message: messages.Finish) -> None:
        self._sessions.put_back(session)
        if message.keep:
            self._sessions.leave(session)
            return
        self._sessions.check_current(session)
        session.phase = SessionPhase.ENDED
        self._node.timeline.add("finished", session.run, f"rank {session.rank} finished at step {session.last_step}")
        self._node.changed()


def _check_step(message: Any) -> None:
    """Raise UsageError for a step that is out of range: what is counted from it must fit as well."""
    step = getattr(message, "step", 0)
    if not 0 <= step < MAX_COUNT:
        raise UsageError(f"step {step} is out of range: a step is 0 to {MAX_COUNT - 1}", reason="bad_step")
