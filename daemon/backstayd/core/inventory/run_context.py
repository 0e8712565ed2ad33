"""All that one run's decisions are made from, at one moment; built once per evaluation. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from backstay.ids import Generation, SnapshotKey
from backstayd.core.inventory.catalog import Inventory, ShapeCache, SnapshotView
from backstayd.core.inventory.distrust import Trust
from backstayd.core.inventory.nodes import NodeState
from backstayd.core.inventory.survey import StorageState
from backstayd.core.messages.decisions import Decision, Distrusted, Lineage
from backstayd.core.messages.durable import PersistedSnapshot
from backstayd.core.messages.plans import Quarantined
from backstayd.core.messages.report import RunReport, SessionPhase, SessionRecord
from backstayd.core.messages.tombstone import Tombstone


@dataclass(frozen=True, slots=True)
class LiveSession:
    """A trainer and the node it is connected to."""

    node: str
    record: SessionRecord


World = Mapping[int, LiveSession]  # rank to session


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """One run at one moment."""

    run: str
    now_s: float
    lease_s: float
    nodes: Mapping[str, NodeState]  # whose lease has not run out
    reports: Mapping[str, RunReport]  # of this run, by node
    inventory: Inventory
    shapes: ShapeCache
    views: tuple[SnapshotView, ...]  # newest first
    live: frozenset[int]  # indexes of those of the live history
    lineage: tuple[Lineage, ...]  # the live history, newest attempt first
    head: Decision | None  # the decision that it follows
    worlds: Mapping[str, World]
    generation: Generation
    has_long_memory: bool  # this coordinator has run for a lease: every node that lives has had time to report
    distrusted: tuple[Distrusted, ...] = ()  # oldest first
    tainted: Mapping[SnapshotKey, str] = field(default_factory=dict)  # not restored although they verify, and why
    trust: Trust = field(default_factory=Trust)
    restore_loop_limit: int = 0
    storage: StorageState = field(default_factory=StorageState)
    stored: tuple[SnapshotView, ...] = ()  # of the live history, on durable storage and not in memory; newest first
    live_records: tuple[PersistedSnapshot, ...] = ()  # of the live history; newest first
    tombstone: Tombstone | None = None  # of the histories of this name that are forgotten
    owner: str = ""  # the user whose run it is; "" until a node names one

    @property
    def live_views(self) -> list[SnapshotView]:
        return [view for index, view in enumerate(self.views) if index in self.live]

    @property
    def sound_views(self) -> list[SnapshotView]:
        """Live views that may be restored as far as trust goes."""
        return [view for view in self.live_views if view.key not in self.tainted]

    @property
    def candidates(self) -> list[SnapshotView]:
        """Snapshots of the live history wherever they lie, newest first; of equal ones that in memory first."""
        return sorted([*self.live_views, *self.stored], key=lambda view: view.key, reverse=True)

    def view_of(self, snapshot_id: str) -> SnapshotView | None:
        """The snapshot of that id, in memory or on durable storage."""
        return next((view for view in (*self.views, *self.stored) if view.snapshot_id == snapshot_id), None)

    def quarantined(self) -> list[tuple[str, Quarantined]]:
        """All that failed verification, each with the node that holds it."""
        reports = sorted(self.reports.items())
        return [(mark.node or name, mark) for name, report in reports for mark in report.quarantined]

    def is_fenced(self, number: int) -> bool:
        """Whether every present node reports at generation ``number`` or above, of this coordinator."""
        return all(
            node.generation.number >= number and node.generation.incarnation == self.generation.incarnation
            for node in self.nodes.values()
        )


def find_worlds(run: str, nodes: Mapping[str, NodeState]) -> dict[str, dict[int, LiveSession]]:
    """Sessions of ``run`` by world and rank."""
    worlds: dict[str, dict[int, LiveSession]] = {}
    for name in sorted(nodes):
        report = nodes[name].runs.get(run)
        for session in report.sessions if report is not None else ():
            worlds.setdefault(session.world_id, {})[session.rank] = LiveSession(name, session)
    return worlds


def phases_of(world: World) -> set[SessionPhase]:
    return {session.record.phase for session in world.values()}


def is_waiting(world: World) -> bool:
    """Whether all ranks of the world are there and blocked in restore()."""
    sizes = {session.record.world_size for session in world.values()}
    return sizes == {len(world)} and max(world) < len(world) and phases_of(world) == {SessionPhase.RESTORING}
