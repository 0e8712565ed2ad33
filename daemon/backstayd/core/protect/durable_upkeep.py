"""Upkeep of a run's directory on durable storage: what is pruned, and marks of distrust. By one node at a time. Pure.

Invariant: each removal is ordered with its *grounds*, the newer copies that stay, and the node looks at them again before it
removes anything. Storage is shared: since it was listed, another cluster may have removed or overwritten what made the older
copy superfluous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from backstay.ids import SnapshotKey
from backstayd.core.inventory.durable_names import is_markable
from backstayd.core.inventory.nodes import natural
from backstayd.core.inventory.run_context import RunContext
from backstayd.core.inventory.survey import Surveying
from backstayd.core.messages.decisions import Distrusted
from backstayd.core.messages.durable import PersistedSnapshot, StorageDesired, Stored
from backstayd.core.policy import CorePolicy
from backstayd.core.timeline import LogEvent

ABANDONED_LEASES = (
    200  # ten minutes at the default lease after which a partial upload is removed: one under way is resumed before
)
MAX_PRUNES = 16  # ordered at a time, so that an order stays small
MAX_MARKS = 16


@dataclass(slots=True)
class Upkeep:
    """State of one run."""

    run: str
    policy: CorePolicy
    log: LogEvent
    surveying: Surveying
    node: str = ""  # which does it
    prunes: tuple[Stored, ...] = ()
    grounds: tuple[Stored, ...] = ()
    distrust: tuple[Distrusted, ...] = ()
    trust: tuple[Distrusted, ...] = ()

    def take(self, context: RunContext) -> None:
        """Note what the node has done."""
        report = context.reports.get(self.node)
        if report is None:
            return
        for item in self.prunes:
            if item.key in report.pruned:
                self.log("pruned", f"step {item.step} of attempt {item.attempt} was removed from durable storage")
                self.surveying.note_pruned(item.key)
        self.prunes = tuple(item for item in self.prunes if item.key not in report.pruned)
        for mark in self.distrust:
            if mark.snapshot_id in report.marked:
                self.surveying.note_marked(mark)
        for mark in self.trust:
            if mark.snapshot_id in report.struck:
                self.surveying.note_struck(mark.snapshot_id)

    def choose(
        self, context: RunContext, live: Sequence[PersistedSnapshot], *, kept: set[SnapshotKey], is_waiting: bool
    ) -> None:
        """Decide what is removed and marked now.

        Args:
            live: copies of the live history that a restart could use.
            kept: what stays in any case.
            is_waiting: a world decides, or what it restored is on probation: nothing is removed.
        """
        self.prunes, self.grounds = (), ()
        if not self.surveying.is_answered:
            self.distrust = self.trust = ()
            return
        if not is_waiting:
            self._choose_prunes(context, live, kept)
        self._choose_marks(context)
        if self.node not in context.reports:
            self.node = min(context.reports, key=natural, default="")

    def ordered(self, desired: StorageDesired) -> StorageDesired:
        """``desired`` of :attr:`node` with what it does for all."""
        return replace(desired, prunes=self.prunes, grounds=self.grounds, distrust=self.distrust, trust=self.trust)

    def check_invariants(self, newest: PersistedSnapshot | None) -> None:
        """Raise AssertionError for a mistake of ours."""
        keys = {item.key for item in self.prunes}
        assert not keys & {item.key for item in self.grounds}
        assert newest is None or newest.key not in keys, "the newest persisted snapshot stays"

    def _choose_prunes(self, context: RunContext, live: Sequence[PersistedSnapshot], kept: set[SnapshotKey]) -> None:
        keep_last = self.policy.persist_keep_last
        known = {record.key: record.snapshot_id for record in self.surveying.known.values()}
        keys = prunable(
            list(self.surveying.known.values()),
            live=live,
            keep_last=keep_last,
            keep_every=self.policy.persist_keep_every,
        )
        newest = sorted(live, key=lambda record: record.key, reverse=True)[: max(1, keep_last)]
        age_s = ABANDONED_LEASES * self.policy.lease_s
        for key, since_s in self.surveying.partial.items():
            if newest and key < newest[0].key and context.now_s - since_s >= age_s:
                keys.append(key)
        chosen = sorted(key for key in keys if key not in kept)[:MAX_PRUNES]
        self.prunes = tuple(
            Stored(attempt=key.attempt, step=key.step, snapshot_id=known.get(key, "")) for key in chosen
        )
        self.grounds = tuple(map(stored, newest)) if chosen else ()

    def _choose_marks(self, context: RunContext) -> None:
        marks = self.surveying.marks
        missing = (item for item in context.distrusted if item.snapshot_id not in marks)
        self.distrust = tuple(item for item in missing if is_markable(item.snapshot_id))[:MAX_MARKS]
        self.trust = tuple(marks[name] for name in sorted(context.trust.stale_marks.keys() & marks.keys()))[:MAX_MARKS]


def stored(record: PersistedSnapshot) -> Stored:
    """The name of a copy."""
    return Stored(attempt=record.attempt, step=record.step, snapshot_id=record.snapshot_id)


def prunable(
    known: Sequence[PersistedSnapshot], *, live: Sequence[PersistedSnapshot], keep_last: int, keep_every: int
) -> list[SnapshotKey]:
    """Which of ``known`` are superfluous.

    Kept are the newest ``keep_last`` of ``live`` (sound ones of the live history), and every ``keep_every``-th persisted
    snapshot for good. With fewer live ones nothing is given up: the others may be all there is.
    """
    newest = sorted(live, key=lambda record: record.key, reverse=True)[:keep_last]
    if len(newest) < keep_last:
        return []
    kept = {record.key for record in newest} | {r.key for r in live if keep_every and r.serial % keep_every == 0}
    return [record.key for record in known if record.key not in kept and record.key < newest[-1].key]
