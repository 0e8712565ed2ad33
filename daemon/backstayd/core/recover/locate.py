"""Where the shards of a complete snapshot are, for a reader outside of the run. Pure; decides and changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

from backstay.errors import SnapshotNotFoundError, UnavailableError
from backstayd.core.inventory.catalog import SnapshotView
from backstayd.core.inventory.run_context import RunContext
from backstayd.core.messages.decisions import Base, ShardSource
from backstayd.core.messages.desired import Peer
from backstayd.core.recover.choice import sources_of
from backstayd.core.sentences import counted, listed


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """A snapshot of which every shard is held."""

    run: str
    base: Base
    sources: tuple[ShardSource, ...]
    peers: tuple[Peer, ...] = ()
    owners: tuple[str, ...] = ()  # users whose run it is, by the nodes' reports


def locate(context: RunContext, step: int) -> Located:
    """The snapshot of ``step`` of the live history; 0: the newest that can be read whole now.

    Raises:
        SnapshotNotFoundError: there is none. UnavailableError: some of its shards would have to be rebuilt first.
    """
    view = _choose(context, step)
    names = sorted({name for holders in view.holders.values() for name in holders})
    return Located(
        run=context.run,
        base=Base(
            attempt=view.key.attempt, step=view.key.step, snapshot_id=view.snapshot_id, world_size=view.world_size
        ),
        sources=sources_of(view, readers={}, targets={}),
        peers=tuple(Peer(name=n, bulk_address=context.nodes[n].identity.bulk_address) for n in names),
        owners=tuple(sorted({report.owner for report in context.reports.values() if report.owner})),
    )


def _choose(context: RunContext, step: int) -> SnapshotView:
    sound = [view for view in context.sound_views if view.is_restorable and step in (0, view.key.step)]
    whole = next((view for view in sound if view.is_complete), None)
    if whole is not None:
        return whole
    if sound:
        lost = counted(sound[0].unheld_ranks, "rank")
        raise UnavailableError(
            f"run {context.run}: nobody holds the shard of {lost} at step {sound[0].key.step}; it is rebuilt from "
            "parity if its node stays away; try again in a moment",
            reason="must_be_rebuilt",
        )
    steps = sorted({view.key.step for view in context.sound_views if view.is_complete})
    had = f"; it has step{'s' if len(steps) > 1 else ''} {listed(steps)}" if steps else ""
    wanted = f"step {step}" if step else "a complete snapshot"
    raise SnapshotNotFoundError(f"run {context.run}: {wanted} is not in memory{had}", reason="no_snapshot")
