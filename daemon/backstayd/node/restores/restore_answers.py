"""Answers to trainers that wait in restore(): progress, then one answer for the whole world.

Decides nothing: the coordinator releases or refuses the world.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from backstay.errors import BackstayError, UnavailableError, UnrecoverableError
from backstay.protocol import messages
from backstayd.core.messages.decisions import Decision, DecisionPhase, Outcome, Staging, base_size, takes_whole
from backstayd.node.node_state import NodeState
from backstayd.node.restores.open_files import OpenFiles
from backstayd.node.session import RestoreAnswer, Session


def offer_due(node: NodeState, session: Session) -> Decision | None:
    """The decision whose snapshot a waiting trainer must choose chunks of; None if it need not."""
    desired = node.run_desired(session.run)
    decision = desired.decision
    if (
        decision is None
        or decision.base is None
        or decision.world_id != session.world_id
        or desired.decision_phase is DecisionPhase.REFUSE
        or decision.decision_id in (session.staged, *node.failed_decisions)
        or takes_whole(decision, rank=session.rank, layout=session.layout)
    ):
        return None
    return decision


def progress(node: NodeState, session: Session, staging_of: Callable[[str], Staging | None]) -> messages.Progress:
    """How far the restore of ``session`` is; ``staging_of``: what this node has staged of the decision of a run."""
    desired = node.run_desired(session.run)
    decision = desired.decision
    if not node.link.is_connected:
        return messages.Progress(phase="waiting", detail="for the coordinator")
    if decision is None or decision.world_id != session.world_id:
        missing = desired.missing
        if missing is not None and missing.world_id == session.world_id:
            return messages.Progress(phase="waiting", detail=missing.sentence)
        return messages.Progress(phase="waiting", detail="for the other ranks and the coordinator's decision")
    staging = staging_of(session.run)
    done, total = (staging.done_bytes, staging.total_bytes) if staging else (0, 0)
    if desired.decision_phase is DecisionPhase.PREPARE:
        step = decision.base.step if decision.base else 0
        return messages.Progress(phase="staging", detail=f"step {step}", done_bytes=done, total_bytes=total)
    return messages.Progress(phase="recording", done_bytes=done, total_bytes=total)


def release(node: NodeState, open_files: OpenFiles, decision: Decision, waiting: Iterable[Session]) -> None:
    """Give each waiting trainer what ``decision`` restores."""
    for session in waiting:
        assert session.answer is not None
        try:
            session.answer.set_result(_restored(node, open_files, session, decision))
        except (BackstayError, OSError) as error:
            sentence = f"rank {session.rank}: {error}; the world must restart"
            gone = UnavailableError(sentence, reason="gone")
            session.answer.set_result(RestoreAnswer(message=messages.Error.of(gone)))


def refuse(decision: Decision, waiting: Iterable[Session]) -> None:
    """Refuse each waiting trainer, with the reason of the coordinator."""
    error = UnrecoverableError(decision.message, reason="unrecoverable")
    for session in waiting:
        assert session.answer is not None
        session.answer.set_result(RestoreAnswer(message=messages.Error.of(error)))


def _restored(node: NodeState, open_files: OpenFiles, session: Session, decision: Decision) -> RestoreAnswer:
    base, desired = decision.base, node.run_desired(session.run)
    shards, fds = open_files.open_shards(node.store, session, decision)
    message = messages.Restored(
        outcome=Outcome(decision.outcome).value,
        attempt=decision.attempt,
        step=base.step if base else 0,
        base_attempt=base.attempt if base else 0,
        snapshot_id=base.snapshot_id if base else "",
        message=decision.message,
        shards=shards,
        decision_id=decision.decision_id,
        base_world_size=base_size(decision) if base else 0,
        probation_steps=desired.probation_steps,
        interval_steps=desired.schedule.interval_steps,
    )
    return RestoreAnswer(message=message, fds=fds, attempt=decision.attempt, base_step=base.step if base else 0)
