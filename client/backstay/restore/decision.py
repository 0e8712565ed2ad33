"""Waiting for the world's decision: which snapshot all ranks restore, if any. Loads nothing.

A snapshot of another layout is offered first: what this rank needs of it is fetched before the decision is final.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from backstay.errors import IntegrityError, UnavailableError
from backstay.protocol import framing, messages
from backstay.protocol.connection import DaemonConnection
from backstay.restore.load import Prepared
from backstay.restore.snapshot import OpenedSnapshot
from backstay.session.attach import MIN_LEFT_S, attach, retry
from backstay.session.progress import Progress

CONNECT_S: Final = 5.0
ATTACH_S: Final = 10.0

Prepare = Callable[[OpenedSnapshot], Prepared]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What was decided, and the attached connection that it came by.

    ``prepared`` is None for a new run, for a caller that prepares nothing, and if this rank cannot load the snapshot because
    of ``error``: other ranks may be loading, and must be informed.
    """

    connection: DaemonConnection
    attached: messages.Attached
    restored: messages.Restored
    prepared: Prepared | None
    error: Exception | None

    def close_snapshot(self) -> None:
        """Close the descriptors of the snapshot; the connection stays."""
        if self.prepared is not None:
            self.prepared.opened.close()


def await_decision(
    socket_path: str,
    identity: messages.Attach,
    prepare: Prepare | None,
    *,
    allow_fresh: bool,
    deadline_s: float,
) -> Decision:
    """Attach and wait until all ranks of the world asked and one decision was made for all of them.

    Starts over while the daemon is unavailable.

    Args:
        prepare: Plans what this rank reads of a snapshot and has it fetched; called for each decision. None: nothing is
            fetched.

    Raises:
        UnavailableError: no daemon, or no decision in time. UnrecoverableError: a known run without a restorable snapshot.
    """
    deadline = time.monotonic() + deadline_s
    progress = Progress(identity.rank)

    def attempt(left_s: float) -> Decision:
        connection, attached = attach(
            socket_path, identity, connect_s=min(CONNECT_S, left_s), attach_s=min(ATTACH_S, left_s)
        )
        try:
            conversation = _Conversation(connection, identity, prepare, deadline, progress)
            restored = conversation.decide(allow_fresh=allow_fresh)
        except BaseException:
            connection.close()
            raise
        return Decision(
            connection=connection, attached=attached, restored=restored, prepared=conversation.prepared,
            error=conversation.error,
        )  # fmt: skip

    def report(error: Exception) -> None:
        progress.report(f"daemon at {socket_path} is not available ({error}); trying again until the deadline")

    try:
        return retry(attempt, deadline=deadline, on_failure=report)
    except OSError as error:
        raise UnavailableError(f"{socket_path}: {error}; restore() gives up after {deadline_s:g} s") from error


class _Conversation:
    """Restore, then Offers and Fetches as often as the decision changes, until it is final."""

    def __init__(
        self,
        connection: DaemonConnection,
        identity: messages.Attach,
        prepare: Prepare | None,
        deadline: float,
        progress: Progress,
    ) -> None:
        self._connection, self._identity, self._prepare = connection, identity, prepare
        self._deadline, self._progress = deadline, progress
        self.prepared: Prepared | None = None
        self.error: Exception | None = None

    def decide(self, *, allow_fresh: bool) -> messages.Restored:
        """The final decision; :attr:`prepared` is for it, or :attr:`error` is why nothing could be prepared."""
        staged = ""
        while True:
            request = messages.Restore(
                allow_fresh=allow_fresh,
                deadline_s=max(MIN_LEFT_S, self._deadline - time.monotonic()),
                world_size=self._identity.world_size,
                staged=staged,
            )
            try:
                reply, fds = self._connection.restore(request, self._progress)
                if isinstance(reply, messages.Restored) and staged and _is_staged(reply, staged):
                    return reply
            except BaseException:
                self._drop()
                raise
            self._drop()  # the decision changed: what was fetched is of another snapshot
            if isinstance(reply, messages.Offer):
                staged = reply.decision_id
                self._prepare_with(functools.partial(self._open_offer, reply))
                continue
            if reply.outcome == "NONE" or self._prepare is None:
                framing.close_fds(fds)
            else:
                self._prepare_with(functools.partial(self._open_whole, reply, fds))
            return reply

    def _drop(self) -> None:
        if self.prepared is not None:
            self.prepared.opened.close()
        self.prepared, self.error = None, None

    def _prepare_with(self, open_snapshot: Callable[[], OpenedSnapshot]) -> None:
        """Plan and fetch. What does not fit is kept as the error: the others are informed when the decision is final."""
        if self._prepare is None:
            return
        try:
            opened = open_snapshot()
            try:
                self.prepared = self._prepare(opened)
            except BaseException:
                opened.close()
                raise
        except (UnavailableError, OSError):
            raise
        except Exception as error:  # noqa: BLE001 - raised by restore() once the others can be informed
            self.error = error

    def _open_offer(self, offer: messages.Offer) -> OpenedSnapshot:
        return OpenedSnapshot.from_offer(
            self._connection, offer, run=self._identity.run, deadline=self._deadline, on_progress=self._progress
        )

    def _open_whole(self, restored: messages.Restored, fds: list[int]) -> OpenedSnapshot:
        if not any(item.rank == self._identity.rank for item in restored.shards):
            framing.close_fds(fds)
            raise IntegrityError(
                f"the daemon sent shards of ranks {[item.rank for item in restored.shards]}, not that of rank "
                f"{self._identity.rank}; nothing was loaded",
                reason="missing_shard",
            )
        return OpenedSnapshot.from_shards(restored, fds, run=self._identity.run, world_size=self._identity.world_size)


def _is_staged(restored: messages.Restored, staged: str) -> bool:
    """Whether the decision is the one whose offer was taken up."""
    return restored.outcome != "NONE" and not restored.shards and restored.decision_id in ("", staged)
