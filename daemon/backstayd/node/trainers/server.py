"""The local socket: accepts connections of trainers and readers, and answers their messages in order.

Who may attach is decided in ``sessions``; what an attached trainer may ask is in ``requests``.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from backstay.errors import BackstayError, UnavailableError
from backstay.protocol import messages
from backstayd.node.restores.read_only_access import Visits
from backstayd.node.session import Offered, Session
from backstayd.node.trainers.connection import Call, Connection
from backstayd.node.trainers.requests import Requests
from backstayd.node.trainers.sessions import Sessions
from backstayd.node.trainers.users import Places, visible_to
from backstayd.security.refusals import Refusals
from backstayd.store.slot_holder import peer_credentials
from backstayd.store.store import Store

logger = logging.getLogger(__name__)

ATTACH_TIMEOUT_S: Final = 10.0  # a connection that sends nothing for so long is closed


@dataclass(slots=True)
class _Caller:
    """Who speaks on one connection: an attached trainer, somebody who reads a snapshot, both, or nobody yet."""

    sock: socket.socket
    connection: Connection
    bound: list[Session]
    visit: Offered | None = None


class TrainerServer:
    """Args:
    document: Makes the status document of this node.
    """

    def __init__(
        self,
        store: Store,
        sessions: Sessions,
        *,
        requests: Requests,
        visits: Visits,
        document: Callable[[], dict[str, Any]],
    ) -> None:
        self._store = store
        self._sessions = sessions
        self._requests = requests
        self._visits = visits
        self._document = document
        self._refusals = Refusals(logger)
        self.places = Places()
        self.attach_timeout_s = ATTACH_TIMEOUT_S

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
            if self.places.is_full(uid):
                logger.debug("user %d has too many connections; another one is closed", uid)
                connection.close()
                continue
            self.places.enter(asyncio.create_task(self._serve_connection(connection)), uid)

    async def close(self) -> None:
        """Close all connections, and with them all sessions."""
        tasks = self.places.tasks
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._sessions.close()

    async def _serve_connection(self, sock: socket.socket) -> None:
        bound: list[Session] = []
        connection = Connection(sock, lambda: self._sessions.lost(bound))
        caller = _Caller(sock, connection, bound)
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
            connection.close()

    async def _answer(self, caller: _Caller, message: Any, message_id: int) -> None:
        bound, visit, uid = caller.bound, caller.visit, peer_credentials(caller.sock).uid
        call = Call(caller.connection, message_id)
        if isinstance(message, messages.Attach):
            session, reply = self._sessions.attach(caller.sock, message)
            bound[:] = [session]
            self.places.note(asyncio.current_task(), is_known=True)
            call.allow_frames(messages.request_limit(0))
            await call.send(reply)
        elif isinstance(message, messages.Status):
            await call.send(messages.StatusBody(document=visible_to(uid, self._document(), self._store)))
        elif isinstance(message, messages.Open):
            self._end_visit(caller)
            caller.visit, offer = await self._visits.open(message, uid=uid)
            call.allow_frames(messages.request_limit(0))
            await call.send(offer)
        elif visit is not None and isinstance(message, messages.Fetch) and message.decision_id == visit.offer_id:
            await self._requests.answer_fetch(call, visit, message)
        elif not bound or not self._sessions.is_attached(bound[0]):
            raise UnavailableError("not attached (any more): attach first", reason="not_attached")
        else:
            await self._requests.handle(call, bound[0], message)

    def _end_visit(self, caller: _Caller) -> None:
        if caller.visit is not None:
            self._visits.close(caller.visit, uid=peer_credentials(caller.sock).uid)
            caller.visit = None

    async def _next_frame(self, caller: _Caller) -> tuple[Any, int] | None:
        is_attached = any(map(self._sessions.is_attached, caller.bound))
        is_known = is_attached or caller.visit is not None
        self.places.note(asyncio.current_task(), is_known=is_known)
        async with asyncio.timeout(None if is_known else self.attach_timeout_s):
            return await caller.connection.receive()
