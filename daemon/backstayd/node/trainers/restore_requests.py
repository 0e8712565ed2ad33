"""Requests of a trainer that restores: wait for the decision of its world, choose chunks of an offer, fetch them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from backstay.errors import UnavailableError, UsageError
from backstay.protocol import framing, messages
from backstayd.core.messages.decisions import Staging
from backstayd.core.messages.report import SessionPhase
from backstayd.node.node_state import NodeState
from backstayd.node.restores import restore_answers
from backstayd.node.restores.chunks import CHANGED, Chunks, Work
from backstayd.node.session import Offered, RestoreAnswer, Session
from backstayd.node.trainers.connection import PROGRESS_S, Call
from backstayd.node.trainers.users import check_owner

logger = logging.getLogger(__name__)


class RestoreRequests:
    """Answers Restore and Fetch. ``staging``: what this node has staged of the decision of a run."""

    def __init__(self, node: NodeState, chunks: Chunks, staging: Callable[[str], Staging | None]) -> None:
        self._node = node
        self._chunks = chunks
        self._staging = staging

    async def restore(self, call: Call, session: Session, message: messages.Restore) -> None:
        if session.phase in (SessionPhase.TRAINING, SessionPhase.ENDED):
            raise UsageError(
                f"rank {session.rank} restored already; a new restore needs a new world", reason="restored_already"
            )
        session.phase, session.allow_fresh = SessionPhase.RESTORING, message.allow_fresh
        session.staged = message.staged
        answer = session.answer = asyncio.get_running_loop().create_future()
        self._node.changed()
        offer = await self._offer_or_answer(call, session, answer, deadline_s=message.deadline_s)
        session.answer = None
        if offer is not None:
            await call.send(offer)
            return
        if answer.cancelled():
            raise UnavailableError(f"the session of rank {session.rank} ended while it waited", reason="session_ended")
        result = answer.result()
        try:
            if isinstance(result.message, messages.Restored):
                session.phase, session.attempt = SessionPhase.TRAINING, result.attempt
                session.base_step = session.last_step = result.base_step
            else:
                session.phase = SessionPhase.ATTACHED
            self._node.changed()
            await call.send(result.message, result.fds)
        finally:
            framing.close_fds(list(result.fds))

    async def _offer_or_answer(
        self, call: Call, session: Session, answer: asyncio.Future[RestoreAnswer], *, deadline_s: float
    ) -> messages.Offer | None:
        """Send progress until there is an offer for the trainer (returned), or ``answer`` is done."""
        node, loop = self._node, asyncio.get_running_loop()
        deadline = loop.time() + deadline_s
        while not answer.done():
            progress = restore_answers.progress(node, session, self._staging)
            if loop.time() > deadline:
                session.phase, session.answer = SessionPhase.ATTACHED, None
                node.changed()
                raise UnavailableError(
                    f"run {session.run}: rank {session.rank} got no decision within {deadline_s:g} s "
                    f"({progress.phase}: {progress.detail})",
                    reason="deadline",
                )
            call.check()
            check_owner(node, session.run, session.uid)
            await call.send_progress(progress)
            offer = await self._try_offer(call, session)
            if offer is not None and not answer.done():
                return offer
            await node.waiters.wait(min(PROGRESS_S, deadline - loop.time()))
        return None

    async def _try_offer(self, call: Call, session: Session) -> messages.Offer | None:
        """The offer due now to a trainer of another layout; None if none is due, or while it cannot be made yet."""
        node = self._node
        decision = restore_answers.offer_due(node, session)
        if decision is None:
            return None
        offered = self._chunks.of_decision(decision)
        making = asyncio.create_task(self._chunks.offer(offered))
        try:
            await call.while_working(making, lambda: messages.Progress(phase="staging", detail="gathering manifests"))
            offer = making.result()
        except UnavailableError as error:
            logger.info("run %s: no offer for rank %d yet: %s", session.run, session.rank, error)
            return None
        if restore_answers.offer_due(node, session) is not decision:
            return None
        session.offered = offered
        return offer

    async def fetch(self, call: Call, session: Session, message: messages.Fetch) -> None:
        offered = session.offered
        if session.phase is not SessionPhase.RESTORING or offered is None or offered.offer_id != message.decision_id:
            raise UnavailableError(
                f"rank {session.rank} was not offered decision {message.decision_id:.40}; ask with Restore",
                reason=CHANGED,
            )
        await self.answer_fetch(call, offered, message)

    async def answer_fetch(self, call: Call, offered: Offered, message: messages.Fetch) -> None:
        """Bring the chunks here, sending progress, and send their descriptors."""
        chunks, work = self._chunks, Work()

        def progress() -> messages.Progress:
            chunks.check(offered)  # once something else is decided, nobody waits for a peer that does not answer
            return messages.Progress(
                phase="staging",
                detail=f"chunks of step {offered.base.step}",
                done_bytes=work.done_bytes,
                total_bytes=work.total_bytes,
            )

        fetching = asyncio.create_task(chunks.fetch(offered, message, work))
        await call.while_working(fetching, progress)
        answer, fds = fetching.result()
        try:
            await call.send(answer, fds)
        finally:
            framing.close_fds(list(fds))
