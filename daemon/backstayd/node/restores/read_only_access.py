"""Reading a snapshot without taking part in its run: the coordinator locates it, chunks are fetched as for another layout.

A visit belongs to one connection and ends with it. Changes nothing of the run.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections import Counter
from typing import Final

from backstay.errors import CapacityError, UsageError
from backstay.ids import MAX_COUNT, RunKey, check_name
from backstay.protocol import messages
from backstayd.core.recover.locate import Located
from backstayd.node.node_state import NodeState
from backstayd.node.restores.chunks import Chunks
from backstayd.node.session import Offered
from backstayd.transport.operator import OperatorClient

audit = logging.getLogger("backstayd.audit")

MAX_VISITS: Final = 64
MAX_VISITS_OF_ONE: Final = 32  # of one user
ASK_S: Final = 5.0


class Visits:
    """The visits under way. Invariant: the user of each owns the run."""

    def __init__(self, node: NodeState, chunks: Chunks) -> None:
        self._node = node
        self._chunks = chunks
        self._counts: Counter[int] = Counter()  # by user

    async def open(self, message: messages.Open, *, uid: int) -> tuple[Offered, messages.Offer]:
        """Locate the snapshot and offer it; :meth:`close` ends the visit.

        Raises:
            SnapshotNotFoundError, UnavailableError: none can be read now. UsageError: it belongs to another user.
        """
        if "/" in message.run:
            RunKey.parse(message.run)
        else:  # the coordinator finds its job
            check_name("run_id", message.run)
        if not 0 <= message.step < MAX_COUNT:
            raise UsageError(f"step {message.step} is out of range", reason="bad_step")
        own, total = self._counts[uid], self._counts.total()
        if own >= MAX_VISITS_OF_ONE or total >= MAX_VISITS:
            raise CapacityError(
                f"{total} snapshots are already being read here, {own} of them by user {uid}; try again later",
                reason="busy",
            )
        self._counts[uid] += 1
        offered: Offered | None = None
        try:
            located = await asyncio.to_thread(self._locate, message)
            _check_owner(located, uid)
            if located.owners != (str(uid),):
                audit.info(
                    "Open %s step %d of user %s by user %d of this machine", located.run, located.base.step,
                    ", ".join(located.owners) or "unknown", uid,
                )  # fmt: skip
            offered = Offered(
                offer_id=f"visit-{secrets.token_hex(8)}",
                run=located.run,
                base=located.base,
                sources=located.sources,
                addresses={peer.name: peer.bulk_address for peer in located.peers},
            )
            self._chunks.begin_visit(offered)
            return offered, await self._chunks.offer(offered)
        except BaseException:
            self.close(offered, uid=uid)
            raise

    def close(self, offered: Offered | None, *, uid: int) -> None:
        """End the visit."""
        self._counts -= Counter({uid: 1})
        if offered is not None:
            self._chunks.end_visit(offered)
            self._node.pass_due.notify()

    def _locate(self, message: messages.Open) -> Located:
        with OperatorClient(self._node.coordinator, timeout_s=ASK_S, credentials=self._node.credentials) as client:
            return client.locate(message.run, message.step)


def _check_owner(located: Located, uid: int) -> None:
    """Raise unless ``uid`` owns the run or can read the daemon's memory anyway."""
    if located.owners != (str(uid),) and uid not in (0, os.geteuid()):
        owners = ", ".join(located.owners) or "unknown"
        raise UsageError(f"run {located.run} belongs to user {owners}, not to user {uid}", reason="not_owner")
