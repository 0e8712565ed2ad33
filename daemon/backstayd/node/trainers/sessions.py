"""The trainers attached to this node: accepting, attaching, watching for death, fencing off old worlds.

Requests of an attached trainer are in ``requests``; this module decides who is attached at all. Death is what a pidfd
says: a forked worker may keep the socket of a dead trainer open.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from backstay import __version__
from backstay.errors import BackstayError, StaleGenerationError, UnavailableError, UsageError
from backstay.format import versions
from backstay.ids import MAX_WORLD_SIZE, RunKey
from backstay.protocol import messages
from backstayd.core.messages.report import SessionPhase
from backstayd.node.node_state import NodeContext
from backstayd.node.restores.chunk_offer import Offered
from backstayd.node.restores.read_only_access import Visits
from backstayd.node.trainers.connection import Connection
from backstayd.node.trainers.ownership import check_owner, document_for
from backstayd.node.trainers.requests import Requests
from backstayd.node.trainers.session import RestoreAnswer, Session, check_said
from backstayd.node.trainers.user_limits import Places, check_names, check_trainers
from backstayd.security.refusals import Refusals
from backstayd.store.slot_holder import Holder, peer_credentials, peer_holder

logger = logging.getLogger(__name__)

MAX_WORLD_ID: Final = 100  # characters; it travels in every report
MAX_LAYOUT: Final = 100  # it travels in the reports of its shards
ATTACH_TIMEOUT_S: Final = 10.0  # such a connection says what it wants, or is closed


@dataclass(slots=True)
class _Caller:
    """Who speaks on one connection: an attached trainer, somebody who reads a snapshot, both, or nobody yet."""

    sock: socket.socket
    connection: Connection
    bound: list[Session]
    visit: Offered | None = None


class Sessions:
    """All sessions of the node. Invariant: one session per (run, world, rank)."""

    def __init__(self, context: NodeContext) -> None:
        self._context = context
        self._sessions: dict[str, Session] = {}
        self._places = Places()
        self._refusals = Refusals(logger)
        self._open: set[Connection] = set()
        self._visits = Visits(context)
        self.attach_timeout_s = ATTACH_TIMEOUT_S

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

    def of_run(self, run: str) -> list[Session]:
        return [session for session in self if session.run == run]

    def waiting(self, run: str, world_id: str) -> list[Session]:
        """Sessions of that world whose restore() is waiting for an answer."""
        return [
            session
            for session in self.of_run(run)
            if session.world_id == world_id and session.answer is not None and not session.answer.done()
        ]

    async def serve(self, listener: socket.socket) -> None:
        """Accept trainers until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:
                logger.warning("cannot accept a trainer: %s", error)
                await asyncio.sleep(0.1)  # out of descriptors: try again when some came free
                continue
            uid = peer_credentials(connection).uid
            if self._places.is_full(uid):
                logger.debug("user %d has too many connections; another one is closed", uid)
                connection.close()
                continue
            self._places.enter(asyncio.create_task(self._serve_connection(connection)), uid)

    async def close(self) -> None:
        """Close all connections; trainers go on and attach to the next daemon."""
        tasks = self._places.tasks
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for session in self:
            self.drop(session)

    def fence(self, run: str, world_id: str) -> None:
        """Only ``world_id`` may write from now on: take back what other worlds were granted."""
        for session in self.of_run(run):
            if session.world_id != world_id and session.grants:
                logger.warning("run %s: rank %d of world %s is fenced off", run, session.rank, session.world_id)
                self.put_back(session)

    def end_run(self, run: str) -> None:
        """The run is forgotten: its sessions are no more."""
        for session in self.of_run(run):
            if session.answer is not None and not session.answer.done():
                error = messages.Error(
                    error_class=UnavailableError.__name__, reason="forgotten", message=f"run {run} was forgotten"
                )
                session.answer.set_result(RestoreAnswer(message=error))
            self.drop(session)

    def put_back(self, session: Session) -> None:
        """End every grant of a session without a commit."""
        for grant in session.grants.values():
            session.skip(grant.step, "the capture did not end")
            self._context.metrics.shards.of(session.run, result="lost").inc()
            self._context.store.slots.put_back(grant)
        session.grants.clear()

    def end_lost(self) -> None:
        """Drop sessions that have been without a connection for a lease though their process lives; called now and then."""
        now = self._context.clock.monotonic_s()
        for session in self:
            if session.phase is SessionPhase.ENDED:
                continue
            if session.lost_at_s and now - session.lost_at_s > self._context.lease_s:
                self._end(session, "it closed its connection")

    async def _serve_connection(self, sock: socket.socket) -> None:
        bound: list[Session] = []
        connection = Connection(sock, lambda: self._lost(bound))
        caller = _Caller(sock, connection, bound)
        self._open.add(connection)
        try:
            while (received := await self._next_frame(caller)) is not None:
                message, message_id = received
                try:
                    await self._answer(caller, message, message_id)
                except BackstayError as error:
                    reply_error = messages.Error(
                        error_class=type(error).__name__, reason=error.reason, message=str(error)
                    )
                    await connection.send(reply_error, message_id=message_id)
        except (ConnectionError, TimeoutError, OSError) as error:
            logger.debug("connection ended: %s", error)
        except Exception as error:  # noqa: BLE001 - the boundary of a trainer's connection: the daemon goes on
            text = f"a trainer's request failed ({error!r:.200}); its connection is closed"
            self._refusals.note(text, cause=repr(type(error)), level=logging.ERROR, error=error)
        finally:
            self._end_visit(caller)
            self._open.discard(connection)
            connection.close()

    async def _answer(self, caller: _Caller, message: Any, message_id: int) -> None:
        connection, bound, visit = caller.connection, caller.bound, caller.visit
        requests = Requests(self._context, self, connection, message_id)
        if isinstance(message, messages.Attach):
            session, reply = self._attach(caller.sock, connection, message)
            bound[:] = [session]
            self._places.note(asyncio.current_task(), is_known=True)
            connection.max_frame_bytes = max(connection.max_frame_bytes, messages.request_limit(0))
            await connection.send(reply, message_id=message_id)
        elif isinstance(message, messages.Status):
            document = document_for(self._context, peer_credentials(caller.sock).uid)
            await connection.send(messages.StatusBody(document=document), message_id=message_id)
        elif isinstance(message, messages.Open):
            self._end_visit(caller)
            caller.visit, offer = await self._visits.open(message, uid=peer_credentials(caller.sock).uid)
            connection.max_frame_bytes = max(connection.max_frame_bytes, messages.request_limit(0))
            await connection.send(offer, message_id=message_id)
        elif visit is not None and isinstance(message, messages.Fetch) and message.decision_id == visit.offer_id:
            await requests.answer_fetch(visit, message)
        elif not bound or self._sessions.get(bound[0].session_id) is not bound[0]:
            raise UnavailableError("not attached (any more): attach first", reason="not_attached")
        else:
            await requests.handle(bound[0], message)

    def _end_visit(self, caller: _Caller) -> None:
        if caller.visit is not None:
            self._visits.close(caller.visit, uid=peer_credentials(caller.sock).uid)
            caller.visit = None

    async def _next_frame(self, caller: _Caller) -> tuple[Any, int] | None:
        is_attached = any(self._sessions.get(session.session_id) is session for session in caller.bound)
        is_known = is_attached or caller.visit is not None
        self._places.note(asyncio.current_task(), is_known=is_known)
        async with asyncio.timeout(None if is_known else self.attach_timeout_s):
            return await caller.connection.receive()

    def _attach(
        self, sock: socket.socket, connection: Connection, message: messages.Attach
    ) -> tuple[Session, messages.Attached]:
        context = self._context
        _check_attach(message)
        credentials = peer_credentials(sock)
        holder = peer_holder(sock)
        if holder is None:
            raise UsageError(
                f"the process {credentials.pid} that attaches is not visible to the daemon; run both in one pid namespace",
                reason="no_process",
            )
        try:
            check_owner(context, message.run, credentials.uid)
            former = self._former(message, holder)
            check_trainers(self, credentials.uid, former=former)
            check_names(context.store, message.run, credentials.uid)
            if message.attempt:
                self._check_reattach(message)
            index = context.store.open_run(message.run, uid=credentials.uid)
        except BaseException:
            holder.close()
            if not self.of_run(message.run):
                context.store.drop_unused(message.run)
            raise
        session = Session(
            session_id=secrets.token_hex(8),
            run=message.run,
            world_id=message.world_id,
            rank=message.rank,
            world_size=message.world_size,
            needs=message.needs,
            layout=message.layout,
            collective_timeout_s=message.collective_timeout_s,
            uid=credentials.uid,
            holder=holder,
            connection=connection,
        )
        if message.attempt:
            decision = context.decision_of(message.run) or context.run_desired(message.run).decision
            session.phase, session.attempt = SessionPhase.TRAINING, message.attempt
            session.base_step = decision.base.step if decision is not None and decision.base is not None else 0
            session.last_step = max(session.base_step, index.last_step(message.attempt, message.rank))
        try:
            check_said(session)
        except BaseException:
            holder.close()
            raise
        if former is not None:
            session.skipped_step, session.skip_reason = former.skipped_step, former.skip_reason
            session.gate = former.gate
        self._add(session)
        if former is not None:  # now: the name goes with its last session
            self.drop(former)
        logger.info(
            "run %s: rank %d of %d attached (world %s, pid %d%s)",
            session.run, session.rank, session.world_size, session.world_id, holder.record.pid,
            f", attempt {message.attempt}" if message.attempt else "",
        )  # fmt: skip
        attached = messages.Attached(
            session_id=session.session_id,
            incarnation=context.identity.incarnation,
            lease_s=context.lease_s,
            protocol=min(message.protocol, messages.PROTOCOL_VERSION),
            daemon_version=context.identity.version,
            node=context.identity.name,
        )
        return session, attached

    def _check_reattach(self, message: messages.Attach) -> None:
        context = self._context
        current = context.current_world(message.run)
        decisions = [context.decision_of(message.run), context.run_desired(message.run).decision]
        is_known = any(
            decision is not None
            and (decision.world_id, decision.attempt, decision.world_size)
            == (message.world_id, message.attempt, message.world_size)
            and any(place.rank == message.rank for place in decision.placements)
            for decision in decisions
        )
        if current not in ("", message.world_id) or not is_known:
            raise StaleGenerationError(
                f"rank {message.rank} of {message.world_size} of run {message.run} writes attempt {message.attempt} of world "
                f"{message.world_id}, "
                f"which is not the current one here ({current or 'none'}); this trainer must restart and restore",
                reason="stale_world",
            )

    def _former(self, message: messages.Attach, holder: Holder) -> Session | None:
        """The session this one replaces; raises UsageError if another living process is that rank of that world."""
        for session in self.of_run(message.run):
            if (session.world_id, session.rank) == (message.world_id, message.rank):
                if session.holder.record != holder.record and session.holder.is_alive:
                    raise UsageError(
                        f"rank {message.rank} of world {message.world_id} is process {session.holder.record.pid} already",
                        reason="rank_taken",
                    )
                return session
        return None

    def _add(self, session: Session) -> None:
        self._sessions[session.session_id] = session
        asyncio.get_running_loop().add_reader(session.holder.pidfd, self._died, session)
        self._host()
        self._context.changed()

    def _died(self, session: Session) -> None:
        if session.phase is SessionPhase.ENDED:  # stays in the report until the run is forgotten or a new world comes
            self._unwatch(session)
            self.put_back(session)
            return
        self._end(session, f"its process {session.holder.record.pid} is dead")

    def _lost(self, bound: list[Session]) -> None:
        for session in bound:
            if self._sessions.get(session.session_id) is not session or session.phase is SessionPhase.ENDED:
                continue
            session.connection = None
            session.lost_at_s = self._context.clock.monotonic_s()
            if session.phase is not SessionPhase.TRAINING:
                self._end(session, "it closed its connection")

    def _end(self, session: Session, why: str) -> None:
        sentence = f"run {session.run}: rank {session.rank} ({session.phase}) left: {why}"
        logger.info("%s", sentence)
        self._context.timeline.add("session_lost", session.run, sentence)
        self.drop(session)

    def drop_ended(self, run: str, current_world: str) -> None:
        """Forget sessions that finished in an older world."""
        for session in self.of_run(run) if current_world else ():
            if session.phase is SessionPhase.ENDED and session.world_id != current_world:
                self.drop(session)

    def leave(self, session: Session) -> None:
        """The trainer detaches; the memory stays."""
        self._end(session, "it finished and keeps its memory")

    def drop(self, session: Session) -> None:
        """The session is no more; a name under which nothing lies goes with the last one."""
        if self._sessions.pop(session.session_id, None) is None:
            return
        self._unwatch(session)
        self.put_back(session)
        if session.answer is not None and not session.answer.done():
            session.answer.cancel()
        session.holder.close()
        if not self.of_run(session.run):
            self._context.store.drop_unused(session.run)
        self._host()
        self._context.changed()

    def _unwatch(self, session: Session) -> None:
        if session.holder.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(session.holder.pidfd)

    def _host(self) -> None:
        hosted = {(session.run, session.rank): session.world_size for session in self}
        self._context.store.slots.hosted = hosted
        counts: dict[str, int] = {}
        for run, _ in hosted:
            counts[run] = counts.get(run, 0) + 1
        for run in self._context.store.runs:
            self._context.metrics.sessions.of(run).set(counts.get(run, 0))


def _check_attach(message: messages.Attach) -> None:
    trainer = versions.Side(name="the trainer", release=message.client_version, protocol=message.protocol)
    own = versions.Side(name="this daemon", release=__version__, protocol=messages.PROTOCOL_VERSION)
    problem = versions.why_apart(own, trainer)
    if problem:
        raise UsageError(problem, reason="bad_protocol")
    RunKey.parse(message.run)
    if not 0 < message.world_size <= MAX_WORLD_SIZE or not 0 <= message.rank < message.world_size:
        raise UsageError(f"rank {message.rank} is out of range for world size {message.world_size}", reason="bad_rank")
    if len(message.layout) > MAX_LAYOUT:
        raise UsageError(f"a layout has at most {MAX_LAYOUT} characters", reason="bad_attach")
    if not 0 < len(message.world_id) <= MAX_WORLD_ID:
        raise UsageError(f"a world id has 1 to {MAX_WORLD_ID} characters", reason="bad_attach")
    if any(not 0 <= rank < message.world_size for rank in message.needs):
        raise UsageError(f"a needed rank is out of range for world size {message.world_size}", reason="bad_attach")
