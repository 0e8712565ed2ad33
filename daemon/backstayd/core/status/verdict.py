"""Would this job survive the next failure? One word, a number and a sentence for each run. Pure.

Shows what the last evaluation found; decides nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from backstayd.core.evaluation import Evaluation
from backstayd.core.inventory.catalog import SnapshotView
from backstayd.core.inventory.nodes import natural
from backstayd.core.inventory.run_context import RunContext
from backstayd.core.messages.decisions import DecisionPhase
from backstayd.core.messages.report import SessionPhase
from backstayd.core.protect.lag import behind_sentence
from backstayd.core.run_state import RunState
from backstayd.core.sentences import amount, listed

NAMED = 3  # nodes named in a sentence


class Word(enum.StrEnum):
    PROTECTED = "protected"  # it survives as many losses as the operator asked for
    DEGRADED = "degraded"  # it survives the next loss, and fewer than asked for
    BEHIND = "behind"  # what is held is safe, and training is far ahead of it: its newest steps are not protected
    AT_RISK = "at risk"  # the next loss of a node loses the newest snapshot
    UNPROTECTED = "unprotected"  # no snapshot can be restored from memory
    STARTING = "starting"  # nothing was protected yet
    ENDING = "ending"  # it is being forgotten
    UNKNOWN = "unknown"  # not evaluated yet


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How safe a run is."""

    word: Word
    survives: int  # losses of any nodes after which the newest snapshot can still be restored; -1: it cannot be now
    reason: str


def verdict_of(state: RunState) -> Verdict:
    """The verdict of the last evaluation."""
    context, evaluation = state.context, state.evaluation
    if state.forgetting.is_under_way:
        return Verdict(word=Word.ENDING, survives=-1, reason="the run is being forgotten on every node")
    if context is None or evaluation is None:
        return Verdict(word=Word.UNKNOWN, survives=-1, reason="not every node of it has reported yet")
    word = _word(state, evaluation)
    is_well = evaluation.spares >= evaluation.wanted and not state.rebuilds.under_way
    behind = state.lag.behind
    parts = [behind_sentence(behind) if behind is not None else state.missing.sentence]
    parts += [f"every fragment of step {evaluation.protected_step} is held" if is_well else evaluation.reason]
    missing = missing_nodes(state, context)
    if missing:
        parts.append(f"{_named(missing)} {'is' if len(missing) == 1 else 'are'} lost")
    if evaluation.spares <= 0:
        parts.append(_fall_back(state, evaluation))
    return Verdict(word=word, survives=evaluation.spares, reason="; ".join(part for part in parts if part))


def activity_of(state: RunState) -> str:
    """What the job's trainers are doing, in a few words."""
    context, recovery = state.context, state.recovery
    if state.missing.found is not None and not state.missing.found.is_training:
        return f"waiting in restore(): {state.missing.found.sentence}"
    if recovery.is_active:
        if recovery.decision is not None:
            return f"recovering: {_PHASES[recovery.phase]}"
        is_listing = context is not None and not context.storage.is_ready
        return f"recovering: {'a node lists durable storage' if is_listing else 'choosing what to restore'}"
    sessions = [s.record.phase for s in state.world(context).values()] if context is not None else []
    size = recovery.decision.world_size if recovery.decision is not None else 0
    if not sessions:
        return "no trainer is connected"
    if len(sessions) < size:
        return f"{len(sessions)} of {amount(size, 'trainer')} connected"
    if SessionPhase.RESTORING in sessions:
        return "loading"
    return "training" if SessionPhase.TRAINING in sessions else str(sessions[0].value)


_PHASES = {
    DecisionPhase.PREPARE: "every host stages and verifies what it needs",
    DecisionPhase.RECORD: "every host records the decision",
    DecisionPhase.RELEASE: "the ranks load",
    DecisionPhase.REFUSE: "refused",
}


def missing_nodes(state: RunState, context: RunContext) -> list[str]:
    """Nodes that have a part in the newest snapshot, or run a rank, and are lost."""
    hosts = set(state.hosts(context))
    newest = next((view for view in context.live_views if view.is_restorable), None)
    names = hosts | (_members(newest) if newest is not None else set())
    return sorted(names - set(context.nodes), key=natural)


def _members(view: SnapshotView) -> set[str]:
    return {member.node for state in view.plans for member in state.plan.members}


def _word(state: RunState, evaluation: Evaluation) -> Word:
    word = _held_word(state, evaluation)
    is_calm = word in (Word.PROTECTED, Word.DEGRADED, Word.STARTING)
    is_behind = state.lag.behind is not None or state.missing.sentence != ""
    return Word.BEHIND if is_behind and is_calm else word


def _held_word(state: RunState, evaluation: Evaluation) -> Word:
    """How safe the newest protected snapshot is, however old it is."""
    if evaluation.spares < 0 or (evaluation.spares == 0 and not state.memory.protected):
        is_new = not state.memory.protected and not evaluation.context.tainted
        return Word.STARTING if is_new and evaluation.wanted > 0 else _weak(evaluation)
    if evaluation.spares == 0:
        return Word.AT_RISK
    return Word.PROTECTED if evaluation.spares >= evaluation.wanted else Word.DEGRADED


def _weak(evaluation: Evaluation) -> Word:
    return Word.AT_RISK if evaluation.spares == 0 else Word.UNPROTECTED


def _fall_back(state: RunState, evaluation: Evaluation) -> str:
    """What is left to restore when the newest snapshot is lost."""
    newest = state.persisting.newest
    when = "the next loss" if evaluation.spares == 0 else "a restart"
    if newest is not None:
        return f"{when} falls back to step {newest.step} on durable storage"
    return f"{when} finds nothing on durable storage either" if state.persisting.is_on else ""


def _named(names: Iterable[str]) -> str:
    known = list(names)
    if len(known) <= NAMED:
        return listed(known)
    return f"{', '.join(known[:NAMED])} and {amount(len(known) - NAMED, 'more node')}"
