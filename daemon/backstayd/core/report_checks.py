"""What a node reports, checked before anything is calculated from it. Pure.

A report that contradicts itself, through a fault or on purpose, costs what that node reports of that run, never another run or
another node. Must not judge whether a report is true, only whether it can be calculated with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

from backstay.errors import IntegrityError, UsageError
from backstay.format.manifest import CHUNK_BYTES
from backstay.ids import MAX_COUNT, MAX_WORLD_SIZE, RunKey, check_name
from backstayd.bounded import drop_oldest
from backstayd.core.inventory.survey import why_no_snapshot
from backstayd.core.messages.decisions import Decision, Outcome
from backstayd.core.messages.plans import Plan, ShardRecord, VolumeShard
from backstayd.core.messages.report import NodeReport, RunReport, SessionRecord

MAX_RUNS: Final = 4096  # of one node
MAX_ITEMS: Final = 1 << 20  # shards, fragments or ranks: of one kind, in one run
MAX_MEMBERS: Final = 64  # of a group; the configuration allows fewer
MAX_SEALS: Final = 4096
MAX_TEXT: Final = 1000  # characters of a name, a digest, an address
MAX_USER: Final = 1 << 32


def check_node(report: NodeReport) -> None:
    """Raise IntegrityError if the report cannot be taken as that of any node."""
    node = report.node
    try:
        check_name("node", node.name)
    except UsageError as error:
        raise IntegrityError(f"invalid report: {error}", reason="bad_report") from error
    texts = (node.incarnation, node.bulk_address, node.domain, node.version, report.generation.incarnation)
    if not node.incarnation:
        raise IntegrityError(f"node {node.name} reports without an incarnation", reason="bad_report")
    if max(map(len, texts)) > MAX_TEXT or len(report.runs) > MAX_RUNS:
        raise IntegrityError(
            f"node {node.name} reports {len(report.runs)} runs and names of up to {max(map(len, texts))} characters; the "
            f"limits are {MAX_RUNS} runs and {MAX_TEXT} characters",
            reason="bad_report",
        )
    if not report.generation.is_possible:
        raise IntegrityError(
            f"node {node.name} reports generation {report.generation.number}, too high to be raised; stop it and "
            "remove the file 'generation' from its memory_dir",
            reason="bad_generation",
        )


class Seals:
    """Plans whose id was found to be that of their content: every member reports the same record. Bounded."""

    def __init__(self) -> None:
        self._sound: dict[int, Plan] = {}  # by id of the record, which is kept so that the id stays its own

    def is_sealed(self, plan: Plan) -> bool:
        if id(plan) in self._sound:
            return True
        if not plan.is_sealed():
            return False
        drop_oldest(self._sound, MAX_SEALS - 1)
        self._sound[id(plan)] = plan
        return True


def admitted(report: NodeReport, known: Mapping[str, RunReport], seals: Seals) -> tuple[NodeReport, dict[str, str]]:
    """The report without the runs and plans that cannot be calculated with, and what is wrong with each run.

    Args:
        known: What was admitted of this node before; the very same records are not checked again.
    """
    problems: dict[str, str] = {}
    runs = []
    for run in report.runs:
        problem = "" if known.get(run.run) is run else why_refused(run, known.get(run.run))
        unsealed = [plan for plan in run.plans if not problem and not seals.is_sealed(plan)]
        if problem or unsealed:
            problems[run.run[:MAX_TEXT]] = (
                problem or f"plan {unsealed[0].plan_id[:8]!r} does not have the id of its content"
            )
        if unsealed:  # plans of another release may have more fields: only the plan is left out
            run = replace(run, plans=tuple(plan for plan in run.plans if plan not in unsealed))
        if not problem:
            runs.append(run)
    return (replace(report, runs=tuple(runs)) if problems else report), problems


def why_refused(run: RunReport, before: RunReport | None = None) -> str:
    """What is wrong with a run report; "" for one that can be calculated with. ``before`` was found sound."""
    try:
        RunKey.parse(run.run)
    except UsageError as error:
        return str(error)
    counts = (run.sessions, run.shards, run.plans, run.fragments, run.quarantined, run.uploads, run.distrusted)
    if max(map(len, counts)) > MAX_ITEMS:
        return f"it lists {max(map(len, counts))} things of one kind"
    if run.owner and not (run.owner.isascii() and run.owner.isdecimal() and int(run.owner[:20]) < MAX_USER):
        return f"its owner {run.owner[:40]!r} is not a user's number"
    return next(filter(None, _problems(run, before or RunReport(run=run.run))), "")


def _problems(run: RunReport, before: RunReport) -> Iterable[str]:
    yield from map(_session_problem, run.sessions)
    yield from map(_shard_problem, run.shards if run.shards is not before.shards else ())
    yield from (_plan_problem(run.run, plan) for plan in (run.plans if run.plans is not before.plans else ()))
    for fragment in run.fragments:
        if not (0 <= fragment.stripe < MAX_MEMBERS and 0 <= fragment.index < MAX_MEMBERS):
            yield f"it holds a fragment of stripe {fragment.stripe}, index {fragment.index}"
    if run.decision is not None and run.decision is not before.decision:
        yield _decision_problem(run.run, run.decision)
    yield from (_number_problem("a quarantined file", mark.attempt, mark.step) for mark in run.quarantined)
    yield from (_number_problem("a distrusted step", item.attempt, item.step) for item in run.distrusted)
    if run.survey is not None and run.survey is not before.survey:
        for snapshot in run.survey.snapshots:
            problem = why_no_snapshot(snapshot, run=run.run, key=snapshot.key)
            yield f"durable step {snapshot.step}: {problem}" if problem else ""
        yield from (_number_problem("a durable step", key.attempt, key.step) for key in run.survey.partial)
        yield from (_number_problem("a durable step", one.attempt, one.step) for one in run.survey.unreadable)


def _number_problem(what: str, *numbers: int) -> str:
    wrong = [number for number in numbers if not 0 <= number < MAX_COUNT]
    return f"{what} counts {wrong[0]}, outside 0 to {MAX_COUNT - 1}" if wrong else ""


def _rank_problem(what: str, rank: int, world_size: int) -> str:
    is_sound = 0 <= rank < world_size <= MAX_WORLD_SIZE
    return "" if is_sound else f"{what} is of rank {rank}, out of range for world size {world_size}"


def _session_problem(session: SessionRecord) -> str:
    steps = (session.last_step, session.skipped_step, session.sealed_step)
    if any(not 0 <= rank < session.world_size for rank in session.needs):
        return f"a trainer needs a rank that its world of {session.world_size} does not have"
    return _rank_problem("a trainer", session.rank, session.world_size) or _number_problem("a trainer", *steps)


def _shard_problem(shard: ShardRecord) -> str:
    return (
        _rank_problem("a shard", shard.rank, shard.world_size)
        or _number_problem("a shard", shard.attempt, shard.step, shard.size_bytes)
        or _text_problem("a shard", shard.digest, shard.world_id, shard.layout)
    )


def _text_problem(what: str, *texts: str) -> str:
    longest = max(map(len, texts))
    return f"{what} has a name of {longest} characters" if longest > MAX_TEXT else ""


def _plan_problem(run: str, plan: Plan) -> str:
    label = f"plan {plan.plan_id[:8]!r}"
    count = len(plan.members)
    if plan.run != run:
        return f"{label} is of run {plan.run[:MAX_TEXT]}"
    if not 0 <= plan.m < count <= MAX_MEMBERS:
        return f"{label} puts {plan.m} parity fragments on {count} members"
    if plan.chunk_bytes <= 0 or plan.chunk_bytes > CHUNK_BYTES:
        return f"{label} has chunks of {plan.chunk_bytes} bytes"
    shards = [shard for member in plan.members for shard in member.shards]
    if not shards or len({shard.rank for shard in shards}) != len(shards):
        return f"{label} names {len(shards)} shards, some of them twice" if shards else f"{label} protects no shard"
    if len({member.node for member in plan.members}) != count:
        return f"{label} names a member twice"
    numbers = _number_problem(label, plan.attempt, plan.step)
    return numbers or next(filter(None, (_row_problem(label, shard, plan.world_size) for shard in shards)), "")


def _row_problem(label: str, shard: VolumeShard, world_size: int) -> str:
    return _rank_problem(label, shard.rank, world_size) or _number_problem(label, shard.size_bytes)


def _decision_problem(run: str, decision: Decision) -> str:
    label = f"decision {decision.decision_id[:8]!r}"
    if decision.run != run:
        return f"{label} is of run {decision.run[:MAX_TEXT]}"
    if not decision.generation.is_possible:
        return f"{label} is of generation {decision.generation.number}"
    if [place.rank for place in decision.placements] != list(range(len(decision.placements))):
        return f"{label} does not place ranks 0 to {len(decision.placements) - 1}"
    if decision.world_size != len(decision.placements):
        return f"{label} places {len(decision.placements)} ranks of a world of {decision.world_size}"
    base, count = decision.base, len(decision.sources)
    if (base is not None) != (decision.outcome in (Outcome.EXACT, Outcome.EXACT_OLDER)):
        return f"{label} is {decision.outcome.value} {'with' if base else 'without'} a snapshot"
    if base is not None and (count != (base.world_size or decision.world_size) or base.attempt >= decision.attempt):
        return (
            f"{label} of attempt {decision.attempt} names {count} sources for {base.world_size} ranks of {base.attempt}"
        )
    if [source.rank for source in decision.sources] != list(range(count)):
        return f"{label} does not name sources for ranks 0 to {count - 1}"
    lineage = (n for entry in decision.lineage for n in (entry.attempt, entry.base_attempt, entry.base_step))
    sources = (n for source in decision.sources for n in (source.rank, source.size_bytes))
    step = base.step if base is not None else 0
    return _number_problem(label, decision.attempt, decision.tries, step, *lineage, *sources)
