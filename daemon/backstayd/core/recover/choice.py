"""Which snapshot a world restores, or why none. Pure; how the decision takes effect is in :mod:`recovery`.

A start from scratch (NONE) needs evidence that nothing is lost by it. A known run without a restorable snapshot is refused,
with what is missing and what could be restored instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from backstay.ids import SnapshotKey
from backstayd.bounded import drop_oldest
from backstayd.core.inventory.catalog import NOT_RECOVERABLE, SnapshotView
from backstayd.core.inventory.nodes import natural
from backstayd.core.inventory.run_context import RunContext
from backstayd.core.messages.decisions import Outcome, ShardSource, SourceKind
from backstayd.core.messages.plans import Plan
from backstayd.core.messages.tombstone import Cause
from backstayd.core.sentences import counted, listed

REMEMBERED_SNAPSHOTS = 16
MOST_ALIKE = 3  # runs named because they look like a new one
LIKENESS = 0.8  # of difflib: about one wrong letter in five


@dataclass(slots=True)
class Memory:
    """What this coordinator saw of a run and reports may no longer show; bounded."""

    holders: dict[str, dict[int, str]] = field(default_factory=dict)  # by snapshot id and rank: the last known holder
    keys: dict[str, SnapshotKey] = field(default_factory=dict)  # by snapshot id
    protected: dict[str, None] = field(default_factory=dict)  # ids of snapshots that were protected once
    is_proved_empty: bool = False  # decided so, and no trainer has returned since
    newest_attempt: int = 0  # of the decisions made here; 0: none was
    whole_head_id: str = ""  # the newest decision of which all hosts were seen at once
    is_known: bool = False  # something of it was seen
    newest_complete: SnapshotKey | None = None

    def holders_of(self, view: SnapshotView) -> dict[int, str]:
        """Who held each shard when the snapshot was last complete; empty if it never was seen so."""
        known = view.snapshot_id or next((i for i, key in self.keys.items() if key == view.key), "")
        return self.holders.get(known, {})

    def note_head(self, context: RunContext) -> None:
        """Remember that all hosts of the newest decision are here at once."""
        head = context.head
        if head is not None and head.hosts <= context.nodes.keys():
            self.whole_head_id = head.decision_id

    def note(self, view: SnapshotView) -> None:
        """Remember a complete snapshot."""
        self.holders[view.snapshot_id] = {rank: nodes[0] for rank, nodes in view.holders.items() if nodes}
        self.keys[view.snapshot_id] = view.key
        self.newest_complete = max(view.key, self.newest_complete or view.key)
        for table in (self.holders, self.keys, self.protected):
            drop_oldest(table, REMEMBERED_SNAPSHOTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    outcome: Outcome
    view: SnapshotView | None = None
    message: str = ""
    is_proved_empty: bool = False  # NONE not because every rank allows it


def choose(
    context: RunContext,
    memory: Memory,
    *,
    is_fresh_allowed: bool,
    excluded: Mapping[str, str] = MappingProxyType({}),
) -> Choice:
    """The newest restorable snapshot of the live history, however many ranks wrote it.

    Args:
        excluded: By snapshot id, what could not be staged, and why. It exists, so nothing starts from scratch.
    """
    passed: list[SnapshotView] = []
    for view in context.candidates:
        if not view.is_available or view.snapshot_id in excluded or view.key in context.tainted:
            passed.append(view)
            continue
        return _restore(context, memory, view, passed, excluded)
    if context.storage.error:
        return _refuse(context, f"durable storage may hold it and could not be read: {context.storage.error}")
    unstaged = next((view for view in passed if view.snapshot_id in excluded and view.is_available), None)
    if unstaged is not None:
        return _refuse(context, _unstaged(excluded[unstaged.snapshot_id]), step=unstaged.key.step)
    if not memory.is_known and context.inventory.is_empty:
        over = _over(context, is_fresh_allowed=is_fresh_allowed)
        if over is not None:
            return over
    if is_fresh_allowed:
        return Choice(outcome=Outcome.NONE, message="nothing is restorable, and every rank allows a start from scratch")
    if _is_proved_empty(context, memory):
        message = "no snapshot was ever complete: it starts from scratch again"
        return Choice(outcome=Outcome.NONE, message=message, is_proved_empty=True)
    return _refuse_all(context, memory, passed)


def _over(context: RunContext, *, is_fresh_allowed: bool) -> Choice | None:
    """The choice for a run of which no node holds anything: it is new, or over. None if it is neither."""
    tombstone = context.tombstone
    if tombstone is not None and tombstone.cause in (Cause.FINISHED, Cause.IDLE) and not is_fresh_allowed:
        return Choice(
            outcome=Outcome.REFUSED,
            message=f"{context.run} {tombstone.sentence()}, and no snapshot of it is left in memory"
            f"{_nor_stored(context)}; choose a new run_id, or start over under this one with restore(allow_fresh=True)",
        )
    if context.storage.is_known:
        return None
    known = f"no node knows {context.run}"
    if tombstone is not None and tombstone.cause is not Cause.UNUSED:
        known = f"{context.run} {tombstone.sentence()}"
    return Choice(outcome=Outcome.NONE, message=f"{known}: it starts from scratch", is_proved_empty=True)


def _restore(
    context: RunContext, memory: Memory, view: SnapshotView, passed: list[SnapshotView], excluded: Mapping[str, str]
) -> Choice:
    broken = [other for other in passed if other.snapshot_id in excluded or _was_promised(context, memory, other)]
    newest = broken[0].key if broken else None
    unreadable = context.storage.unreadable_above(newest or view.key, context.lineage)
    if unreadable is not None:
        newest, why = unreadable, context.storage.problem_at(unreadable)
    elif broken:
        why = missing_sentence(context, memory, broken[0]) or _unstaged(excluded.get(broken[0].snapshot_id, ""))
    if newest is None:
        return Choice(outcome=Outcome.EXACT, view=view, message=f"step {view.key.step} is restorable on every rank")
    message = (
        f"restoring step {view.key.step}, not {newest.step}: {why}; {newest.step - view.key.step} steps are repeated"
    )
    return Choice(outcome=Outcome.EXACT_OLDER, view=view, message=message)


def _was_promised(context: RunContext, memory: Memory, view: SnapshotView) -> bool:
    """Whether a newer snapshot that cannot be restored had been protected or persisted, or was lost to corruption."""
    if view.key in context.tainted or (view.snapshot_id and view.snapshot_id in memory.protected):
        return True
    if context.storage.problem_at(view.key):
        return True
    return any(SnapshotKey(mark.attempt, mark.step) == view.key for _, mark in context.quarantined())


def _is_proved_empty(context: RunContext, memory: Memory) -> bool:
    """Whether each host of a run that began from scratch is here, and none ever saw a whole snapshot.

    A host that recorded the decision has kept its memory, and would hold a shard of any whole snapshot. Where nobody holds
    anything, hosts that recorded nothing have missed nothing: the decision was abandoned before its release.
    """
    if memory.newest_complete is not None or any(view.snapshot_id for view in context.views):
        return False
    if context.quarantined() or context.storage.is_known:
        return False
    if memory.is_proved_empty:
        return True
    head = context.head
    if head is None or head.outcome is not Outcome.NONE:
        return False
    _, recorded = context.inventory.decisions.get(head.decision_id, (head, set()))
    is_untouched = not context.views and bool(head.hosts & recorded) and head.hosts <= context.nodes.keys()
    return head.hosts <= recorded or is_untouched


def is_never_used(context: RunContext, memory: Memory) -> bool:
    """Whether nothing can be missed if the run's name is dropped: every host is here, and none ever saw a snapshot."""
    return context.has_long_memory and not context.views and _is_proved_empty(context, memory)


def _refuse(context: RunContext, missing: str, *, step: int | None = None) -> Choice:
    where = f" at step {step}" if step is not None else ""
    return Choice(outcome=Outcome.REFUSED, message=f"cannot restore {context.run}{where}: {missing}")


def _unstaged(reason: str) -> str:
    return f"its shards exist, but staging them failed repeatedly ({reason})"


def _refuse_all(context: RunContext, memory: Memory, passed: list[SnapshotView]) -> Choice:
    """Nothing can be restored: what is missing, and what could be had."""
    known = [view for view in passed if view.snapshot_id] or passed
    had = f"no older step is in memory{' or on durable storage' if context.storage.url else ''}{_nor_read(context)}"
    if any(view.key in context.tainted for view in passed):
        had += (
            f". To have an older one next time, keep two (keep = 2 of the coordinator) or a durable copy (persist_url); "
            f"`backstay trust {context.run}` lets it be restored anyway"
        )
    if known:  # the newest step of which anything is left: what an operator can still look at
        return _refuse(context, f"{missing_sentence(context, memory, known[0])}; {had}", step=known[0].key.step)
    remembered = sorted(memory.keys.items(), key=lambda item: item[1], reverse=True)
    if remembered:
        snapshot_id, key = remembered[0]
        nodes = sorted(set(memory.holders.get(snapshot_id, {}).values()), key=natural)
        missing = f"no surviving node holds any of it (it was on {listed(nodes)}); {had}"
        return _refuse(context, missing, step=key.step)
    away = _hosts_away(context)
    last = f"; it last ran on {listed(away)}, which {'is' if len(away) == 1 else 'are'} away" if away else ""
    return _refuse(
        context,
        f"the run is known, but no snapshot of it is in memory anywhere{_nor_stored(context)}{last}; "
        f"{'wait for it to come back, or ' if away else ''}start over with restore(allow_fresh=True) or under a new run_id",
    )


def _hosts_away(context: RunContext) -> list[str]:
    """Hosts of the newest known decision that are not here."""
    hosts = context.head.hosts if context.head is not None else frozenset()
    return sorted(hosts - context.nodes.keys(), key=natural)


def missing_sentence(context: RunContext, memory: Memory, view: SnapshotView) -> str:
    """Which ranks' shards are lost, with which nodes, and how many losses the parity covers; "" if none is."""
    lost = [] if view.url else view.lost_ranks
    problem = context.storage.problem_at(view.key)
    if problem and lost:
        return problem
    if not lost:
        return context.tainted.get(view.key, "")
    is_one = len(lost) == 1
    subject = f"{counted(lost, 'rank')} {'is' if is_one else 'are'}"
    remembered = memory.holders_of(view)
    if not view.snapshot_id and not remembered:
        return f"{subject} missing: it never became complete"
    corrupt = _corrupt_holders(context, view, lost)
    plans = [state.plan for state in view.plans if set(lost) & set(state.rank_spares)]
    names = sorted(_gone(context, view, lost, plans, remembered) - set(corrupt), key=natural)
    reasons = [f"node{'' if len(names) == 1 else 's'} {', '.join(names)} gone"] if names else []
    reasons.extend(f"what {name} holds is corrupt" for name in corrupt)
    count, m = len(names) + len(corrupt), max((plan.m for plan in plans), default=0)
    if count <= m:  # these losses alone do not explain it
        spoilt = sorted(_spoilt_parity(context, view) - {*names, *corrupt}, key=natural)
        reasons.extend(f"parity on {name} is corrupt" for name in spoilt)
        count += len(spoilt)
    if plans and count > m:
        reasons.append(f"{count} loss{'' if count == 1 else 'es'}, parity covers {m}")
    else:
        reasons.append("its parity is not complete" if plans else "it was not protected")
    return f"{subject} lost ({'; '.join(reasons)})"


def _nor_stored(context: RunContext) -> str:
    storage = context.storage
    if not storage.url:
        return ""
    found = f", and what lies in {storage.url} is not a whole snapshot" if storage.is_known else f" or in {storage.url}"
    return found + _nor_read(context)


def _nor_read(context: RunContext) -> str:
    """The newest copy whose record cannot be used: a person may be able to repair it."""
    newest = max(context.storage.unreadable, default=None)
    return f" (step {newest.step}: {context.storage.problem_at(newest)})" if newest is not None else ""


def _gone(
    context: RunContext, view: SnapshotView, lost: Sequence[int], plans: Sequence[Plan], remembered: Mapping[int, str]
) -> set[str]:
    """Nodes that held a part of the snapshot and are away, or came back without it."""
    members = {member.node for plan in plans for member in plan.members if member.shards}
    gone = {name for name in members if view.key not in _keys_on(context, name)}
    if gone:
        return gone
    held = {remembered[rank] for rank in lost if rank in remembered}
    return {name for name in held if view.key not in _keys_on(context, name)}


def _corrupt_holders(context: RunContext, view: SnapshotView, lost: Sequence[int]) -> list[str]:
    """Present nodes on which the shard of a lost rank failed verification."""
    found = {
        holder
        for holder, mark in context.quarantined()
        if SnapshotKey(mark.attempt, mark.step) == view.key and mark.rank in lost
    }
    return sorted(found, key=natural)


def _spoilt_parity(context: RunContext, view: SnapshotView) -> set[str]:
    """Present nodes on which parity of the snapshot failed verification."""
    return {
        holder
        for holder, mark in context.quarantined()
        if SnapshotKey(mark.attempt, mark.step) == view.key and mark.plan_id
    }


def _keys_on(context: RunContext, node: str) -> set[SnapshotKey]:
    report = context.reports.get(node)
    return {shard.key for shard in report.shards} if report is not None else set()


def sources_of(
    view: SnapshotView, *, readers: Mapping[int, str], targets: Mapping[int, str]
) -> tuple[ShardSource, ...]:
    """Where each shard of ``view`` comes from.

    Args:
        readers: By rank, the one node that reads its shard, where there is just one: the rank runs there again.
        targets: By rank, the node that will hold a shard that nobody holds now; whoever needs chunks of it asks there.
    """
    sources = []
    for rank in range(view.world_size):
        host = readers.get(rank, "")
        holders = view.holders.get(rank, ())
        if host in holders:
            kind, named = SourceKind.LOCAL, (host, *(name for name in holders if name != host))
        elif holders:
            kind, named = SourceKind.PEER, holders
        elif view.rank_spares.get(rank, NOT_RECOVERABLE) > NOT_RECOVERABLE or not view.url:
            kind, named = SourceKind.REBUILD, (targets[rank],) if targets.get(rank) else ()
        else:
            kind, named = SourceKind.PERSISTED, ()
        sources.append(
            ShardSource(
                rank=rank,
                size_bytes=view.sizes[rank],
                digest=view.digests[rank],
                kind=kind,
                holders=named,
                layout=view.layouts.get(rank, ""),
            )
        )
    return tuple(sources)


def near_sentence(run: str, known: Mapping[str, str]) -> str:
    """Which of ``known`` (run to what became of it) have a name like ``run``; "" for none.

    Its job must be the same and its run_id like it, or its run_id the same and its job another.
    """
    job, _, run_id = run.partition("/")
    parts = {name: name.partition("/") for name in sorted(known) if name != run}
    lowered = {other.lower(): name for name, (of, _, other) in parts.items() if of == job}
    close = difflib.get_close_matches(run_id.lower(), lowered, n=MOST_ALIKE, cutoff=LIKENESS)
    found = [lowered[name] for name in close]
    found += [name for name, (of, _, other) in parts.items() if of != job and other == run_id]
    if not found:
        return ""
    return f"; runs with a name like it: {listed(f'{name} ({known[name]})' for name in found[:MOST_ALIKE])}"
