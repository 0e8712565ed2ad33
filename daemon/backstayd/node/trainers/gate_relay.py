"""The gate and distrust on a node: passing on what trainers say, telling them what the coordinator answers.

Decides nothing: comparing and choosing are the coordinator's. What is distrusted is on tmpfs before anybody is told.
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
from backstayd.node.session import Session, check_said
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
    deadline, told_at = loop.time() + min(message.deadline_s, MAX_GATE_S), 0.0
    while (answer := answer_gate(session, node.run_desired(session.run))) is None:
        if loop.time() > deadline:
            raise UnavailableError(
                f"run {session.run}: not all ranks said within {message.deadline_s:g} s what they loaded",
                reason="deadline",
            )
        call.check()
        if loop.time() - told_at >= PROGRESS_S:
            await call.send(messages.Progress(phase="comparing", detail="what all ranks loaded"))
            told_at = loop.time()
        await node.waiters.wait(min(PROGRESS_S, max(0.0, deadline - loop.time())))
        sessions.check_current(session)
    node.changed()
    await call.send(answer)


def take_gate(session: Session, message: messages.Gate) -> None:
    """Note what the rank says it loaded, for the next report.

    Raises:
        IntegrityError: more than a report should carry.
    """
    names = sum(len(detail.names) for detail in message.details)
    longest = max([len(message.decision_id), *(len(entry.name) + len(entry.digest) for entry in message.entries)])
    if len(message.entries) > MAX_ENTRIES or names > MAX_NAMES or longest > 2 * MAX_NAME:
        raise IntegrityError(
            f"rank {session.rank} makes {len(message.entries)} statements with {names} tensors, more than "
            f"{MAX_ENTRIES} and {MAX_NAMES}; it was not compared",
            reason="gate_too_large",
        )
    gate = GateReport(
        decision_id=message.decision_id,
        entries=message.entries,
        details=message.details,
        failure=message.failure[:MAX_REASON],
    )
    session.gate = None
    check_said(session, gate=gate)
    session.gate = gate


def answer_gate(session: Session, desired: RunDesired) -> messages.GateAnswer | None:
    """What the rank is told now; None: wait. Drops its statements when all agree: every report would carry them."""
    verdict, said = desired.gate, session.gate
    if said is None or verdict is None or verdict.decision_id != said.decision_id:
        return None
    if verdict.state is GateState.PASSED:
        session.gate = GateReport(decision_id=said.decision_id)
        return messages.GateAnswer(state=verdict.state.value)
    if verdict.state is GateState.FAILED:
        return messages.GateAnswer(state=verdict.state.value, message=verdict.message)
    detailed = {detail.entry for detail in said.details}
    asked = tuple(e.name for e in said.entries if e.name in verdict.entries and e.name not in detailed)
    return messages.GateAnswer(state=GateState.DETAIL.value, entries=asked) if asked else None


def take_distrust(node: NodeState, session: Session, message: messages.Distrust) -> bool:
    """Keep that what ``session`` restored led to NaN; False if it restored nothing."""
    decision = node.decision_of(session.run)
    if decision is None or decision.world_id != session.world_id or decision.base is None:
        return False
    base = decision.base
    reason = f"rank {session.rank} at step {message.step}: {message.reason}"[:MAX_REASON]
    item = Distrusted(snapshot_id=base.snapshot_id, attempt=base.attempt, step=base.step, reason=reason)
    if remember(node, session.run, (item,), ()):
        node.timeline.add("distrusted", session.run, f"step {base.step} is not restored again: {reason}")
    return True


def remember(node: NodeState, run: str, more: Sequence[Distrusted], trusted: Sequence[str]) -> bool:
    """Unite what is distrusted here with ``more``, without ``trusted``; True if that changed anything."""
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
