"""Reading a snapshot without taking part in its run: the coordinator says where it is, chunks come as for another layout.

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
    """Those under way. Invariant: each is of the user who owns the run."""

    def __init__(self, node: NodeState, chunks: Chunks) -> None:
        self._node = node
        self._chunks = chunks
        self._counts: Counter[int] = Counter()  # by user

    async def open(self, message: messages.Open, *, uid: int) -> tuple[Offered, messages.Offer]:
        """Find the snapshot and make an offer of it; :meth:`close` it.

        Raises:
            SnapshotNotFoundError, UnavailableError: there is none to read now. UsageError: it is another user's.
        """
        if "/" in message.run:
            RunKey.parse(message.run)
        else:  # the coordinator knows which job has it
            check_name("run_id", message.run)
        if not 0 <= message.step < MAX_COUNT:
            raise UsageError(f"step {message.step} is out of range", reason="bad_step")
        own, total = self._counts[uid], self._counts.total()
        if own >= MAX_VISITS_OF_ONE or total >= MAX_VISITS:
            raise CapacityError(
                f"{total} snapshots are being read here already, {own} of them by user {uid}; try later", reason="busy"
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
        """The visitor has gone."""
        self._counts -= Counter({uid: 1})
        if offered is not None:
            self._chunks.end_visit(offered)
            self._node.pass_due.notify()

    def _locate(self, message: messages.Open) -> Located:
        with OperatorClient(self._node.coordinator, timeout_s=ASK_S, credentials=self._node.credentials) as client:
            return client.locate(message.run, message.step)


def _check_owner(located: Located, uid: int) -> None:
    """The run's user may read it, and whoever can read the daemons' memory anyway."""
    if located.owners != (str(uid),) and uid not in (0, os.geteuid()):
        owners = ", ".join(located.owners) or "nobody known"
        raise UsageError(f"run {located.run} belongs to user {owners}, not to user {uid}", reason="not_owner")
