"""One restore of one rank: the world's decision, loading, and the layout gate."""

from __future__ import annotations

import dataclasses
import functools
import time
from dataclasses import dataclass
from typing import Final

from backstay.protocol import messages
from backstay.protocol.connection import DaemonConnection
from backstay.restore import gate_statements, load
from backstay.restore.decision import await_decision
from backstay.restore.gate import LayoutGate
from backstay.restore.load import Target
from backstay.restore.result import Loaded
from backstay.session.progress import Progress

MIN_DECISION_S: Final = 0.1  # what is left for the daemon's answer, however long rank 0 made this rank wait


@dataclass(frozen=True, slots=True, kw_only=True)
class Restoration:
    """What was decided and loaded (None: nothing, the run is new), and the attached connection to continue with."""

    connection: DaemonConnection
    identity: messages.Attach  # with the attempt that this world writes
    lease_s: float
    restored: messages.Restored
    loaded: Loaded | None


def restore(
    socket_path: str, identity: messages.Attach, target: Target, *, allow_fresh: bool, deadline: float
) -> Restoration:
    """Restore ``target`` and return when all ranks agree on what they loaded; ``deadline``: a time of ``time.monotonic``.

    Raises:
        UnavailableError: no daemon, or no decision or verdict in time. UnrecoverableError: a known run without a restorable
            snapshot. IntegrityError: the snapshot does not fit, a byte is wrong, or the ranks differ.
    """
    decision = await_decision(
        socket_path, identity, functools.partial(load.prepare, target), allow_fresh=allow_fresh,
        deadline_s=max(MIN_DECISION_S, deadline - time.monotonic()),
    )  # fmt: skip
    restored, loaded = decision.restored, None
    identity = dataclasses.replace(identity, attempt=restored.attempt)
    gate = LayoutGate(decision.connection, identity, restored.decision_id, deadline_s=deadline - time.monotonic())
    try:
        if decision.error is not None:
            raise decision.error
        if decision.prepared is not None:
            loaded = decision.prepared.load()
            gate.pass_with(gate_statements.make(target, restored, loaded), Progress(target.rank))
    except BaseException as error:
        gate.report_failure(error)
        gate.connection.close()
        raise
    finally:
        decision.close_snapshot()
    return Restoration(
        connection=gate.connection,
        identity=identity,
        lease_s=decision.attached.lease_s,
        restored=restored,
        loaded=loaded,
    )
