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
from backstayd.node.session import Session, check_reported_size
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
        """Drop all sessions; their trainers continue, and attach to the next daemon."""
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
                f"rank {session.rank} belongs to world {session.world_id}, but the current world of run {session.run} is "
                f"{current}; stop this trainer",
                reason="stale_world",
            )

    def fence(self, run: str, world_id: str) -> None:
        """Let only ``world_id`` write from now on: take back the slots of other worlds."""
        for session in self.of_run(run):
            if session.world_id != world_id and session.grants:
                logger.warning("run %s: fenced off rank %d of the older world %s", run, session.rank, session.world_id)
                self.put_back(session)

    def put_back(self, session: Session) -> None:
        """End every grant of a session without a commit."""
        for grant in session.grants.values():
            session.skip(grant.step, "the capture was not finished")
            self._node.metrics.shards.of(session.run, result="lost").inc()
            self._node.store.slots.put_back(grant)
        session.grants.clear()

    def end_lost(self) -> None:
        """Drop sessions without a connection for a lease, though their process lives; called periodically."""
        now = self._node.clock.monotonic_s()
        for session in self:
            if session.phase is SessionPhase.ENDED:
                continue
            if session.lost_at_s and now - session.lost_at_s > self._node.lease_s:
                self._end(session, "it closed its connection")

    def attach(self, sock: socket.socket, message: messages.Attach) -> Session:
        """A new session for the process at the other end of ``sock``; raises BackstayError if it may have none."""
        _check_attach(message)
        credentials = peer_credentials(sock)
        holder = peer_holder(sock)
        if holder is None:
            raise UsageError(
                f"the daemon cannot see process {credentials.pid}, which attaches; run both in one pid namespace",
                reason="no_process",
            )
        try:
            check_owner(self._node, message.run, credentials.uid)
            former = self._former(message, holder)
            check_trainers(self, credentials.uid, former=former)
            check_names(self._node.store, message.run, credentials.uid)
            if message.attempt:
                self._check_reattach(message)
            session = self._make(message, holder, uid=credentials.uid)
            check_reported_size(session)
        except BaseException:
            holder.close()
            if not self.of_run(message.run):
                self._node.store.drop_unused(message.run)
            raise
        if former is not None:
            session.skipped_step, session.skip_reason = former.skipped_step, former.skip_reason
            session.skip_cause = former.skip_cause
            session.gate = former.gate
        self._add(session)
        if former is not None:  # only now: the run's name is dropped with its last session
            self.drop(former)
        logger.info(
            "run %s: rank %d of %d attached (world %s, pid %d%s)",
            session.run, session.rank, session.world_size, session.world_id, holder.record.pid,
            f", attempt {message.attempt}" if message.attempt else "",
        )  # fmt: skip
        return session

    def _make(self, message: messages.Attach, holder: Holder, *, uid: int) -> Session:
        """The session of a trainer that starts, or of one that trains on after its daemon was replaced."""
        index = self._node.store.open_run(message.run, uid=uid)
        session = Session(
            session_id=secrets.token_hex(8),
            run=message.run,
            world_id=message.world_id,
            rank=message.rank,
            world_size=message.world_size,
            needs=message.needs,
            layout=message.layout,
            collective_timeout_s=message.collective_timeout_s,
            uid=uid,
            holder=holder,
        )
        if message.attempt:
            decision = self._node.decision_of(message.run) or self._node.run_desired(message.run).decision
            session.phase, session.attempt = SessionPhase.TRAINING, message.attempt
            session.base_step = decision.base.step if decision is not None and decision.base is not None else 0
            session.last_step = max(session.base_step, index.last_step(message.attempt, message.rank))
        return session

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
                f"rank {message.rank} of {message.world_size} of run {message.run} trains attempt {message.attempt} of world "
                f"{message.world_id}, but the current world here is {current or 'unknown'}; restart this trainer so that it "
                "restores",
                reason="stale_world",
            )

    def _former(self, message: messages.Attach, holder: Holder) -> Session | None:
        """The session that this one replaces; raises UsageError if another living process is that rank of that world."""
        for session in self.of_run(message.run):
            if (session.world_id, session.rank) == (message.world_id, message.rank):
                if session.holder.record != holder.record and session.holder.is_alive:
                    raise UsageError(
                        f"rank {message.rank} of world {message.world_id} is already attached, as process "
                        f"{session.holder.record.pid}; end that one first",
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

    def lost(self, session: Session) -> None:
        """Its connection is gone; a trainer that trains has a lease to reconnect."""
        if not self.is_attached(session) or session.phase is SessionPhase.ENDED:
            return
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
        """Remove the session, and with the last one of a run its name if no data is stored under it."""
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
