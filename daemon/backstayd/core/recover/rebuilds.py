"""The rebuilds of one run that are under way: which snapshot's lost shards are recomputed now, and for whom. Pure.

:mod:`rebuild_plan` cuts each rebuild into tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from backstayd.core.inventory.catalog import SnapshotView
from backstayd.core.inventory.nodes import staying
from backstayd.core.inventory.run_context import RunContext
from backstayd.core.messages.decisions import SourceKind
from backstayd.core.messages.plans import Rebuild
from backstayd.core.protect.durable_uploads import Persisting
from backstayd.core.recover.rebuild_plan import choose_targets, is_still_possible, open_targets, plan_rebuilds
from backstayd.core.recover.recovery import Recovery, Stage
from backstayd.core.sentences import counted, listed
from backstayd.core.timeline import LogEvent


@dataclass(slots=True)
class Rebuilds:
    """Invariant: all are of one snapshot, and each lost shard is recomputed by one of them at most."""

    lease_s: float
    log: LogEvent
    allow_again: Callable[[str], None]
    under_way: dict[str, Rebuild] = field(default_factory=dict)  # by plan id
    missing_since: dict[str, float] = field(default_factory=dict)  # by snapshot id

    def update(
        self, context: RunContext, recovery: Recovery, persisting: Persisting, *, hosts: Collection[str]
    ) -> None:
        """Keep rebuilds that can finish, drop the others, begin new ones where shards are gone."""
        self._drop_finished(context)
        view, placements = self._wanted(context, recovery, persisting)
        if view is None:
            self.under_way = {}
            return
        self._drop_impossible(context, view, placements)
        taken = {target.rank for rebuild in self.under_way.values() for target in rebuild.targets}
        if set(view.unheld_ranks) - taken:
            targets = _targets(context, view, placements, preferred=None if recovery.is_active else hosts)
            self._begin(context, view, {rank: node for rank, node in targets.items() if rank not in taken})

    def _drop_finished(self, context: RunContext) -> None:
        for plan_id, rebuild in list(self.under_way.items()):
            if not open_targets(rebuild, context.inventory):
                del self.under_way[plan_id]
                self.allow_again("rebuild")
                ranks = [target.rank for target in rebuild.targets]
                step = rebuild.plan.step
                self.log("repaired", f"the shards of {counted(ranks, 'rank')} at step {step} are rebuilt")

    def _drop_impossible(self, context: RunContext, view: SnapshotView, placements: Mapping[int, str]) -> None:
        for plan_id, rebuild in list(self.under_way.items()):
            is_right = rebuild.plan.snapshot_id == view.snapshot_id and all(
                placements.get(target.rank, target.node) == target.node for target in rebuild.targets
            )
            if not is_right or not is_still_possible(
                rebuild, nodes=context.nodes, inventory=context.inventory, shapes=context.shapes
            ):
                del self.under_way[plan_id]

    def _begin(self, context: RunContext, view: SnapshotView, targets: Mapping[int, str]) -> None:
        for rebuild in plan_rebuilds(
            view, targets=targets, nodes=context.nodes, inventory=context.inventory, shapes=context.shapes
        ):
            if rebuild.plan.plan_id not in self.under_way:
                self.under_way[rebuild.plan.plan_id] = rebuild
                owners = listed(f"rank {target.rank} on {target.node}" for target in rebuild.targets)
                decoders = sorted({task.decoder for task in rebuild.tasks})
                self.log("rebuild", f"rebuilding step {view.key.step}: {owners}, decoded by {listed(decoders)}")

    def _wanted(
        self, context: RunContext, recovery: Recovery, persisting: Persisting
    ) -> tuple[SnapshotView | None, dict[int, str]]:
        """Which snapshot's shards should be rebuilt now, and where each is wanted."""
        if recovery.stage is Stage.FENCING:
            return None, {}
        if recovery.is_active:
            return _decided(context, recovery)
        best = max(
            (view for view in context.live_views if view.is_restorable),
            key=lambda view: (view.key not in context.tainted, view.spares, view.key),
            default=None,
        )
        if best is not None and best.is_complete:
            best = _newer_incomplete(context, best)
        best = best or persisting.incomplete_view(context)
        if best is None:
            self.missing_since.clear()
            return None, {}
        since = self.missing_since.setdefault(best.snapshot_id, context.now_s)
        if best.spares > 0 and context.now_s - since < self.lease_s:
            return None, {}  # a new world may be about to restore, and its placements are better targets
        placements = recovery.placements_of(best.world_size)
        return best, {rank: node for rank, node in placements.items() if node in staying(context.nodes)}


def _newer_incomplete(context: RunContext, best: SnapshotView) -> SnapshotView | None:
    """The newest after ``best`` that lacks a shard: as it is, it can neither be protected nor released."""
    views = (view for view in context.live_views if view.key > best.key and view.key not in context.tainted)
    return next((view for view in views if view.is_restorable and not view.is_complete), None)


def _decided(context: RunContext, recovery: Recovery) -> tuple[SnapshotView | None, dict[int, str]]:
    """The snapshot that a world is about to restore, and the targets that its decision names."""
    decision = recovery.decision
    base = decision.base if decision is not None else None
    view = context.view_of(base.snapshot_id) if base is not None else None
    sources = decision.sources if decision is not None else ()
    owners = {s.rank: s.holders[0] for s in sources if s.kind is SourceKind.REBUILD and s.holders}
    return (view if view is not None and view.is_available else None), owners


def _targets(
    context: RunContext, view: SnapshotView, placements: Mapping[int, str], *, preferred: Collection[str] | None
) -> dict[int, str]:
    """Targets of the shards that nobody holds; with ``preferred`` None just those that ``placements`` names."""
    if preferred is None:
        return {r: node for r, node in placements.items() if r in view.unheld_ranks and node in context.nodes}
    return choose_targets(
        view, placements=placements, nodes=staying(context.nodes), inventory=context.inventory, preferred=preferred
    )
