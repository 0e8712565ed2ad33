"""What one evaluation of a run found: how well it is protected, as numbers and in one sentence. Pure.

Says how things are; must not decide anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from backstay.ids import SnapshotKey
from backstayd.core.inventory.run_context import RunContext
from backstayd.core.messages.plans import Rebuild
from backstayd.core.recover.choice import Memory
from backstayd.core.sentences import any_nodes, counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What the last evaluation found, for ``desired`` and the status document."""

    context: RunContext
    target: int  # spares that can be reached now
    wanted: int  # spares that the policy asks for
    release: Mapping[SnapshotKey, str]
    redundancy: str
    spares: int
    reason: str
    complete_step: int
    protected_step: int
    drain_lacks: str  # what is missing before the nodes that drain may be stopped; "" if nothing is


def redundancy(
    context: RunContext, memory: Memory, rebuilds: Mapping[str, Rebuild], *, spares: int, wanted: int
) -> tuple[str, str]:
    """How well the run is protected, in a word with a number, and why."""
    if rebuilds:
        done = sum(report.rebuilt_bytes for report in context.reports.values())
        total = sum(report.rebuild_total_bytes for report in context.reports.values())
        percent = min(99, 100 * done // total) if total else 0
        ranks = sorted(target.rank for rebuild in rebuilds.values() for target in rebuild.targets)
        return f"REBUILDING {percent} %", f"the shards of {counted(ranks, 'rank')} are being rebuilt"
    is_new = not memory.protected and not context.tainted
    if is_new and spares <= 0 and wanted > 0 and memory.newest_complete is None:
        return "STARTING", "no snapshot is complete yet"
    if spares < 0:
        newest = max(context.tainted, default=None)
        if newest is None:
            return "UNPROTECTED", "no snapshot is restorable"
        return "UNPROTECTED", f"no other snapshot is restorable; step {newest.step}: {context.tainted[newest]}"
    if spares >= wanted:
        return f"PROTECTED({spares})", f"it tolerates the loss of {any_nodes(spares)}" if spares else "parity is off"
    if spares > 0:
        survived = f"it tolerates the loss of {any_nodes(spares)} instead of {wanted}; repair is under way"
        return f"DEGRADED({spares})", survived
    if not memory.protected:
        return "STARTING", "the first snapshots are still being encoded"
    return "AT_RISK(0)", "the next loss of a node loses the newest snapshot; repair is under way"
