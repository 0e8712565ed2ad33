"""Which snapshots must not be restored again although their bytes verify, and how often one was restored in vain. Pure.

A snapshot that led to NaN taints what was trained from it. Must not delete anything: retention does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from backstay.ids import SnapshotKey
from backstayd.bounded import drop_oldest
from backstayd.core.inventory.catalog import SnapshotView
from backstayd.core.inventory.nodes import NodeState
from backstayd.core.messages.decisions import Decision, Distrusted, Lineage

MAX_DISTRUSTED = 64  # per run, the oldest are dropped: they travel in every report, and far fewer are ever kept
MAX_REASON = 500  # characters, as it travels in every report


@dataclass(slots=True)
class Trust:
    """What nobody should restore. Invariant: no snapshot is in ``own`` and in ``cleared`` or ``stale_marks`` at once."""

    own: dict[str, Distrusted] = field(default_factory=dict)  # by the gate or an operator, and not yet by every node
    cleared: set[str] = field(default_factory=set)  # trusted again by an operator; nodes may not have heard
    #: Trusted again, and marks may still lie on durable storage. Each with the newest survey of that moment: it takes a later
    #: one to know that there is no mark, for one may have been on its way.
    stale_marks: dict[str, str] = field(default_factory=dict)
    is_loop_cleared: bool = False  # the next restore counts as the first
    last_reason: str = ""  # why the newest world ended, as far as is known

    def add(self, distrusted: Distrusted) -> None:
        self.cleared.discard(distrusted.snapshot_id)
        self.stale_marks.pop(distrusted.snapshot_id, None)
        self.own[distrusted.snapshot_id] = distrusted

    def clear(self, known: Iterable[Distrusted], *, survey_id: str) -> None:
        """Trust everything again and begin to count anew."""
        names = {distrusted.snapshot_id for distrusted in known} | set(self.own)
        self.cleared |= names
        self.stale_marks |= dict.fromkeys(sorted(names), survey_id)
        drop_oldest(self.stale_marks, MAX_DISTRUSTED)
        self.own.clear()
        self.is_loop_cleared = True
        self.last_reason = ""

    def begin_world(self) -> None:
        """A world trains: what ended the one before no longer matters."""
        self.is_loop_cleared, self.last_reason = False, ""

    def note_end(self, reason: str) -> None:
        """Note why a world ends; the first thing known of it is kept."""
        self.last_reason = self.last_reason or reason[:MAX_REASON]

    def unite(
        self, run: str, nodes: Iterable[NodeState], marks: Mapping[str, Distrusted], *, survey_id: str
    ) -> tuple[Distrusted, ...]:
        """Take in what nodes and durable storage (``marks``) distrust; all that is distrusted now, oldest first, bounded.

        Args:
            survey_id: The newest survey, if it has been answered; else "".
        """
        found = dict(self.own)
        reports = [node.runs[run] for node in sorted(nodes, key=lambda node: node.name) if run in node.runs]
        reported = {item.snapshot_id: item for report in reversed(reports) for item in report.distrusted}
        for name, item in reported.items():
            if name not in self.cleared:
                found.setdefault(name, item)
        self.cleared &= reported.keys()  # every node has heard: distrusted again, it counts again
        self.stale_marks = {
            name: known_by
            for name, known_by in self.stale_marks.items()
            if name not in found and (name in marks or survey_id in ("", known_by))
        }
        for name, mark in marks.items():
            if name not in self.stale_marks:
                found.setdefault(name, mark)
        ordered = sorted(found.values(), key=lambda item: (item.attempt, item.step, item.snapshot_id))
        return tuple(ordered[-MAX_DISTRUSTED:])


def tainted_views(
    views: Iterable[SnapshotView], lineage: Sequence[Lineage], distrusted: Sequence[Distrusted]
) -> dict[SnapshotKey, str]:
    """Why each of ``views`` must not be restored; those that may are left out."""
    found: dict[SnapshotKey, str] = {}
    for view in views if distrusted else ():
        reason = why_tainted(view.key, view.snapshot_id, lineage, distrusted)
        if reason:
            found[view.key] = reason
    return found


def why_tainted(
    key: SnapshotKey, snapshot_id: str, lineage: Sequence[Lineage], distrusted: Iterable[Distrusted]
) -> str:
    """Why the snapshot ``key`` must not be restored: it is distrusted, or was trained from one that is; "" if it may be."""
    ways = _way_back(key, lineage)
    for item in distrusted:
        if item.snapshot_id == snapshot_id:
            return f"it is distrusted ({item.reason})"
        step = ways.get(item.attempt)
        if step is not None and (step > item.step or (item.attempt != key.attempt and step == item.step)):
            return (
                f"it was trained from step {item.step} of attempt {item.attempt}, which is distrusted ({item.reason})"
            )
    return ""


def _way_back(key: SnapshotKey, lineage: Sequence[Lineage]) -> dict[int, int]:
    """Each attempt from which ``key`` descends, and up to which of its steps."""
    entries = {entry.attempt: entry for entry in lineage}
    ways = {key.attempt: key.step}
    entry = entries.get(key.attempt)
    while entry is not None and entry.base_attempt > 0 and entry.base_attempt not in ways:
        ways[entry.base_attempt] = entry.base_step
        entry = entries.get(entry.base_attempt)
    return ways


def count_tries(head: Decision | None, base_id: str, *, newest: SnapshotKey | None, trust: Trust) -> int:
    """Decisions in a row that restored ``base_id``, with nothing newer made in between.

    Args:
        head: The newest recorded decision.
        newest: The newest snapshot of which every shard was seen at once.
    """
    if trust.is_loop_cleared or head is None or head.base is None or head.base.snapshot_id != base_id:
        return 0
    if newest is not None and newest.attempt == head.attempt:
        return 0
    return head.tries + 1


def loop_message(run: str, step: int, tries: int, last_reason: str) -> str:
    """Why a run that restores the same step again and again is stopped, and what to do."""
    reason = f"; what ended the last one: {last_reason}" if last_reason else ""
    return (
        f"{run} restored step {step} {tries} times in a row without a newer snapshot{reason}. The run is stopped, because "
        f"another restart would end the same way. Find the cause first; then `backstay trust {run}` restarts the count, "
        f"`backstay distrust {run} {step} --reason ...` has the next older step restored, and restore_loop_limit of the "
        "coordinator allows more"
    )
