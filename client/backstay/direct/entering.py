"""Joining the world of a run: attach, wait for the world's decision, keep the line. Loads nothing."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import backstay
from backstay import local
from backstay.control import DaemonConnection
from backstay.direct.line import BY_CHUNKS, Line
from backstay.direct.source import Source
from backstay.restore import ask
from backstay.trainer.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Entered:
    """One rank in its world: the line it writes by, and the snapshot it begins from (None: a new run)."""

    line: Line
    source: Source | None
    restored: local.Restored


def enter(run: str, place: World, world_id: str, *, socket_path: str, allow_fresh: bool, deadline_s: float) -> Entered:
    """Wait until all ranks of the world asked and one decision was made for all of them.

    Raises:
        UnavailableError: no daemon, or not all ranks in time. UnrecoverableError: a known run without a restorable snapshot.
        IntegrityError: what the daemon gave is not what was decided.
    """
    attach = local.Attach(
        run=run, world_id=world_id, rank=place.rank, world_size=place.size, layout=BY_CHUNKS,
        collective_timeout_s=place.collective_timeout_s, client_version=backstay.__version__,
    )  # fmt: skip
    connection, attached, restored, fds = ask.ask(
        socket_path, attach, allow_fresh=allow_fresh, deadline_s=deadline_s, stage=_stage_nothing
    )
    local.close_fds(fds)  # shards written by a version that named no layout come whole; they are read by chunks as well
    source = None
    if restored.outcome != "NONE":
        source = Source(run=run, step=restored.step, socket_path=socket_path, snapshot_id=restored.snapshot_id)
    written = dataclasses.replace(attach, attempt=restored.attempt)
    line = Line(connection, written, lease_s=attached.lease_s, socket_path=socket_path)
    return Entered(line=line, source=source, restored=restored)


def _stage_nothing(_connection: DaemonConnection, _offer: local.Offer, _deadline: float) -> None:
    """What is needed is not known yet: it is read when the tool asks for it, by a visit."""
