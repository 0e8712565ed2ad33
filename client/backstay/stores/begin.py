"""Joining the world of a run: attach, wait for the world's decision, keep the line. Loads nothing.

What a tool will read is not known yet. So nothing of an offered snapshot is fetched here: it is read when the tool asks for it.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from dataclasses import dataclass
from typing import Final

from backstay._version import __version__
from backstay.errors import UnavailableError
from backstay.protocol import framing, messages
from backstay.protocol.connection import DaemonConnection
from backstay.session.join import Progress, announce
from backstay.session.session import BY_CHUNKS, Line
from backstay.stores.snapshot_reader import Source
from backstay.trainer import checked_arguments
from backstay.trainer.torch_world import World

RETRY_S: Final = 0.2
CONNECT_S: Final = 5.0
ATTACH_S: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Entered:
    """One rank in its world: the line it writes by, and the snapshot it begins from (None: a new run)."""

    line: Line
    source: Source | None
    restored: messages.Restored


def enter(run: str, place: World, world_id: str, *, socket_path: str, allow_fresh: bool, deadline_s: float) -> Entered:
    """Wait until all ranks of the world asked and one decision was made for all of them.

    Raises:
        UnavailableError: no daemon, or not all ranks in time. UnrecoverableError: a known run without a restorable snapshot.
    """
    deadline_s = checked_arguments.seconds_of("deadline_s", deadline_s)
    attach = messages.Attach(
        run=run, world_id=world_id, rank=place.rank, world_size=place.size, layout=BY_CHUNKS,
        collective_timeout_s=place.collective_timeout_s, client_version=__version__,
    )  # fmt: skip
    request = messages.Restore(allow_fresh=allow_fresh, deadline_s=deadline_s, world_size=place.size)
    connection, attached, restored = _ask(socket_path, attach, request)
    written = dataclasses.replace(attach, attempt=restored.attempt)
    line = Line(connection, written, lease_s=attached.lease_s, socket_path=socket_path)
    source = None
    if restored.outcome != "NONE":
        source = Source(run=run, step=restored.step, socket_path=socket_path, snapshot_id=restored.snapshot_id)
    announce(run, restored, rank=place.rank)
    return Entered(line=line, source=source, restored=restored)


def _ask(
    socket_path: str, attach: messages.Attach, request: messages.Restore
) -> tuple[DaemonConnection, messages.Attached, messages.Restored]:
    """Again and again until the deadline, while the daemon is unavailable."""
    deadline = time.monotonic() + request.deadline_s
    progress = Progress(attach.rank)
    while True:
        connection = None
        try:
            left = max(0.1, deadline - time.monotonic())
            connection = DaemonConnection(socket_path, timeout_s=min(CONNECT_S, left))
            attached = connection.attach(attach, deadline_s=min(ATTACH_S, left))
            return connection, attached, _decide(connection, request, deadline, progress)
        except BaseException as error:
            if connection is not None:
                connection.close()
            if not isinstance(error, UnavailableError) or time.monotonic() + RETRY_S >= deadline:
                raise
            progress.say(f"daemon at {socket_path} is not available ({error}); trying again for {left:.0f} s")
            threading.Event().wait(RETRY_S)


def _decide(
    connection: DaemonConnection, request: messages.Restore, deadline: float, progress: Progress
) -> messages.Restored:
    """The decision that stands, whatever was offered before."""
    staged = ""
    while True:
        left = max(0.1, deadline - time.monotonic())
        reply, fds = connection.restore(dataclasses.replace(request, staged=staged, deadline_s=left), progress)
        framing.close_fds(fds)  # shards of an older version, without a layout, come whole; they too are read by chunks
        if isinstance(reply, messages.Restored):
            return reply
        staged = reply.decision_id
