"""One run's ledger: what each interruption cost, and which share of the time since the start was productive. Pure.

The coordinator keeps nothing on disk, so the ledger travels in each decision and every host records it with that; a new
coordinator takes it from there. Must not decide anything.

What the numbers mean (times in seconds):

- ``down_s`` of an interruption: from the last report of what was lost until the ranks of the next world trained.
- ``steps_lost``: the newest step that a rank is known to have completed, less the step that was restored. It is a lower bound,
  as only the trainer knows of steps between two snapshots. Asking for a slot ahead of a step does not count as completing it;
  for a trainer of an older release, and for a step whose slot was refused ahead, one interval too many may be counted.
- ``recompute_s``: steps lost times the measured seconds per step.
- ``blocked_s``: what ``snapshot()`` and the fence cost the slowest rank, as trainers report it.
- ``goodput``: (elapsed - down - recompute - blocked) / elapsed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from backstay.format import json_records
from backstay.ids import SnapshotKey
from backstayd.core.inventory.nodes import natural
from backstayd.core.inventory.run_context import RunContext, World
from backstayd.core.messages.decisions import Decision, Interruption, Ledger, Outcome, Placement, SourceKind
from backstayd.core.recover.recovery import Recovery
from backstayd.core.sentences import amount, counted, listed

MAX_ENTRIES = 64  # interruptions kept one by one: they travel in every report
FARTHEST = (SourceKind.PERSISTED, SourceKind.REBUILD, SourceKind.PEER, SourceKind.LOCAL)  # slowest first
SOURCES = {SourceKind.LOCAL: "memory"}  # the others have the name of their kind
GRAVITY = ("world_restarted", "trainer_died", "distrusted", "node_lost", "all_nodes_lost")  # causes, least first


@dataclass(slots=True)
class Progress:
    """How far the history that is written now has come, as this coordinator saw it."""

    newest_step: int = 0
    newest_s: float = 0.0
    first_step: int = 0  # the first one seen, from which the speed is measured
    first_s: float = 0.0
    blocked_s: float = 0.0
    heard_s: dict[str, float] = field(default_factory=dict)  # by host: when it reported last
    #: By rank: the incarnation of the daemon that reported it last.
    seen_by: dict[int, str] = field(default_factory=dict)

    def note(self, step: int, now_s: float) -> None:
        """Training has come to ``step``."""
        if step <= self.newest_step and self.first_s:
            return
        if not self.first_s:
            self.first_step, self.first_s = step, now_s
        self.newest_step, self.newest_s = max(step, self.newest_step), now_s

    @property
    def step_s(self) -> float:
        """Measured seconds per step; 0 while too little was seen."""
        steps = self.newest_step - self.first_step
        return (self.newest_s - self.first_s) / steps if steps > 0 else 0.0


@dataclass(slots=True, kw_only=True)
class Accounts:
    """Call :meth:`watch` before a recovery is taken further and :meth:`follow` after it; :meth:`entered` when it decides.

    Invariant: ``current`` is the newest decision whose world trained, as far as is known; ``open`` is what ended that world.
    """

    unix_offset_s: float = 0.0  # from the core's clock to Unix time
    ledger: Ledger | None = None
    current: Decision | None = None
    open: Interruption | None = None
    is_interrupted: bool = False  # ``open`` is certain: a daemon saw a rank die, or another world began
    silent: tuple[Placement, ...] = ()  # ranks that no daemon reports and none saw die
    progress: Progress = field(default_factory=Progress)
    ended_unix_s: float = 0.0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("complete", "protected", "persisted"), 0))
    _made_id: str = ""  # the newest decision that this coordinator saw through
    _stored_id: str = ""

    def count(self, what: str) -> None:
        """One more snapshot is complete, or protected."""
        self.counts[what] += 1

    def watch(self, context: RunContext, recovery: Recovery, ended: Mapping[str, set[int]]) -> None:
        """Note how far training is and whether it was interrupted; ``ended``: by world, ranks that finished."""
        head = context.head
        is_foreign = head is not None and head.decision_id not in (self._made_id, _id(self.current))
        if head is not None and is_foreign and not recovery.is_active:
            self._adopt(head, context)
        if self.current is None:
            return
        self._note_release(context, recovery)
        self._note_progress(context)
        self._note_losses(context, ended)

    def follow(self, context: RunContext, recovery: Recovery) -> None:
        """The recovery went as far as it can: note that a world waits, or that it trains."""
        decision = recovery.decision
        if recovery.is_active and decision is not None:
            self._made_id = decision.decision_id
        current = self.current
        if current is not None and self.open is None and recovery.is_active and recovery.world_id != current.world_id:
            self.open = self._restarted(recovery.opened_s)
        self.is_interrupted = self.open is not None and (self.is_interrupted or self._is_replaced(recovery))
        decision = recovery.released
        if decision is None or decision.decision_id == _id(self.current):
            return
        self.ledger = decision.ledger or self.ledger or Ledger(began_unix_s=self._unix(context.now_s))
        self._begin(decision, context)
        self._change_last(decision, released_unix_s=self._unix(context.now_s))

    def entered(self, decision: Decision, context: RunContext, recovery: Recovery) -> Decision:
        """The decision about to be made, with the ledger that every host records with it."""
        now = self._unix(context.now_s)
        if decision.outcome is Outcome.REFUSED:
            return decision
        if self.current is None or self.ledger is None:
            is_first = decision.base is None and decision.attempt == 1
            return replace(decision, ledger=Ledger(began_unix_s=now, is_whole=is_first))
        stored = context.live_records[0].step if context.live_records else 0
        entry = replace(
            self.open or self._restarted(recovery.opened_s),
            opened_unix_s=self._unix(recovery.opened_s),
            decided_unix_s=now,
            new_attempt=decision.attempt,
            outcome=decision.outcome.value,
            source=_source(decision),
            base_step=decision.base_step,
            has_storage=context.storage.url != "",
            persisted_step=stored,
        )
        return replace(decision, ledger=add_entry(self.ledger, entry))

    def end(self, now_s: float) -> None:
        """The run is over: no time counts from now on."""
        self.ended_unix_s = self.ended_unix_s or self._unix(now_s)

    def document(self, now_s: float) -> dict[str, Any] | None:
        """For the status document; None before a world of the run trained."""
        if self.ledger is None or self.current is None:
            return None
        now = self.ended_unix_s or self._unix(now_s)
        entries = [*self.ledger.entries, *([self.open] if self.open is not None and self.is_interrupted else [])]
        found = summary(self.ledger, entries, now_unix_s=now, blocked_s=self.progress.blocked_s)
        return found | {
            "ended_unix_s": self.ended_unix_s,
            "attempt": self.current.attempt,
            "newest_step": self.progress.newest_step,
            "step_s": self.step_s,
            "is_interrupted": self.is_interrupted,
            "silent_since_unix_s": self.open.heard_unix_s if self.open is not None and not self.is_interrupted else 0.0,
            "snapshots": dict(self.counts),
        }

    # -- taking over --------------------------------------------------------------------------------------------------

    def _adopt(self, head: Decision, context: RunContext) -> None:
        """Take over what hosts recorded under a former coordinator."""
        self.ledger = head.ledger or Ledger(began_unix_s=self._unix(context.now_s))
        self._begin(head, context)

    def _begin(self, decision: Decision, context: RunContext) -> None:
        self.current, self.open, self.is_interrupted, self.silent = decision, None, False, ()
        base = decision.base_step
        self.progress = Progress(newest_step=base)
        for place in decision.placements:
            self.progress.heard_s[place.node] = context.now_s

    def _note_release(self, context: RunContext, recovery: Recovery) -> None:
        """Where a former coordinator released this world, that was about when the last host recorded the decision."""
        decision, entry = self.current, self._last()
        if entry is None or decision is None or entry.new_attempt != decision.attempt or entry.released_unix_s:
            return
        if recovery.released is not None:
            reports = [context.reports[host] for host in decision.hosts & context.reports.keys()]
            times = [r.recorded_unix_s for r in reports if _id(r.decision) == decision.decision_id]
            self._change_last(decision, released_unix_s=max(times, default=0.0))

    # -- watching -----------------------------------------------------------------------------------------------------

    def _note_progress(self, context: RunContext) -> None:
        decision = self.current
        assert decision is not None
        world = context.worlds.get(decision.world_id, {})
        sessions = [session.record for session in world.values()]
        mine = ("", decision.world_id)
        steps = [v.key.step for v in context.views if v.key.attempt == decision.attempt and v.world_id in mine]
        base = decision.base_step
        newest = max([base, *steps, *(s.last_step for s in sessions), *(s.skipped_step for s in sessions)])
        if newest > base:
            self.progress.note(newest, context.now_s)
            entry = self._last()
            if entry is not None and not entry.first_step:
                self._change_last(decision, first_step=newest, first_step_unix_s=self._unix(context.now_s))
        self.progress.blocked_s = max([self.progress.blocked_s, *(s.blocked_s for s in sessions)])
        stored = context.live_records[0].snapshot_id if context.live_records else ""
        if stored not in ("", self._stored_id):
            self._stored_id = stored
            self.count("persisted")

    def _note_losses(self, context: RunContext, ended: Mapping[str, set[int]]) -> None:
        decision = self.current
        assert decision is not None
        world = context.worlds.get(decision.world_id, {})
        over = ended.get(decision.world_id, ())
        missing = [p for p in decision.placements if p.rank not in world and p.rank not in over]
        for host in decision.hosts & context.nodes.keys():
            self.progress.heard_s[host] = context.nodes[host].seen_s
        for rank, session in world.items():
            self.progress.seen_by[rank] = context.nodes[session.node].identity.incarnation
        # A silent node says nothing of its trainers, nor does a daemon that has just restarted: they train on meanwhile.
        self.silent = tuple(place for place in missing if not self._is_dead(place, context))
        if not missing:
            if self.open is not None and self.open.cause != "world_restarted":
                self.open, self.is_interrupted = None, False  # only a daemon was away, not its trainers
            return
        was_certain, self.is_interrupted = self.is_interrupted, self.is_interrupted or len(self.silent) < len(missing)
        cause, detail = self._cause(context, world, [place.rank for place in missing])
        if self.open is None:
            gone = [self.progress.heard_s[p.node] for p in missing if p.node not in context.nodes]
            heard_s = min([*gone, context.now_s])
            self.open = self._interruption(cause, detail, heard_s=heard_s, noticed_s=context.now_s)
        elif not was_certain or GRAVITY.index(cause) > GRAVITY.index(self.open.cause):  # a guess yields to what is seen
            self.open = replace(self.open, cause=cause, detail=detail)
        self.open = replace(self.open, newest_step=max(self.open.newest_step, self.progress.newest_step))

    def _cause(self, context: RunContext, world: World, missing: list[int]) -> tuple[str, str]:
        """Why the world broke, as far as can be seen from here."""
        decision = self.current
        assert decision is not None
        hosts = decision.hosts
        gone = sorted((host for host in hosts if not self._remembers(context, host)), key=natural)
        if gone:
            cause = "all_nodes_lost" if len(gone) == len(hosts) and len(hosts) > 1 else "node_lost"
            return cause, f"{listed(gone[:8])}{' and more' if len(gone) > 8 else ''} lost their memory"
        base = decision.base
        is_spoilt = base is not None and SnapshotKey(base.attempt, base.step) in context.tainted
        if is_spoilt or any(key.attempt == decision.attempt for key in context.tainted):
            return "distrusted", context.trust.last_reason or "what was trained from it is distrusted"
        where = sorted({place.node for place in decision.placements if place.rank in missing}, key=natural)
        ranks = counted(missing[:8], "rank") + (" and more" if len(missing) > 8 else "")
        rest = "" if world else ", the whole world"
        return "trainer_died", f"{ranks} on {listed(where[:8])} died{rest}"

    def _remembers(self, context: RunContext, host: str) -> bool:
        """Whether the host is there and still has the decision that it recorded: else its memory is lost."""
        assert self.current is not None
        report = context.reports.get(host)
        return report is not None and report.decision is not None and report.decision.attempt >= self.current.attempt

    def _is_dead(self, place: Placement, context: RunContext) -> bool:
        """Whether the daemon that reported a rank is there and does not report it any more."""
        node = context.nodes.get(place.node)
        return node is not None and node.identity.incarnation == self.progress.seen_by.get(place.rank)

    def _is_replaced(self, recovery: Recovery) -> bool:
        """Whether another world waits to restore: the one before has ended."""
        assert self.current is not None
        return recovery.is_active and recovery.world_id != self.current.world_id

    # -- entries ------------------------------------------------------------------------------------------------------

    def _restarted(self, opened_s: float) -> Interruption:
        detail = "all ranks restarted before one was missed"
        return self._interruption("world_restarted", detail, heard_s=opened_s, noticed_s=opened_s)

    def _interruption(self, cause: str, detail: str, *, heard_s: float, noticed_s: float) -> Interruption:
        assert self.current is not None
        return Interruption(
            attempt=self.current.attempt,
            cause=cause,
            detail=detail,
            heard_unix_s=self._unix(heard_s),
            noticed_unix_s=self._unix(noticed_s),
            newest_step=self.progress.newest_step,
            step_s=self.step_s,
            blocked_s=self.progress.blocked_s,
        )

    @property
    def step_s(self) -> float:
        """Measured seconds per step, of the history before if this one is too young; 0: not known."""
        entry = self._last()
        return self.progress.step_s or (entry.step_s if entry is not None else 0.0)

    def _last(self) -> Interruption | None:
        return self.ledger.entries[-1] if self.ledger is not None and self.ledger.entries else None

    def _change_last(self, decision: Decision, **values: Any) -> None:
        """Fill in the newest entry, if it is that of ``decision``."""
        entry = self._last()
        if self.ledger is not None and entry is not None and entry.new_attempt == decision.attempt:
            entries = (*self.ledger.entries[:-1], replace(entry, **values))
            self.ledger = replace(self.ledger, entries=entries)

    def _unix(self, at_s: float) -> float:
        return at_s + self.unix_offset_s


def add_entry(ledger: Ledger, entry: Interruption) -> Ledger:
    """The ledger with one more entry; the oldest beyond :data:`MAX_ENTRIES` are summed up."""
    entries = (*ledger.entries, entry)
    while len(entries) > MAX_ENTRIES:
        oldest = _reckoned(entries[0], until_unix_s=entries[1].noticed_unix_s)
        entries = entries[1:]
        ledger = replace(
            ledger,
            earlier_count=ledger.earlier_count + 1,
            earlier_steps_lost=ledger.earlier_steps_lost + oldest["steps_lost"],
            earlier_down_s=ledger.earlier_down_s + oldest["down_s"],
            earlier_recompute_s=ledger.earlier_recompute_s + oldest["recompute_s"],
            earlier_blocked_s=ledger.earlier_blocked_s + oldest["blocked_s"],
        )
    return replace(ledger, entries=entries)


def summary(ledger: Ledger, entries: list[Interruption], *, now_unix_s: float, blocked_s: float) -> dict[str, Any]:
    """The ledger as plain numbers; ``blocked_s`` is that of the history being written."""
    ends = [*(entry.noticed_unix_s for entry in entries[1:]), now_unix_s][: len(entries)]
    rows = [_reckoned(entry, until_unix_s=end) for entry, end in zip(entries, ends, strict=True)]
    elapsed = max(0.0, now_unix_s - ledger.began_unix_s)
    down = ledger.earlier_down_s + sum(row["down_s"] for row in rows)
    recompute = ledger.earlier_recompute_s + sum(row["recompute_s"] for row in rows)
    closed = [row for row in rows if row["new_attempt"]]
    blocked = ledger.earlier_blocked_s + sum(row["blocked_s"] for row in closed) + blocked_s
    productive = min(elapsed, max(0.0, elapsed - down - recompute - blocked))
    return {
        "began_unix_s": ledger.began_unix_s,
        "is_whole": ledger.is_whole,
        "elapsed_s": elapsed,
        "productive_s": productive,
        "goodput": productive / elapsed if elapsed > 0 else None,
        "down_s": down,
        "recompute_s": recompute,
        "blocked_s": blocked,
        "steps_lost": ledger.earlier_steps_lost + sum(row["steps_lost"] for row in rows),
        "interruption_count": ledger.earlier_count + len(rows),
        "earlier_count": ledger.earlier_count,
        "interruptions": rows,
    }


def ledger_sentence(document: dict[str, Any]) -> str:
    """The ledger of a run, in one sentence."""
    share = document["goodput"]
    return (
        f"{amount(document['interruption_count'], 'interruption')}, {amount(document['steps_lost'], 'step')} lost, "
        f"{document['down_s'] + document['recompute_s'] + document['blocked_s']:.1f} of {document['elapsed_s']:.1f} s lost"
        + (f": goodput {share:.4f}" if share is not None else "")
    )


def _reckoned(entry: Interruption, *, until_unix_s: float) -> dict[str, Any]:
    """An entry with what it cost; where its release is not known, it lasted ``until_unix_s``."""
    is_over = entry.new_attempt > 0
    known_end = entry.released_unix_s or entry.first_step_unix_s
    down = max(0.0, (known_end or until_unix_s) - entry.heard_unix_s)
    lost = max(0, entry.newest_step - entry.base_step) if is_over else 0
    stored = max(0, entry.newest_step - entry.persisted_step) if is_over and entry.has_storage else None
    row: dict[str, Any] = json_records.to_json(entry)
    return row | {
        "is_over": is_over,
        "detect_s": max(0.0, entry.noticed_unix_s - entry.heard_unix_s),
        "restart_s": _between(entry.noticed_unix_s, entry.opened_unix_s),
        "decide_s": _between(entry.opened_unix_s, entry.decided_unix_s),
        "release_s": _between(entry.decided_unix_s, entry.released_unix_s),
        "down_s": down,
        "steps_lost": lost,
        "steps_lost_from_storage": stored,
        "recompute_s": lost * entry.step_s,
        "seconds_lost": down + lost * entry.step_s,
    }


def _between(begin_unix_s: float, end_unix_s: float) -> float | None:
    """Seconds between two moments; None if one of them is not known."""
    return max(0.0, end_unix_s - begin_unix_s) if begin_unix_s and end_unix_s else None


def farthest_source(decision: Decision) -> SourceKind | None:
    """The slowest source of a shard; None if it restores nothing."""
    kinds = {source.kind for source in decision.sources}
    return next((kind for kind in FARTHEST if kind in kinds), None)


def _source(decision: Decision) -> str:
    farthest = farthest_source(decision)
    return "none" if farthest is None else SOURCES.get(farthest, farthest.value)


def _id(decision: Decision | None) -> str:
    return decision.decision_id if decision is not None else ""
