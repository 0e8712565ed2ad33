"""One run: everything that the coordinator knows and wants of it, evaluated as a whole after each change. Pure.

:meth:`RunState.evaluate` takes each part one step further, in an order in which each builds on those before it: whose run it is
and what is forgotten of it, what lies where, whether it is over, what is new, what a world restores, what is encoded, rebuilt
and uploaded, what may be deleted then, and how well all of that protects what is trained.

Nothing here must survive: a new coordinator makes it again from reports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from backstay.ids import Generation, SnapshotKey
from backstayd.core.end_of_run import Forgetting, lift_if_wrong, made_unix_s, tombstone_of
from backstayd.core.evaluation import Evaluation, redundancy
from backstayd.core.inventory.catalog import InventoryCache, ShapeCache, SnapshotView
from backstayd.core.inventory.distrust import tainted_views
from backstayd.core.inventory.lineage import is_live, live_lineage, newest_decision
from backstayd.core.inventory.missing_ranks import Missing
from backstayd.core.inventory.nodes import NodeState
from backstayd.core.inventory.ownership import owner_of, strangers, without
from backstayd.core.inventory.run_context import RunContext, World, find_worlds, phases_of
from backstayd.core.inventory.survey import live_records, stored_views, with_urls
from backstayd.core.inventory.tombstones import Tombstones
from backstayd.core.messages.decisions import Decision, Outcome
from backstayd.core.messages.report import SessionPhase
from backstayd.core.messages.tombstone import Cause
from backstayd.core.policy import CorePolicy
from backstayd.core.protect.draining import Draining
from backstayd.core.protect.durable_uploads import Persisting
from backstayd.core.protect.interval import Interval
from backstayd.core.protect.lag import Lag, Training, behind_sentence
from backstayd.core.protect.protection import Protection
from backstayd.core.protect.retention import ABANDONED, abandoned_keys, has_returned, releasable
from backstayd.core.recover.choice import Memory, choose, near_sentence
from backstayd.core.recover.ledger import Accounts
from backstayd.core.recover.probation import Probation
from backstayd.core.recover.rebuilds import Rebuilds
from backstayd.core.recover.recovery import Recovery
from backstayd.core.sentences import any_nodes, counted, listed
from backstayd.core.timeline import LogEvent


@dataclass(slots=True)
class RunState:
    """The state of one run, and its parts."""

    run: str
    policy: CorePolicy
    shapes: ShapeCache
    tombstones: Tombstones
    raise_generation: Callable[[int], Generation]
    log: LogEvent
    others: Callable[[str], Mapping[str, str]]  # runs of that user, and what became of each
    allow_again: Callable[[str], None]  # log the next event of this kind even if it is the same as the last
    unix_offset_s: float = 0.0  # from the core's clock to Unix time, for the ledger
    protection: Protection = field(init=False)
    recovery: Recovery = field(init=False)
    probation: Probation = field(init=False)
    persisting: Persisting = field(init=False)
    rebuilds: Rebuilds = field(init=False)
    forgetting: Forgetting = field(init=False)
    draining: Draining = field(init=False)
    accounts: Accounts = field(init=False)
    interval: Interval = field(default_factory=Interval)
    missing: Missing = field(default_factory=Missing)
    lag: Lag = field(default_factory=Lag)
    memory: Memory = field(default_factory=Memory)
    head: Decision | None = None  # the decision that the history follows: never one of ours that was not released
    returned_id: str = ""  # of the newest decision with which a trainer was seen to have returned
    owner: str = ""  # the user whose run it is; "" until a node names one
    strangers: Mapping[str, str] = field(default_factory=dict)  # nodes where another user attached, and who
    evaluation: Evaluation | None = None
    context: RunContext | None = None
    cache: InventoryCache = field(default_factory=InventoryCache)
    sealed: tuple[str, int] = ("", 0)  # world, and the newest step that one of its ranks declared whole
    known_sessions: dict[int, str] = field(default_factory=dict)
    known_marks: set[tuple[str, str, int, int]] = field(default_factory=set)
    closed_ledger: dict[str, Any] | None = None  # of a run of this name that is over

    def __post_init__(self) -> None:
        self._set_out()

    def evaluate(
        self, nodes: Mapping[str, NodeState], *, generation: Generation, has_long_memory: bool, now_s: float
    ) -> None:
        """Bring everything in line with the reports of ``nodes``."""
        nodes = self._look_past(self._own(nodes))
        context = self.context = self._take_context(nodes, generation, has_long_memory, now_s)
        cause = self.forgetting.judge(context, self.recovery, self.persisting, self.memory)
        if cause is not None:
            self.bury(cause)
        if self.forgetting.is_under_way:
            return
        self._note_snapshots(context)
        self._note_corruption(context)
        self._note_losses(context)
        self._recover(context)
        target, wanted = self._protect(context)
        self.rebuilds.update(context, self.recovery, self.persisting, hosts=self.hosts(context))
        self._persist(context, target)
        self._rate(context, target=target, wanted=wanted, release=self._release(context, target))
        self._judge_lag(context)
        self._adjust_pace(context, target)

    def set_apart(self, why: str) -> None:
        """The evaluation failed half way: what the last one found is shown, as protecting nothing now."""
        if self.evaluation is not None:
            self.evaluation = replace(self.evaluation, redundancy="UNPROTECTED", spares=-1, reason=why)
        self.context = self.evaluation.context if self.evaluation is not None else None

    def check_invariants(self) -> None:
        """Raise AssertionError for a mistake of ours."""
        self.protection.check_invariants()
        self.recovery.check_invariants()
        self.persisting.check_invariants()
        self.draining.check_invariants()
        evaluation = self.evaluation
        if evaluation is None or self.forgetting.is_under_way:
            return
        kept = [view for view in evaluation.context.sound_views if view.key not in evaluation.release]
        best = max((view.spares for view in evaluation.context.sound_views), default=-1)
        if best >= 0:
            assert max((view.spares for view in kept), default=-1) >= min(best, evaluation.target), (
                "a protected snapshot was given up for a worse one"
            )

    def named_nodes(self, nodes: Mapping[str, NodeState]) -> set[str]:
        """Nodes that have a part in this run, by what ``nodes`` report."""
        named: set[str] = set()
        for node in nodes.values():
            report = node.runs.get(self.run)
            if report is not None:
                named.update(member.node for plan in report.plans for member in plan.members)
                if report.decision is not None:
                    named.update(place.node for place in report.decision.placements)
        return named

    def outranks_former(self, own: Generation) -> bool:
        """Whether what was decided here, or trains, is later than what nodes that were away bring back."""
        return self.context is not None and self.recovery.outranks_former(self.context, own)

    def fresh_context(self, nodes: Mapping[str, NodeState], *, generation: Generation, now_s: float) -> RunContext:
        """The run as the newest reports show it, before they are evaluated."""
        nodes = without(self.run, nodes, self.strangers)
        return self._take_context(nodes, generation, has_long_memory=False, now_s=now_s)

    def _own(self, nodes: Mapping[str, NodeState]) -> Mapping[str, NodeState]:
        """``nodes`` without what other users report under the run's name."""
        self.owner = owner_of(self.run, nodes, known=self.owner)
        before, self.strangers = self.strangers, strangers(self.run, nodes, self.owner)
        for node, user in self.strangers.items():
            if node not in before:
                self.log(
                    "refused", f"a trainer of user {user} on {node} is refused: the run belongs to user {self.owner}"
                )
        return without(self.run, nodes, self.strangers)

    def _take_context(
        self, nodes: Mapping[str, NodeState], generation: Generation, has_long_memory: bool, now_s: float
    ) -> RunContext:
        reports, inventory, views = self.cache.look(self.run, nodes, self.shapes)
        known = [decision for decision, _ in inventory.decisions.values()]
        followed = [decision for decision in known if not self.recovery.is_unreleased(decision, generation)]
        followed += [one for one in (self.head, self.recovery.released) if one is not None]
        self.head = newest_decision(followed)
        surveying = self.persisting.surveying
        surveying.take(self.run, nodes, now_s)
        lineage = live_lineage(self.head, views, known, surveying.known.values())
        live = frozenset(index for index, view in enumerate(views) if is_live(view, lineage))
        has_memory = any(views[index].is_restorable for index in live)
        storage = surveying.state(fence=self.recovery.fence, has_memory=has_memory, now_s=now_s)
        records = live_records(storage, lineage)
        views, stored = with_urls(views, storage), stored_views(views, records, storage, inventory)
        distrusted = self.probation.unite(self.run, nodes, surveying)
        return RunContext(
            run=self.run,
            now_s=now_s,
            lease_s=self.policy.lease_s,
            nodes=nodes,
            reports=reports,
            inventory=inventory,
            shapes=self.shapes,
            views=views,
            live=live,
            lineage=lineage,
            head=self.head,
            worlds=find_worlds(self.run, nodes),
            generation=generation,
            has_long_memory=has_long_memory,
            distrusted=distrusted,
            tainted=tainted_views([*views, *stored], lineage, distrusted),
            storage=storage,
            stored=stored,
            live_records=records,
            tombstone=self.tombstones.as_known_to(self.run, self.owner),
            trust=self.probation.trust,
            restore_loop_limit=self.policy.restore_loop_limit,
            owner=self.owner,
        )

    def adopt(self, policy: CorePolicy) -> None:
        """Use other settings from now on; parity, group size, lease and storage must be the same."""
        self.policy = self.protection.policy = self.persisting.policy = policy
        self.probation.steps, self.forgetting.job_ttl_s = policy.probation_steps, policy.job_ttl_s

    def outlook(self) -> str:
        """What a restart would restore now."""
        assert self.context is not None
        return choose(self.context, self.memory, is_fresh_allowed=False).message

    def forgotten_in_s(self) -> float | None:
        """Time until the run's memory is freed because no trainer came back; None while there is no such time."""
        return self.forgetting.due_in_s(self.context.now_s) if self.context is not None else None

    def bury(self, cause: Cause) -> None:
        """The run is over: every node deletes what it holds of it, and nothing of it is restored any more."""
        context = self.context
        assert context is not None
        tombstone = tombstone_of(
            context,
            cause,
            memory=self.memory,
            idle_s=self.forgetting.idle_s(context.now_s),
            absent=(self.named_nodes(context.nodes) | self.hosts(context)) - set(context.nodes),
        )
        unix_s = made_unix_s(context, now_unix_s=context.now_s + self.unix_offset_s)
        self.tombstones.bury(replace(tombstone, owner=self.owner, unix_s=unix_s))
        self.accounts.end(context.now_s)
        self.closed_ledger = self.accounts.document(context.now_s)
        self._set_out()
        self.forgetting.is_under_way = True
        self.interval, self.memory, self.lag, self.missing, self.known_sessions = (
            Interval(),
            Memory(),
            Lag(),
            Missing(),
            {},
        )
        self.head, self.evaluation, self.owner, self.cache = None, None, "", InventoryCache()

    def _look_past(self, nodes: Mapping[str, NodeState]) -> Mapping[str, NodeState]:
        """``nodes`` without what is forgotten of the run; a tombstone that names what lives is lifted."""
        why = lift_if_wrong(self.run, nodes, self.tombstones, self.shapes, self.head)
        if why:
            self.log("abandoned", why)
        seen, self.forgetting.is_under_way = self.tombstones.visible(self.run, nodes)
        return seen

    def _set_out(self) -> None:
        self.protection = Protection(self.policy)
        self.accounts = Accounts(unix_offset_s=self.unix_offset_s)
        self.recovery = Recovery(self.raise_generation, self.log, self._enter)
        self.probation = Probation(steps=self.policy.probation_steps)
        self.persisting = Persisting(self.run, self.policy, self.log)
        self.rebuilds = Rebuilds(self.policy.lease_s, self.log, self.allow_again)
        self.forgetting = Forgetting(self.policy.job_ttl_s, self.log)
        self.draining = Draining()

    def _enter(self, decision: Decision, context: RunContext) -> Decision:
        if decision.outcome is Outcome.NONE and not self.memory.is_known:
            decision = replace(decision, message=decision.message + near_sentence(self.run, self.others(self.owner)))
        return self.accounts.entered(decision, context, self.recovery)

    def became(self) -> str:
        """What there is of the run, in a few words."""
        newest = self.memory.newest_complete
        return f"step {newest.step}" if newest is not None else "no snapshot yet"

    def _note_snapshots(self, context: RunContext) -> None:
        """Remember what reports may not show any more: that the run exists, and who held what is complete."""
        if not context.inventory.is_empty:
            self.memory.is_known = True
        self.memory.note_head(context)
        for view in reversed(context.live_views):
            if view.is_complete:
                if view.snapshot_id not in self.memory.holders:
                    self.accounts.count("complete")
                    self.log("complete", f"step {view.key.step} of attempt {view.key.attempt} is complete")
                self.memory.note(view)

    def _note_corruption(self, context: RunContext) -> None:
        marks = {(holder, mark.what, mark.attempt, mark.step): mark.reason for holder, mark in context.quarantined()}
        for place, reason in marks.items():
            if place not in self.known_marks:
                self.log("quarantined", f"{place[1]} on {place[0]} is corrupt and quarantined: {reason}")
        self.known_marks = set(marks)

    def _note_losses(self, context: RunContext) -> None:
        """Ranks of the current world that no daemon reports any more, though they did not finish."""
        now = {rank: session.node for rank, session in self.world(context).items()}
        gone = sorted(rank for rank in self.known_sessions if rank not in now)
        if gone and self.recovery.world_id not in self.forgetting.ended:
            died = f"{counted(gone, 'rank')} on {listed(sorted({self.known_sessions[rank] for rank in gone}))} died"
            self.probation.trust.note_end(died)
            self.allow_again("session_lost")
            self.log("session_lost", died)
        self.known_sessions = now

    def _recover(self, context: RunContext) -> None:
        """Take the decision of the world that waits further, and look after the world that was released."""
        before = self.recovery.world_id
        self.accounts.watch(context, self.recovery, self.forgetting.ended)
        self.recovery.update(context, self.memory)
        self.accounts.follow(context, self.recovery)
        if self.recovery.world_id != before:
            self.interval.restart()
        self._look_for_missing(context)
        self._note_seals(context)
        if self.recovery.released is not None:
            self.probation.judge(self.recovery.released, self.world(context), context, self.log)

    def _note_seals(self, context: RunContext) -> None:
        """A step that a rank sealed stays sealed when that rank is gone: others may have heard of it."""
        world_id, step = self.sealed
        steps = [session.record.sealed_step for session in self.world(context).values()]
        self.sealed = (self.recovery.world_id, max([*steps, step if world_id == self.recovery.world_id else 0]))

    def held(self, context: RunContext) -> set[SnapshotKey]:
        """What is on probation."""
        return self.probation.held(self.recovery.released, self.world(context))

    def world(self, context: RunContext) -> World:
        """The sessions of the current world."""
        return context.worlds.get(self.recovery.world_id, {})

    def hosts(self, context: RunContext) -> set[str]:
        """Nodes the job is meant to run on."""
        decision = self.recovery.decision or self.head
        if decision is not None:
            return set(decision.hosts)
        return {node for view in context.live_views[:1] for nodes in view.holders.values() for node in nodes}

    def _host_count(self, context: RunContext) -> int:
        """On how many nodes the job counts as running. One that shrank to a single node stays protected by the others."""
        count = len(self.hosts(context))
        was_protected = any(view.is_restorable and view.spares > 0 for view in context.live_views)
        return 2 if count == 1 and was_protected and len(context.nodes) > 1 else count

    def _protect(self, context: RunContext) -> tuple[int, int]:
        """Encode what is not protected yet; returns the spares that can be reached now, and those that are wanted."""
        host_count = self._host_count(context)
        wanted = self.policy.wanted_parity(host_count)
        target = self.protection.target(host_count=host_count, present_count=len(context.nodes))
        self.draining.update(context, wanted=wanted, target=target, is_busy=self.recovery.is_active)
        if self.evaluation is None:  # a coordinator before this one may have called the leaving nodes safe
            self.draining.promise(context)
        views = self._views_to_protect(context)
        self.draining.place(context, views)
        notes = self.protection.update(
            context,
            views,
            target=0 if self.recovery.is_active else target,
            placements_of=self.recovery.placements_of,
            draining=self.draining,
        )
        for note in notes:
            self.log("abandoned", note)
        for view in context.live_views:
            is_good = view.is_restorable and target > 0 and view.spares >= target
            if is_good and view.snapshot_id not in self.memory.protected:
                self.memory.protected[view.snapshot_id] = None
                self.accounts.count("protected")
                self.log(
                    "protected", f"step {view.key.step} is protected: it tolerates the loss of {any_nodes(view.spares)}"
                )
        return target, wanted

    def _views_to_protect(self, context: RunContext) -> list[SnapshotView]:
        """Live snapshots worth encoding, newest first: none that is older than enough good ones."""
        views = [view for view in context.live_views if view.snapshot_id]
        if self.recovery.is_active:  # nothing new is begun while a world decides
            return [view for view in views if view.snapshot_id in self.protection.sets]
        good = [
            index
            for index, view in enumerate(views)
            if view.is_restorable and self.draining.is_enough(view) and view.key not in context.tainted
        ]
        if len(good) < self.policy.keep:
            return views
        held = self.held(context)
        last = [index for index, view in enumerate(views) if view.key in held]
        return views[: max([good[self.policy.keep - 1], *last]) + 1]

    def _persist(self, context: RunContext, target: int) -> None:
        self.persisting.update(
            context,
            self.world(context),
            target=target,
            fence=self.recovery.fence,
            is_busy=self.recovery.is_active,
            is_proving=bool(self.held(context)),
        )

    def _release(self, context: RunContext, target: int) -> dict[SnapshotKey, str]:
        """Snapshots to delete, and why.

        None while a world decides, as inventories must hold still, nor before each of its ranks has loaded.
        """
        world = self.world(context)
        if self.recovery.is_active or SessionPhase.RESTORING in phases_of(world):
            return {}
        abandoned = abandoned_keys(
            context.live_views,
            attempt=self.recovery.decision.attempt if self.recovery.decision is not None else 0,
            sessions={rank: session.record for rank, session in world.items()},
            present=context.nodes.keys(),
        )
        chosen = releasable(
            context.views,
            live=context.live,
            dead=self._dead(context),
            keep=self.policy.keep,
            target=target,
            abandoned=abandoned,
            tainted=context.tainted,
            held=self.held(context) | self.persisting.pinned,
            left=self.draining.spares_left if self.draining.is_holding or not self.draining.homeless else None,
        )
        kept = {view.key for index, view in enumerate(context.views) if index not in chosen}
        release = {context.views[i].key: reason for i, reason in chosen.items() if context.views[i].key not in kept}
        previous = self.evaluation.release if self.evaluation is not None else {}
        for key in (key for key in release if key not in previous):
            what = f"step {key.step} of attempt {key.attempt} is released: {release[key]}"
            self.log("released_snapshot", what, cause=ABANDONED if key in abandoned else "")
        return release

    def _dead(self, context: RunContext) -> set[int]:
        """Indexes of snapshots that a decision left behind and with which a trainer has returned: they may be deleted.

        None while the nodes that recorded the newest decision are all away.
        """
        head = context.head
        if head is None or context.lineage != head.lineage:
            return set()
        if head.decision_id != self.returned_id and not has_returned(context, head):
            return set()
        self.returned_id = head.decision_id
        return set(range(len(context.views))) - context.live

    def _rate(self, context: RunContext, *, target: int, wanted: int, release: Mapping[SnapshotKey, str]) -> None:
        live = [view for view in context.sound_views if view.is_restorable]
        spares = max((view.spares for view in live), default=-1)
        protected = next((view for view in live if view.spares >= target), None)
        word, reason = redundancy(context, self.memory, self.rebuilds.under_way, spares=spares, wanted=wanted)
        kept = [view for view in live if view.key not in release]
        broken = [view for view in context.sound_views if view.snapshot_id and not view.is_available]
        drain_lacks = "a world restores" if self.recovery.is_active else self.draining.missing(kept, broken)
        if not drain_lacks:
            self.draining.promise(context)
        self.evaluation = Evaluation(
            context=context,
            target=target,
            wanted=wanted,
            release=release,
            redundancy=word,
            spares=spares,
            reason=reason,
            complete_step=next((view.key.step for view in live), 0),
            protected_step=protected.key.step if protected is not None else 0,
            drain_lacks=drain_lacks,
        )

    def _look_for_missing(self, context: RunContext) -> None:
        """See which ranks keep the others waiting."""
        released, before = self.recovery.released, self.missing.found
        self.missing.look(
            context.worlds,
            training=released.world_id if released is not None else "",
            size=released.world_size if released is not None else 0,
            base_step=released.base_step if released is not None else 0,
            lease_s=self.policy.lease_s,
            now_s=context.now_s,
        )
        found = self.missing.found
        if found is not None and found != before:
            self.allow_again("ranks_missing")
            self.log("ranks_missing", found.sentence)

    def _judge_lag(self, context: RunContext) -> None:
        """See how far training is ahead of what is protected."""
        decision, accounts, world = self.accounts.current, self.accounts, self.world(context)
        is_training = phases_of(world) - {SessionPhase.ENDED} or accounts.silent
        if self.recovery.is_active or decision is None or accounts.is_interrupted or not is_training:
            self.lag.stop()
            return
        assert self.evaluation is not None
        stored = context.live_records[0].step if context.live_records else 0
        skips = [session.record for session in world.values() if session.record.skip_reason]
        newest = max(skips, key=lambda record: record.skipped_step, default=None)
        training = Training(
            trained_step=accounts.progress.newest_step,
            protected_step=max(self.evaluation.protected_step, stored, decision.base_step),
            restorable_step=self.evaluation.complete_step,
            interval_steps=self.interval.schedule.interval_steps,
            step_s=accounts.step_s,
            silent_ranks=[place.rank for place in accounts.silent],
            silent_nodes={place.node for place in accounts.silent},
            is_heard=bool(world),
            skip_reason=newest.skip_reason if newest is not None else "",
            missing=self.missing.sentence,
        )
        was_behind = self.lag.behind is not None
        self.lag.update(training, lease_s=self.policy.lease_s, now_s=context.now_s)
        if self.lag.behind is not None and not was_behind:
            self.allow_again("behind")
            self.log("behind", behind_sentence(self.lag.behind))
        elif was_behind and self.lag.behind is None:
            self.allow_again("caught_up")
            self.log("caught_up", f"step {training.protected_step} is protected: within the usual interval again")

    def _adjust_pace(self, context: RunContext, target: int) -> None:
        released = self.recovery.released
        sessions = [session.record for session in self.world(context).values()]
        if released is None or len(sessions) < released.world_size:
            return  # a broken world skips because it is broken
        is_protected = any(
            v.key.attempt == released.attempt and v.spares >= target for v in context.live_views if v.is_restorable
        )
        note = self.interval.update(
            sessions, is_protected=is_protected, lease_s=self.policy.lease_s, now_s=context.now_s
        )
        if note:
            self.log("interval_raised", note)
