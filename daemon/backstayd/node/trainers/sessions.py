"""The trainers attached to this node: attaching, watching for death, fencing off old worlds.

A trainer is dead when its pidfd says so: a forked worker may keep the socket of a dead trainer open.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import Iterator
from typing import Final

from backstay import __version__
from backstay.errors import StaleGenerationError, UsageError
from backstay.format import versions
from backstay.ids import MAX_WORLD_SIZE, RunKey
from backstay.protocol import messages
from backstayd.core.messages.report import SessionPhase
from backstayd.node.node_state import NodeState
from backstayd.node.session import Session, check_said
from backstayd.node.trainers.users import check_names, check_owner, check_trainers
from backstayd.store.slot_holder import Holder, peer_credentials, peer_holder

logger = logging.getLogger(__name__)

MAX_WORLD_ID: Final = 100  # characters; it travels in every report
MAX_LAYOUT: Final = 100  # it travels in the reports of its shards


class Sessions:
    """All sessions of the node. Invariant: one session per (run, world, rank)."""

    def __init__(self, node: NodeState) -> None:
        self._node = node
        self._sessions: dict[str, Session] = {}

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

    def close(self) -> None:
        """Drop all sessions; trainers go on and attach to the next daemon."""
        for session in self:
            self.drop(session)

    def is_attached(self, session: Session) -> bool:
        return self._sessions.get(session.session_id) is session

    def check_current(self, session: Session) -> None:
        """Raise unless ``session`` trains in the current world of its run."""
        current = self._node.current_world(session.run)
        if session.phase is not SessionPhase.TRAINING:
            raise UsageError(f"rank {session.rank} must restore() first", reason="not_restored")
        if current not in ("", session.world_id):
            raise StaleGenerationError(
                f"rank {session.rank} belongs to world {session.world_id}; run {session.run} is world {current} now: "
                "this trainer must stop",
                reason="stale_world",
            )

    def fence(self, run: str, world_id: str) -> None:
        """Only ``world_id`` may write from now on: take back what other worlds were granted."""
        for session in self.of_run(run):
            if session.world_id != world_id and session.grants:
                logger.warning("run %s: rank %d of world %s is fenced off", run, session.rank, session.world_id)
                self.put_back(session)

    def put_back(self, session: Session) -> None:
        """End every grant of a session without a commit."""
        for grant in session.grants.values():
            session.skip(grant.step, "the capture did not end")
            self._node.metrics.shards.of(session.run, result="lost").inc()
            self._node.store.slots.put_back(grant)
        session.grants.clear()

    def end_lost(self) -> None:
        """Drop sessions that have been without a connection for a lease though their process lives; called now and then."""
        now = self._node.clock.monotonic_s()
        for session in self:
            if session.phase is SessionPhase.ENDED:
                continue
            if session.lost_at_s and now - session.lost_at_s > self._node.lease_s:
                self._end(session, "it closed its connection")

    def attach(self, sock: socket.socket, message: messages.Attach) -> tuple[Session, messages.Attached]:
        """Make a session of the process at the other end of ``sock``; raises BackstayError if it may have none."""
        node = self._node
        _check_attach(message)
        credentials = peer_credentials(sock)
        holder = peer_holder(sock)
        if holder is None:
            raise UsageError(
                f"the process {credentials.pid} that attaches is not visible to the daemon; run both in one pid namespace",
                reason="no_process",
            )
        try:
            check_owner(node, message.run, credentials.uid)
            former = self._former(message, holder)
            check_trainers(self, credentials.uid, former=former)
            check_names(node.store, message.run, credentials.uid)
            if message.attempt:
                self._check_reattach(message)
            index = node.store.open_run(message.run, uid=credentials.uid)
        except BaseException:
            holder.close()
            if not self.of_run(message.run):
                node.store.drop_unused(message.run)
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
        )
        if message.attempt:
            decision = node.decision_of(message.run) or node.run_desired(message.run).decision
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
            session.skip_cause = former.skip_cause
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
            incarnation=node.identity.incarnation,
            lease_s=node.lease_s,
            protocol=min(message.protocol, messages.PROTOCOL_VERSION),
            daemon_version=node.identity.version,
            node=node.identity.name,
        )
        return session, attached

    def _check_reattach(self, message: messages.Attach) -> None:
        node = self._node
        current = node.current_world(message.run)
        decisions = [node.decision_of(message.run), node.run_desired(message.run).decision]
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
        self._node.changed()

    def _died(self, session: Session) -> None:
        if session.phase is SessionPhase.ENDED:  # stays in the report until the run is forgotten or a new world comes
            self._unwatch(session)
            self.put_back(session)
            return
        self._end(session, f"its process {session.holder.record.pid} is dead")

    def lost(self, bound: list[Session]) -> None:
        """The connection of these sessions is gone; one that trains has a lease to come back."""
        for session in bound:
            if not self.is_attached(session) or session.phase is SessionPhase.ENDED:
                continue
            session.lost_at_s = self._node.clock.monotonic_s()
            if session.phase is not SessionPhase.TRAINING:
                self._end(session, "it closed its connection")

    def _end(self, session: Session, why: str) -> None:
        sentence = f"run {session.run}: rank {session.rank} ({session.phase}) left: {why}"
        logger.info("%s", sentence)
        self._node.timeline.add("session_lost", session.run, sentence)
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
            self._node.store.drop_unused(session.run)
        self._host()
        self._node.changed()

    def _unwatch(self, session: Session) -> None:
        if session.holder.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(session.holder.pidfd)

    def _host(self) -> None:
        hosted = {(session.run, session.rank): session.world_size for session in self}
        self._node.store.slots.hosted = hosted
        counts: dict[str, int] = {}
        for run, _ in hosted:
            counts[run] = counts.get(run, 0) + 1
        for run in self._node.store.runs:
            self._node.metrics.sessions.of(run).set(counts.get(run, 0))


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
