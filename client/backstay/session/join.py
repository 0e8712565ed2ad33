"""Asking the daemon for the world's decision, until there is one or the deadline has passed.

An Offer of another layout is planned and fetched here, before the decision stands. Loads nothing.
"""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from backstay.errors import IntegrityError, UnavailableError
from backstay.protocol import framing, messages
from backstay.protocol.connection import DaemonConnection
from backstay.restore.load import Prepared
from backstay.restore.snapshot import OpenedSnapshot

_log = logging.getLogger("backstay")

REPEAT_S = 60.0  # between two lines of one cause
MOVING_S = 10.0  # the same while its numbers move


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The world's decision, and what this rank needs of it.

    ``prepared`` is None for a new run, or if this rank cannot load the snapshot because of ``error``: then the other ranks
    are to be told, who may be loading.
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


def ask(
    socket_path: str,
    attach: messages.Attach,
    prepare: Callable[[OpenedSnapshot], Prepared],
    *,
    allow_fresh: bool,
    deadline_s: float,
) -> Answer:
    """Attach and wait for the decision, again and again until the deadline while the daemon is unavailable.

    ``prepare`` plans what this rank reads of a snapshot and has it fetched; it is called for each decision.
    """
    deadline = time.monotonic() + deadline_s
    progress = Progress(attach.rank)
    while True:
        left = deadline - time.monotonic()
        connection = None
        try:
            connection = DaemonConnection(socket_path, timeout_s=min(5.0, max(0.1, left)))
            attached = connection.attach(attach, deadline_s=min(10.0, max(0.1, left)))
            conversation = _Conversation(connection, attach, prepare, deadline, progress)
            restored, prepared = conversation.decide(allow_fresh=allow_fresh)
            return Answer(
                connection=connection, attached=attached, restored=restored, prepared=prepared, error=conversation.error
            )
        except BaseException as error:
            if connection is not None:
                connection.close()
            is_final = not isinstance(error, (UnavailableError, OSError)) or time.monotonic() + 0.2 >= deadline
            if is_final and isinstance(error, OSError):
                raise UnavailableError(f"{socket_path}: {error}; restore() gives up after {deadline_s:g} s") from error
            if is_final:
                raise
            progress.say(f"daemon at {socket_path} is not available ({error}); trying again until the deadline")
            _pause(0.2)


class _Conversation:
    """Restore, then Offers and Fetches as often as the decision changes, until it stands."""

    def __init__(
        self,
        connection: DaemonConnection,
        attach: messages.Attach,
        prepare: Callable[[OpenedSnapshot], Prepared],
        deadline: float,
        progress: Progress,
    ) -> None:
        self._connection, self._attach, self._prepare = connection, attach, prepare
        self._deadline, self._progress = deadline, progress
        self._prepared: Prepared | None = None
        self.error: Exception | None = None

    def decide(self, *, allow_fresh: bool) -> tuple[messages.Restored, Prepared | None]:
        """The decision that stands, and what was prepared for it; :attr:`error` says why nothing was."""
        staged = ""
        while True:
            request = messages.Restore(
                allow_fresh=allow_fresh,
                deadline_s=max(0.1, self._deadline - time.monotonic()),
                world_size=self._attach.world_size,
                staged=staged,
            )
            try:
                reply, fds = self._connection.restore(request, self._progress)
                if isinstance(reply, messages.Restored) and staged and self._stands(reply, staged):
                    return reply, self._prepared
            except BaseException:
                self._drop()
                raise
            self._drop()  # the decision changed: what was fetched is of another
            if isinstance(reply, messages.Offer):
                staged = reply.decision_id
                self._prepare_with(functools.partial(self._open_offer, reply))
                continue
            if reply.outcome == "NONE":
                framing.close_fds(fds)
            else:
                self._prepare_with(functools.partial(self._open_whole, reply, fds))
            return reply, self._prepared

    def _stands(self, restored: messages.Restored, staged: str) -> bool:
        return restored.outcome != "NONE" and not restored.shards and restored.decision_id in ("", staged)

    def _drop(self) -> None:
        if self._prepared is not None:
            self._prepared.opened.close()
        self._prepared, self.error = None, None

    def _prepare_with(self, open_snapshot: Callable[[], OpenedSnapshot]) -> None:
        """Plan and fetch. What does not fit is kept as the error: the others are told when the decision stands."""
        try:
            opened = open_snapshot()
            try:
                self._prepared = self._prepare(opened)
            except BaseException:
                opened.close()
                raise
        except (UnavailableError, OSError):
            raise
        except Exception as error:  # noqa: BLE001 - raised by restore() once the others can be told
            self.error = error

    def _open_offer(self, offer: messages.Offer) -> OpenedSnapshot:
        return OpenedSnapshot.from_offer(
            self._connection, offer, run=self._attach.run, deadline=self._deadline, on_progress=self._progress
        )

    def _open_whole(self, restored: messages.Restored, fds: list[int]) -> OpenedSnapshot:
        if not any(item.rank == self._attach.rank for item in restored.shards):
            framing.close_fds(fds)
            raise IntegrityError(
                f"the daemon sent shards of ranks {[item.rank for item in restored.shards]}, not that of rank "
                f"{self._attach.rank}; nothing was loaded",
                reason="missing_shard",
            )
        return OpenedSnapshot.from_shards(restored, fds, run=self._attach.run, world_size=self._attach.world_size)


class Progress:
    """Writes what is waited for, one line per cause and minute: to the log if someone listens, else rank 0 to stderr."""

    def __init__(self, rank: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rank, self._clock = rank, clock
        self._begin_s = clock()
        self._said_s = self._begin_s
        self._last, self._last_cause = "", ""

    def __call__(self, progress: messages.Progress) -> None:
        amount = f" {progress.done_bytes >> 20} of {progress.total_bytes >> 20} MiB" if progress.total_bytes else ""
        detail = f"{': ' if progress.detail else ''}{progress.detail}"
        self.say(f"{progress.phase}{amount}{detail}", cause=f"{progress.phase}{detail}")

    def say(self, text: str, *, cause: str = "") -> None:
        """Write ``text``, unless a line of the same ``cause`` (by default the text itself) was written a moment ago."""
        now, cause = self._clock(), cause or text
        pause_s = 1.0 if cause != self._last_cause else REPEAT_S if text == self._last else MOVING_S
        if now - self._said_s < pause_s:
            return
        self._said_s, self._last, self._last_cause = now, text, cause
        _write(f"backstay restore, rank {self._rank}, {now - self._begin_s:.0f} s: {text}", rank=self._rank)


def announce(run: str, restored: messages.Restored, *, rank: int) -> None:
    """Write what the run begins from, so that a mistyped run_id is seen where training was started."""
    why = f": {restored.message}" if restored.message else ""
    if restored.outcome != "NONE":
        what = f"backstay: restored step {restored.step} of {run} ({restored.outcome}), attempt {restored.attempt}"
    elif restored.attempt <= 1:
        what = f"backstay: new run {run}"
    else:
        what = f"backstay: new start of {run}, attempt {restored.attempt}"
    _write(what + why, rank=rank)


def _write(line: str, *, rank: int) -> None:
    """To the log if someone listens, else rank 0 to stderr."""
    if _log.isEnabledFor(logging.INFO):
        _log.info("%s", line)
    elif rank == 0:
        print(line, file=sys.stderr, flush=True)


def _pause(seconds: float) -> None:
    time.sleep(seconds)
