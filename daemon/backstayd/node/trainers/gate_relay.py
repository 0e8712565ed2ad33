"""The layout gate and distrust on a node: takes statements of trainers for the next report, and returns the verdict.

Decides nothing: the coordinator compares and chooses. What is distrusted is on tmpfs before it is reported.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from backstay.errors import IntegrityError, UnavailableError
from backstay.protocol import messages
from backstayd.core.inventory.distrust import MAX_DISTRUSTED, MAX_REASON
from backstayd.core.messages.decisions import Distrusted
from backstayd.core.messages.desired import RunDesired
from backstayd.core.messages.gate import GateReport, GateState
from backstayd.node.node_state import NodeState
from backstayd.node.session import Session, check_reported_size
from backstayd.node.trainers.connection import PROGRESS_S, Call
from backstayd.node.trainers.sessions import Sessions

MAX_ENTRIES: Final = 4096  # statements of one rank
MAX_NAMES: Final = 20_000  # tensors in one detail
MAX_NAME: Final = 500  # characters
MAX_GATE_S: Final = 3600.0


async def compare(node: NodeState, sessions: Sessions, call: Call, session: Session, message: messages.Gate) -> None:
    """Wait until the coordinator has compared what all ranks loaded, and answer with the verdict."""
    sessions.check_current(session)
    loop = asyncio.get_running_loop()
    take_gate(session, message)
    node.changed()
    deadline = loop.time() + min(message.deadline_s, MAX_GATE_S)
    while (answer := answer_gate(session, node.run_desired(session.run))) is None:
        if loop.time() > deadline:
            raise UnavailableError(
                f"run {session.run}: not all ranks stated what they loaded within {message.deadline_s:g} s",
                reason="deadline",
            )
        call.check()
        await call.send_progress(messages.Progress(phase="comparing", detail="what all ranks loaded"))
        await node.waiters.wait(min(PROGRESS_S, max(0.0, deadline - loop.time())))
        sessions.check_current(session)
    node.changed()
    await call.send(answer)


def take_gate(session: Session, message: messages.Gate) -> None:
    """Keep the statements of the rank for the next report.

    Raises:
        IntegrityError: more than a report should carry.
    """
    names = sum(len(detail.names) for detail in message.details)
    longest = max([len(message.decision_id), *(len(entry.name) + len(entry.digest) for entry in message.entries)])
    if len(message.entries) > MAX_ENTRIES or names > MAX_NAMES or longest > 2 * MAX_NAME:
        raise IntegrityError(
            f"rank {session.rank} sent {len(message.entries)} statements about {names} tensors, more than {MAX_ENTRIES} "
            f"and {MAX_NAMES}, or a name over {MAX_NAME} characters; nothing was compared",
            reason="gate_too_large",
        )
    gate = GateReport(
        decision_id=message.decision_id,
        entries=message.entries,
        details=message.details,
        failure=message.failure[:MAX_REASON],
    )
    session.gate = None
    check_reported_size(session, gate=gate)
    session.gate = gate


def answer_gate(session: Session, desired: RunDesired) -> messages.GateAnswer | None:
    """The answer to the rank; None: wait. Drops its statements when all agree: every report would carry them."""
    verdict, stated = desired.gate, session.gate
    if stated is None or verdict is None or verdict.decision_id != stated.decision_id:
        return None
    if verdict.state is GateState.PASSED:
        session.gate = GateReport(decision_id=stated.decision_id)
        return messages.GateAnswer(state=verdict.state.value)
    if verdict.state is GateState.FAILED:
        return messages.GateAnswer(state=verdict.state.value, message=verdict.message)
    detailed = {detail.entry for detail in stated.details}
    asked = tuple(e.name for e in stated.entries if e.name in verdict.entries and e.name not in detailed)
    return messages.GateAnswer(state=GateState.DETAIL.value, entries=asked) if asked else None


def take_distrust(node: NodeState, session: Session, message: messages.Distrust) -> None:
    """Record that what ``session`` restored led to NaN; nothing if it restored nothing."""
    decision = node.decision_of(session.run)
    if decision is None or decision.world_id != session.world_id or decision.base is None:
        return
    base = decision.base
    reason = f"rank {session.rank} at step {message.step}: {message.reason}"[:MAX_REASON]
    item = Distrusted(snapshot_id=base.snapshot_id, attempt=base.attempt, step=base.step, reason=reason)
    if remember(node, session.run, (item,), ()):
        node.timeline.add("distrusted", session.run, f"step {base.step} is not restored again: {reason}")


def remember(node: NodeState, run: str, more: Sequence[Distrusted], trusted: Sequence[str]) -> bool:
    """Add ``more`` to what is distrusted here and remove ``trusted``; True if that changed anything."""
    index = node.store.runs.get(run)
    if index is None and not more:
        return False
    known = {item.snapshot_id: item for item in (index.distrusted if index is not None else ())}
    for item in more:
        known.setdefault(item.snapshot_id, item)
    left = [item for item in known.values() if item.snapshot_id not in trusted]
    left.sort(key=lambda item: (item.attempt, item.step, item.snapshot_id))
    if not node.store.record_distrust(run, tuple(left[-MAX_DISTRUSTED:])):
        return False
    node.changed()
    return True
