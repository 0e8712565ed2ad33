"""The layout gate: compares what the ranks of a world report to have loaded, before any of them trains. Pure.

One rule: all ranks that a statement names must make it, with the same digest. Must not guess why they differ: names the tensor,
the ranks, what was expected (what most of them have) and what was found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from backstay.protocol.messages import GateEntry
from backstayd.core.inventory.run_context import World
from backstayd.core.messages.decisions import Decision
from backstayd.core.messages.gate import GateReport, GateState, GateVerdict
from backstayd.core.messages.report import SessionPhase, SessionRecord
from backstayd.core.sentences import counted, listed

MAX_DETAILED = 4  # statements whose tensors are asked for: the details of all would not fit a report
MAX_NAMED = 3  # tensors, and statements, that a sentence names
MAX_RANKS = 8
CONTENT_KINDS = frozenset({"replicas", "steps", "rng", "cursor"})  # wrong bytes, not another program


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """A statement on which ranks do not agree."""

    name: str
    ranks: tuple[int, ...]  # that make it
    absent: tuple[int, ...] = ()  # that should and do not
    is_claim: bool = False  # each of them claims to be the only one

    @property
    def kind(self) -> str:
        """What the statement is about: the part before its colon."""
        return self.name.partition(":")[0]


def is_passed_mark(report: GateReport) -> bool:
    """Whether the rank has heard that the gate is passed, and dropped its statements since."""
    return not report.entries and not report.failure


def conflicts_of(reports: Mapping[int, GateReport], world: Iterable[int]) -> list[Conflict]:
    """Statements that some rank makes and another that it names does not make, or makes with another digest.

    Args:
        reports: By rank; those of ranks that take part.
        world: All ranks that take part; what a statement with no ranks names.
    """
    everyone = frozenset(world)
    made: dict[str, dict[int, GateEntry]] = {}
    for rank, report in reports.items():
        for entry in report.entries:
            made.setdefault(entry.name, {})[rank] = entry
    found = []
    for name, by_rank in sorted(made.items()):
        scopes = {frozenset(entry.ranks) or everyone for entry in by_rank.values()}
        named = frozenset().union(*scopes) & everyone
        absent = tuple(sorted(named - set(by_rank)))
        if len(scopes) > 1 or absent or len({entry.digest for entry in by_rank.values()}) > 1:
            is_claim = len(scopes) > 1 and all(len(scope) == 1 for scope in scopes)
            found.append(Conflict(name=name, ranks=tuple(sorted(by_rank)), absent=absent, is_claim=is_claim))
    return found


@dataclass(slots=True)
class Gate:
    """The comparison of one decision at a time. Invariant: a verdict that passed or failed is never taken back."""

    verdict: GateVerdict | None = None
    is_content: bool = False  # it failed because bytes differ
    missing_since_s: dict[int, float] = field(default_factory=dict)

    def update(self, decision: Decision, world: World, *, now_s: float, lease_s: float) -> bool:
        """Go as far as the reports allow; True when it passed or failed just now."""
        if self.verdict is not None and self.verdict.decision_id != decision.decision_id:
            self.verdict, self.is_content, self.missing_since_s = None, False, {}
        if self.verdict is not None and self.verdict.state in (GateState.PASSED, GateState.FAILED):
            return False
        reports = reports_of(decision, {rank: session.record for rank, session in world.items()})
        if not reports:
            return False
        self.verdict = self._judge(decision, world, reports, now_s=now_s, lease_s=lease_s)
        return self.verdict.state in (GateState.PASSED, GateState.FAILED)

    def _judge(
        self, decision: Decision, world: World, reports: Mapping[int, GateReport], *, now_s: float, lease_s: float
    ) -> GateVerdict:
        step = decision.base_step
        if any(is_passed_mark(report) for report in reports.values()):
            return self._verdict(decision, GateState.PASSED)
        for rank, report in sorted(reports.items()):
            if report.failure:
                return self._verdict(
                    decision, GateState.FAILED, f"rank {rank} did not load step {step}: {report.failure}"
                )
        gone = self._gone(decision, world, reports, now_s=now_s, lease_s=lease_s)
        if gone:
            return self._verdict(
                decision,
                GateState.FAILED,
                f"{counted(gone, 'rank')} died after loading step {step}, before the ranks had compared what they loaded",
            )
        waiting = [rank for rank in range(decision.world_size) if rank not in reports and _may_come(world, rank, step)]
        if waiting:
            return self._verdict(decision, GateState.WAITING)
        conflicts = conflicts_of(reports, reports)
        if not conflicts:
            return self._verdict(decision, GateState.PASSED)
        wanted = tuple(conflict.name for conflict in conflicts if not conflict.is_claim)[:MAX_DETAILED]
        if not _has_details(reports, wanted):
            return self._verdict(decision, GateState.DETAIL, entries=wanted)
        self.is_content = all(conflict.kind in CONTENT_KINDS for conflict in conflicts)
        return self._verdict(decision, GateState.FAILED, describe(conflicts, reports, step=step))

    def _gone(
        self, decision: Decision, world: World, reports: Mapping[int, GateReport], *, now_s: float, lease_s: float
    ) -> list[int]:
        """Ranks without a session for a lease: their node is gone, or only its daemon."""
        missing = [rank for rank in range(decision.world_size) if rank not in world and rank not in reports]
        self.missing_since_s = {rank: self.missing_since_s.get(rank, now_s) for rank in missing}
        return [rank for rank, since_s in self.missing_since_s.items() if now_s - since_s >= lease_s]

    def _verdict(
        self, decision: Decision, state: GateState, message: str = "", entries: tuple[str, ...] = ()
    ) -> GateVerdict:
        return GateVerdict(decision_id=decision.decision_id, state=state, entries=entries, message=message)


def reports_of(decision: Decision, sessions: Mapping[int, SessionRecord]) -> dict[int, GateReport]:
    """What the ranks report of ``decision``."""
    return {
        rank: session.gate
        for rank, session in sorted(sessions.items())
        if session.gate is not None and session.gate.decision_id == decision.decision_id
    }


def _may_come(world: World, rank: int, step: int) -> bool:
    """Whether a rank that reported nothing may still do so: one that trains already never will."""
    session = world.get(rank)
    if session is None:
        return True
    record = session.record
    is_training = max(record.last_step, record.skipped_step) > step or record.phase is SessionPhase.ENDED
    return not is_training


def _has_details(reports: Mapping[int, GateReport], wanted: Iterable[str]) -> bool:
    names = set(wanted)
    return all(
        {entry.name for entry in report.entries} & names <= {detail.entry for detail in report.details}
        for report in reports.values()
    )


def describe(conflicts: list[Conflict], reports: Mapping[int, GateReport], *, step: int) -> str:
    """Which tensor, which ranks, expected and found, of the first few conflicts."""
    shown = "; ".join(_sentence(conflict, reports) for conflict in conflicts[:MAX_NAMED])
    more = f"; and {len(conflicts) - MAX_NAMED} more" if len(conflicts) > MAX_NAMED else ""
    return f"the layout gate refuses step {step}: {shown}{more}"


def _sentence(conflict: Conflict, reports: Mapping[int, GateReport]) -> str:
    what = conflict.name
    if conflict.is_claim:
        return f"{what} is owned by {_ranks(conflict.ranks)}, expected one owner"
    details = {
        rank: dict(zip(detail.names, detail.digests, strict=False))
        for rank, report in reports.items()
        for detail in report.details
        if detail.entry == conflict.name
    }
    differing = _differing(details)
    if conflict.absent:
        return f"{what}: stated by {_ranks(conflict.ranks)} only, expected of {_ranks(conflict.absent)} too"
    if not differing:
        return f"{what}: {_ranks(conflict.ranks)} differ"
    shown = "; ".join(_difference(name, details) for name in differing[:MAX_NAMED])
    more = f" ({len(differing)} tensors in all)" if len(differing) > MAX_NAMED else ""
    return f"{what}: {shown}{more}"


def _differing(details: Mapping[int, Mapping[str, str]]) -> list[str]:
    names = sorted({name for found in details.values() for name in found})
    return [name for name in names if len({found.get(name) for found in details.values()}) > 1]


def _difference(name: str, details: Mapping[int, Mapping[str, str]]) -> str:
    """``model.weight is 1a2b on rank 1, expected 3c4d as on ranks 0, 2 and 3``."""
    found = {rank: of_rank.get(name, "") for rank, of_rank in sorted(details.items())}
    counts = Counter(found.values())
    most = max(counts.values())
    expected = next(value for value in found.values() if counts[value] == most)  # of equals, the lowest rank's
    agreeing = [rank for rank, value in found.items() if value == expected]
    others: dict[str, list[int]] = {}
    for rank, value in found.items():
        if value != expected:
            others.setdefault(value, []).append(rank)
    words = [f"{value or 'missing'} on {_ranks(ranks)}" for value, ranks in others.items()]
    return f"{name} is {listed(words[:MAX_NAMED])}, expected {expected or 'missing'} as on {_ranks(agreeing)}"


def _ranks(ranks: Iterable[int]) -> str:
    known = list(ranks)
    if len(known) <= MAX_RANKS:
        return counted(known, "rank")
    return f"{len(known)} ranks ({', '.join(str(rank) for rank in known[:3])}, ...)"
