"""Which snapshots may be deleted. Pure.

Invariants:

- A snapshot that protects is never given up before another one protects as well *now*, by what live nodes report. "It was
  protected a moment ago" is worth nothing when the nodes fail that made it so.
- Nothing that a decision left behind (above its base, or of an abandoned history) is deleted before a trainer has returned with
  that decision. Until then the next coordinator may never have heard of it, and would want to restore what was deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

from backstay.ids import SnapshotKey
from backstayd.core.inventory.catalog import SnapshotView
from backstayd.core.inventory.run_context import RunContext, phases_of
from backstayd.core.messages.decisions import Decision
from backstayd.core.messages.report import SessionPhase, SessionRecord

ABANDONED: Final = "abandoned"  # the cause of an event: a step that can never become complete was given up


def releasable(
    views: Sequence[SnapshotView],
    *,
    live: Collection[int],
    dead: Collection[int],
    keep: int,
    target: int,
    abandoned: Collection[SnapshotKey],
    tainted: Collection[SnapshotKey] = (),
    held: Collection[SnapshotKey] = (),
    left: Callable[[SnapshotView], int] | None = None,
) -> dict[int, str]:
    """Which of ``views`` (newest first) may be released, by index, and why.

    Args:
        live: indexes of the views that belong to the live history.
        dead: indexes of the views that a decision has left behind; they are never restored again.
        keep: how many snapshots that protect are kept.
        target: the spares that new snapshots reach. Where a job has shrunk, no more can be asked of the newer one.
        abandoned: steps that can never become complete, because a rank went past them without a shard.
        tainted: distrusted ones, which are no substitute for sound ones.
        held: never released: on probation, or being uploaded.
        left: spares of a snapshot once the draining nodes have stopped; None: none drains. One that survives that is not
            given up for one that does not.
    """
    chosen: dict[int, str] = {}
    count_left = left or (lambda view: view.spares)
    for index, view in enumerate(views):
        if index in dead:
            reason = _why_release_dead(views, index, live=live, dead=dead, target=target, count_left=count_left)
        elif index not in live:
            continue
        elif view.key in abandoned and not view.is_restorable:
            reason = "a rank went past it without a snapshot"
        else:
            is_tainted = view.key in tainted
            others = [
                (place < index, other)
                for place, other in enumerate(views)
                if place != index
                and place in live
                and other.is_restorable
                and (is_tainted or not view.is_restorable or other.key not in tainted)
                and count_left(other) >= min(count_left(view), target)
            ]
            reason = _why_release_live(
                view,
                newer=[other for is_newer, other in others if is_newer],
                older=[other for is_newer, other in others if not is_newer],
                keep=keep if view.is_restorable and not is_tainted else 1,
                target=target if view.is_restorable else 0,
            )
        if reason and view.key not in held:
            chosen[index] = reason
    return chosen


def _why_release_live(
    view: SnapshotView, *, newer: Sequence[SnapshotView], older: Sequence[SnapshotView], keep: int, target: int
) -> str:
    """A newer one in full takes its place, if ``keep`` others are worth as much."""
    best = next((other for other in newer if other.spares >= target), None)
    good = [other for other in newer if other.spares >= min(view.spares, target)]
    if view.spares < target:
        good += [other for other in older if other.spares >= target]
    return f"step {best.key.step} is as well protected ({best.spares} spares)" if best and len(good) >= keep else ""


def _why_release_dead(
    views: Sequence[SnapshotView],
    index: int,
    *,
    live: Collection[int],
    dead: Collection[int],
    target: int,
    count_left: Callable[[SnapshotView], int],
) -> str:
    """The best of the dead goes when a live one protects as well; the others only take slots."""
    view = views[index]
    if not view.is_restorable:
        return "its history ended, and shards of it are missing"
    for place, other in enumerate(views):
        if count_left(other) < min(count_left(view), target):
            continue
        if place in live and other.is_restorable and other.spares >= min(view.spares, target):
            return f"its history ended; step {other.key.step} is as well protected"
        if place in dead and (other.spares > view.spares or (other.spares == view.spares and place < index)):
            return f"its history ended, and so did that of step {other.key.step}, which is as well protected"
    return ""


def abandoned_keys(
    views: Sequence[SnapshotView], *, attempt: int, sessions: Mapping[int, SessionRecord], present: Collection[str]
) -> set[SnapshotKey]:
    """Steps of ``attempt`` that some rank of the running world passed or skipped, and whose shard nobody holds.

    Not one that was encoded and of which a member is not ``present``: it may come back with what is missing.
    """
    found = set()
    for view in views:
        members = {member.node for state in view.plans for member in state.plan.members}
        if view.key.attempt != attempt or view.is_restorable or not members <= set(present):
            continue
        for rank, session in sessions.items():
            is_lacking = rank < view.world_size and not view.holders.get(rank)
            if not is_lacking or session.phase is not SessionPhase.TRAINING:
                continue
            if session.last_step > view.key.step or session.skipped_step >= view.key.step:
                found.add(view.key)
                break
    return found


def has_returned(context: RunContext, decision: Decision) -> bool:
    """Whether a trainer is known to have returned with ``decision``: one trains, has finished, or has written a shard."""
    phases = phases_of(context.worlds.get(decision.world_id, {}))
    own = ("", decision.world_id)
    is_written = any(view.key.attempt == decision.attempt and view.world_id in own for view in context.views)
    is_stored = any(record.attempt == decision.attempt for record in context.live_records)
    return bool(phases & {SessionPhase.TRAINING, SessionPhase.ENDED}) or is_written or is_stored
