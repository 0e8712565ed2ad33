"""The local socket: accepts connections of trainers and readers, and answers their messages in order.

``sessions`` decides which trainers may attach, ``requests`` answers those that are attached.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any, Final

from backstay.errors import BackstayError, UnavailableError
from backstay.protocol import messages
from backstayd.node.node_state import NodeState
from backstayd.node.restores.read_only_access import Visits
from backstayd.node.session import Offered, Session
from backstayd.node.trainers.connection import Call, Connection
from backstayd.node.trainers.requests import Requests
from backstayd.node.trainers.sessions import Sessions
from backstayd.node.trainers.users import Connections, visible_to
from backstayd.security.refusals import Refusals
from backstayd.store.slot_holder import peer_credentials

logger = logging.getLogger(__name__)

ATTACH_TIMEOUT_S: Final = 10.0  # a connection that sends nothing for so long is closed


class _Caller:
    """Who uses one connection: an attached trainer (``session``), a reader of a snapshot (``visit``), both, or nobody yet."""

    def __init__(self, sock: socket.socket, sessions: Sessions) -> None:
        self.uid = peer_credentials(sock).uid
        self.sock = sock
        self.session: Session | None = None
        self.visit: Offered | None = None
        self._sessions = sessions
        self.connection = Connection(sock, self._on_lost)

    @property
    def is_attached(self) -> bool:
        return self.session is not None and self._sessions.is_attached(self.session)

    def _on_lost(self) -> None:
        if self.session is not None:
            self._sessions.lost(self.session)


class TrainerServer:
    """Serves the local socket. ``document`` makes the status document of this node."""

    def __init__(
        self,
        node: NodeState,
        sessions: Sessions,
        *,
        requests: Requests,
        visits: Visits,
        document: Callable[[], dict[str, Any]],
    ) -> None:
        self._node = node
        self._sessions = sessions
        self._requests = requests
        self._visits = visits
        self._document = document
        self._refusals = Refusals(logger)
        self.connections = Connections()
        self.attach_timeout_s = ATTACH_TIMEOUT_S

    async def serve(self, listener: socket.socket) -> None:
        """Accept trainers until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:
                logger.warning("cannot accept a trainer: %s", error)
                await asyncio.sleep(0.1)  # out of descriptors: try again when some are free
                continue
            uid = peer_credentials(connection).uid
            if self.connections.is_full(uid):
                logger.debug("user %d has too many connections; closing another one", uid)
                connection.close()
                continue
            self.connections.enter(asyncio.create_task(self._serve_connection(connection)), uid)

    async def close(self) -> None:
        """Close all connections, and with them all sessions."""
        tasks = self.connections.tasks
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._sessions.close()

    async def _serve_connection(self, sock: socket.socket) -> None:
        caller = _Caller(sock, self._sessions)
        try:
            while (received := await self._next_frame(caller)) is not None:
                message, message_id = received
                call = Call(caller.connection, message_id)
                try:
                    await self._answer(caller, call, message)
                except BackstayError as error:
                    await call.send(messages.Error.of(error))
        except (ConnectionError, TimeoutError, OSError) as error:
            logger.debug("connection ended: %s", error)
        except Exception as error:  # noqa: BLE001 - the boundary of a trainer's connection: the daemon continues
            text = f"a trainer's request failed ({error!r:.200}); closing its connection"
            self._refusals.note(text, cause=repr(type(error)), level=logging.ERROR, error=error)
        finally:
            self._end_visit(caller)
            caller.connection.close()

    async def _answer(self, caller: _Caller, call: Call, message: Any) -> None:
        if isinstance(message, messages.Attach):
            caller.session = self._sessions.attach(caller.sock, message)
            self.connections.note(asyncio.current_task(), is_known=True)
            call.allow_frames(messages.request_limit(0))
            await call.send(self._attached(caller.session, message))
        elif isinstance(message, messages.Status):
            await call.send(messages.StatusBody(document=visible_to(caller.uid, self._document(), self._node.store)))
        elif isinstance(message, messages.Open):
            self._end_visit(caller)
            caller.visit, offer = await self._visits.open(message, uid=caller.uid)
            call.allow_frames(messages.request_limit(0))
            await call.send(offer)
        elif (visit := caller.visit) and isinstance(message, messages.Fetch) and message.decision_id == visit.offer_id:
            await self._requests.answer_fetch(call, visit, message)
        elif caller.session is None or not caller.is_attached:
            raise UnavailableError("no trainer is attached on this connection; attach first", reason="not_attached")
        else:
            await self._requests.handle(call, caller.session, message)

    def _attached(self, session: Session, message: messages.Attach) -> messages.Attached:
        identity = self._node.identity
        return messages.Attached(
            session_id=session.session_id,
            incarnation=identity.incarnation,
            lease_s=self._node.lease_s,
            protocol=min(message.protocol, messages.PROTOCOL_VERSION),
            daemon_version=identity.version,
            node=identity.name,
        )

    def _end_visit(self, caller: _Caller) -> None:
        if caller.visit is not None:
            self._visits.close(caller.visit, uid=caller.uid)
            caller.visit = None

    async def _next_frame(self, caller: _Caller) -> tuple[Any, int] | None:
        is_known = caller.is_attached or caller.visit is not None
        self.connections.note(asyncio.current_task(), is_known=is_known)
        async with asyncio.timeout(None if is_known else self.attach_timeout_s):
            return await caller.connection.receive()
