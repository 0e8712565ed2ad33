"""The coordinator's core: reports in, desired state out. Pure: time is an argument.

Nothing is kept on disk: a new coordinator rebuilds everything from reports. So it *settles* first and decides nothing before
each node named in a report has reported itself, or a lease has passed. Deciding earlier, it would call lost what is only late.

Invariant: its generation is above every one it has seen, or it is not settled and wants nothing. Nodes obey the highest
generation they have seen; two coordinators that both believe to lead are told apart by it, and the one below steps down.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from backstay.errors import SnapshotNotFoundError, UnavailableError, UsageError
from backstay.ids import Generation
from backstayd.bounded import drop_oldest
from backstayd.core.drain_orders import DrainState, DrainVerdict, order_drain, verdict_of
from backstayd.core.inventory.catalog import ShapeCache, build_views, take_inventory
from backstayd.core.inventory.nodes import NodeState, NodeTable
from backstayd.core.inventory.tombstones import Tombstones
from backstayd.core.messages.decisions import Base
from backstayd.core.messages.desired import NodeDesired, Peer
from backstayd.core.messages.report import NodeReport, SessionPhase
from backstayd.core.messages.tombstone import Cause, Tombstone
from backstayd.core.orders import Orders, desired_of, make_orders
from backstayd.core.policy import CorePolicy
from backstayd.core.recover.ledger import ledger_sentence
from backstayd.core.recover.locate import Located, locate
from backstayd.core.recover.numbering import TERM_GENERATIONS
from backstayd.core.recover.recovery import Stage
from backstayd.core.report_checks import Seals, admitted, check_node
from backstayd.core.run_state import RunState
from backstayd.core.sentences import listed
from backstayd.core.timeline import Event, Timeline

FORGET_LOST_NODES_LEASES = 1200  # an hour at the default lease, in which `backstay status` still shows them as lost
MAX_RESETTLE_LEASES = 16  # after stepping down; doubled each time, so that two coordinators do not take turns for ever
KEPT_LEDGERS = 16  # of runs that are over, for `backstay report`
REFUSED_AGAIN_S = 60.0  # a rogue node may report something else each time, and events are bounded


class Coordinator:
    """Drive with :meth:`observe` and :meth:`tick` and then :meth:`evaluate`; read :meth:`desired`.

    Args:
        term: Of an election; 0 without one. Its generations, from TERM_GENERATIONS times the term on, are above those of all
            older terms, also of those that no node reports.
        settle_leases: For how many leases to wait for nodes that are named and silent. After an election they have to find
            this coordinator first.
        unix_offset_s: From the core's clock to Unix time, for what outlives this coordinator.
    """

    def __init__(
        self,
        policy: CorePolicy,
        incarnation: str,
        *,
        now_s: float,
        term: int = 0,
        settle_leases: float = 1.0,
        unix_offset_s: float = 0.0,
    ) -> None:
        self.policy = policy
        self.unix_offset_s = unix_offset_s
        self.incarnation = incarnation
        self.generation = Generation(0, incarnation)
        self.is_settled = False
        self.nodes = NodeTable(policy.lease_s, incarnation)
        self.runs: dict[str, RunState] = {}
        self.timeline = Timeline()
        self.tombstones = Tombstones()
        self.finished: dict[str, dict[str, Any]] = {}  # ledgers of runs that are over, newest last
        self.drains: dict[str, DrainVerdict] = {}  # of the nodes that drain
        self.faults: dict[str, Exception] = {}  # by run whose last evaluation failed: our mistake, or a rogue report
        self._admitted: dict[
            str, tuple[NodeReport, NodeReport]
        ] = {}  # by node: its last report, and what is used of it
        self._refused_s: dict[str, float] = {}  # by node: when part of its report was refused last
        self._seals = Seals()
        self._shapes = ShapeCache()
        self._started_s = now_s
        self._now_s = now_s
        self._floor = term * TERM_GENERATIONS
        self._patience_s = settle_leases * policy.lease_s
        self._settle_leases = 1.0
        self.has_observed = True  # something new since the last evaluation
        self._is_dirty = True  # the same, or time has passed
        self.has_changed = False  # the last evaluation changed what nodes should do
        self._wanted_before: tuple[object, ...] = ()
        self._orders: dict[str, Orders] = {}  # by run; the same ones again while nothing of them changes
        self._desired_of: dict[str, NodeDesired] = {}  # while nothing changes
        self._peers_of: dict[tuple[str, ...], tuple[Peer, ...]] = {}

    def suspect(self, node: str, incarnation: str) -> None:
        """The connection to ``node`` broke; its lease runs on."""
        if self.nodes.suspect(node, incarnation):
            self._is_dirty = self.has_observed = True

    def adopt(self, policy: CorePolicy) -> None:
        """Use other settings from now on; parity, group size, lease and storage must be the same."""
        self.policy = policy
        for state in self.runs.values():
            state.adopt(policy)

    def observe(self, report: NodeReport, now_s: float) -> None:
        """Take in a report; nothing is decided before :meth:`evaluate`.

        Raises:
            IntegrityError: no node can report that. A run in it that cannot be calculated with is left out.
        """
        self._now_s = max(self._now_s, now_s)
        change = self.nodes.observe(self._admit(report), self._now_s)
        if change is None:
            return
        self._is_dirty = self.has_observed = True
        self.tombstones.take(report)
        name = report.node.name
        if change:
            words = {"joined": "joined", "restarted": "restarted", "returned": "reconnected without having restarted"}
            self.timeline.allow_again("", "node_joined")
            self._log_event("", "node_joined", f"{name} ({report.node.bulk_address}) {words[change]}")
        for run in report.runs:
            if run.run not in self.runs:
                self.runs[run.run] = self._new_run(run.run)

    def _admit(self, report: NodeReport) -> NodeReport:
        """The report as far as it can be calculated with; the same record again costs nothing."""
        known = self._admitted.get(report.node.name)
        if known is not None and known[0] is report:
            return known[1]
        check_node(report)
        before = self.nodes.nodes.get(report.node.name)
        found, problems = admitted(report, before.runs if before is not None else {}, self._seals)
        self._admitted[report.node.name] = (report, found)
        if problems:
            self._log_refused(report.node.name, problems)
        return found

    def _log_refused(self, node: str, problems: Mapping[str, str]) -> None:
        """Log what was refused, at most once a minute for each node."""
        if self._now_s - self._refused_s.get(node, -REFUSED_AGAIN_S) < REFUSED_AGAIN_S:
            return
        self._refused_s[node] = self._now_s
        run, problem = next(iter(problems.items()))
        more = f" (and {len(problems) - 1} more runs)" if len(problems) > 1 else ""
        self._log_event("", "report_refused", f"ignoring what {node} reports of run {run}{more}: {problem}")

    def tick(self, now_s: float, *, away_s: float = 0.0) -> None:
        """Let time pass: leases run out.

        Args:
            away_s: How much of it this process was frozen or busy: reports of that time are yet to be read.
        """
        self._now_s = max(self._now_s, now_s)
        if away_s > 0.0:
            self.nodes.excuse(away_s, self._now_s)
            self._started_s = min(self._now_s, self._started_s + away_s)
        for name in self.nodes.tick(self._now_s):
            self.has_observed = True
            self.timeline.allow_again("", "node_lost")
            self._log_event(
                "", "node_lost", f"{name} did not report for {self.policy.lease_s:g} s: its shards are considered lost"
            )
        self.nodes.forget_lost(self._now_s, FORGET_LOST_NODES_LEASES * self.policy.lease_s)
        self._admitted = {name: known for name, known in self._admitted.items() if name in self.nodes.nodes}
        self._refused_s = {name: at_s for name, at_s in self._refused_s.items() if name in self.nodes.nodes}
        self._is_dirty = True

    def evaluate(self) -> bool:
        """Bring desired state in line with what was observed. False if nothing was observed since the last call."""
        if not self._is_dirty:
            return False
        self._is_dirty = self.has_observed = False
        self._decide()
        before, now = self._wanted_before, self._wanted()  # orders come between evaluations, too
        self._wanted_before = now
        self.has_changed = len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True))
        if self.has_changed:
            self._peers_of.clear()
            self._desired_of.clear()
        return True

    def _wanted(self) -> tuple[object, ...]:
        """What :meth:`desired` is made from: the same objects while nothing changes for any node."""
        orders = (self._orders.get(run) or object() for run in self.runs)
        drains = (node.drain_order for node in self.nodes.nodes.values())
        return self.is_settled, self.generation, self.tombstones.orders, *self.runs, *orders, *drains

    def _decide(self) -> None:
        self._settle()
        if not self.is_settled:
            return
        present = {node.name: node for node in self.nodes.present()}
        unsure = set()
        for name in list(self.runs):
            try:
                if not self._evaluate_run(name, present):
                    unsure.add(name)
                self.faults.pop(name, None)
            except Exception as error:  # noqa: BLE001 - the boundary of one run: the others are evaluated
                unsure.add(name)
                self._set_apart(name, error, present)
        self.tombstones.arrange(present, unsure, now_unix_s=self._now_s + self.unix_offset_s)
        self._judge_drains()

    def _evaluate_run(self, name: str, present: Mapping[str, NodeState]) -> bool:
        """Bring one run in line; False if too little is known of it."""
        is_sure = self._has_long_memory() or self.runs[name].named_nodes(present) <= set(self.nodes.nodes)
        if not is_sure:
            return False  # a node that knows more of this run may be about to report
        state, before = self.runs[name], self._orders.pop(name, None)
        state.evaluate(present, generation=self.generation, has_long_memory=self._has_long_memory(), now_s=self._now_s)
        if state.evaluation is not None and not state.forgetting.is_under_way:
            orders = make_orders(state, state.evaluation)
            self._orders[name] = before if before == orders else orders
        self._keep_ledger(state)
        if self._is_over(name, present):
            del self.runs[name]
            self.timeline.forget(name)
        return True

    def _set_apart(self, name: str, error: Exception, present: Mapping[str, NodeState]) -> None:
        """The run could not be evaluated: its nodes get no orders and keep what they hold until it can be."""
        self.faults[name] = error
        nodes = [node for node in present.values() if name in node.runs]
        guilty = [node.name for node in nodes if not _can_be_read(name, node)] or [node.name for node in nodes]
        why = f"it cannot be evaluated ({error!r:.200}); reported by {listed(guilty[:8])}"
        self.runs[name].set_apart(why)
        self._log_event(name, "evaluation_failed", f"{why}; nothing of it is deleted or protected until it can be")

    def desired(self, node: str) -> NodeDesired:
        """Everything ``node`` should do now; before settling nothing, under a generation that no node obeys."""
        if not self.is_settled:
            return NodeDesired(generation=Generation(0, self.incarnation))
        found = self._desired_of.get(node)
        if found is None:
            found = self._desired_of[node] = self._make_desired(node)
        return found

    def _make_desired(self, node: str) -> NodeDesired:
        states = ((name, state) for name, state in self.runs.items() if name not in self.faults)
        found = {name: desired_of(state, self._orders.get(name), node) for name, state in states}
        wanted = {name: desired for name, desired in found.items() if desired is not None}
        return NodeDesired(
            generation=self.generation,
            runs=tuple(wanted[name] for name in sorted(wanted)),
            peers=self._peers(tuple(wanted)),
            has_storage=self.policy.persist_url != "",
            drain=self.nodes.nodes[node].drain_order if node in self.nodes.nodes else None,
            tombstones=self.tombstones.orders.keep.get(node, ()),
            lifted=self.tombstones.orders.lift.get(node, ()),
        )

    def forget(self, run: str) -> None:
        """Delete everything of ``run`` on every node.

        Raises:
            SnapshotNotFoundError: no node knows it. UsageError: its trainers are connected.
        """
        state, tombstone = self.runs.get(run), self.tombstones.get(run)
        if state is None or state.context is None or (state.context.inventory.is_empty and not state.context.worlds):
            if tombstone is None or tombstone.cause is Cause.UNUSED:
                raise SnapshotNotFoundError("no node knows that run", reason="unknown_run")
            self._free_name(tombstone)
            return
        alive = [
            f"rank {rank} on {session.node}"
            for world in state.context.worlds.values()
            for rank, session in world.items()
            if session.record.phase is not SessionPhase.ENDED
        ]
        if alive:
            raise UsageError(
                f"trainers of it are connected ({listed(alive[:3])}{', ...' if len(alive) > 3 else ''}); stop the job first",
                reason="run_is_active",
            )
        self._log_event(run, "freed", "an operator forgets the run on every node")
        state.bury(Cause.FORGOTTEN)
        self._orders.pop(run, None)
        self._is_dirty = True

    def _free_name(self, tombstone: Tombstone) -> None:
        """Let the name of a run of which nothing is left be used again as if it were new."""
        self._log_event(tombstone.run, "freed", f"it {tombstone.sentence()}; an operator frees its name")
        again = replace(
            tombstone,
            cause=Cause.FORGOTTEN,
            generation=max(tombstone.generation, self.generation.number),
            unix_s=self._now_s + self.unix_offset_s,
        )
        self.tombstones.bury(again)
        self._is_dirty = True

    def distrust(self, run: str, step: int, reason: str) -> str:
        """Never restore ``step`` of ``run`` again, nor what was trained from it. Returns what a restart would restore now.

        Raises:
            SnapshotNotFoundError: no such run, or no whole snapshot of that step is known.
        """
        state = self._known(run)
        context = state.context
        assert context is not None
        whole = [view for view in context.candidates if view.snapshot_id]  # in memory or on durable storage
        view = next((view for view in whole if view.key.step == step), None)
        if view is None:
            steps = sorted({view.key.step for view in whole})
            known = f"steps {listed(steps)}" if steps else "none at all"
            raise SnapshotNotFoundError(
                f"{run} has no snapshot of step {step}; there are {known}", reason="unknown_step"
            )
        base = Base(attempt=view.key.attempt, step=step, snapshot_id=view.snapshot_id)
        state.probation.distrust(base, reason or "by an operator")
        self._log_event(run, "distrusted", f"step {step} of attempt {view.key.attempt} is not restored again: {reason}")
        self._is_dirty = True
        self.evaluate()
        return state.outlook()

    def drain(self, node: str, *, undo: bool) -> DrainVerdict:
        """Drain ``node``, or do so no longer: what only it holds is copied elsewhere.

        Raises:
            UsageError: no such node, or it is lost, or cordoned. UnavailableError: not settled.
        """
        if not self.is_settled:
            raise UnavailableError(
                "the coordinator has just started and is collecting reports; try again", reason="settling"
            )
        order_drain(self.nodes, node, undo=undo)
        self._is_dirty = True
        self.evaluate()
        if undo and self.nodes.nodes[node].drain_order is not None:  # it has not reported yet that it obeys
            return DrainVerdict(state=DrainState.DRAINING, reason="it has not confirmed the order yet")
        return self.drains.get(node, DrainVerdict())

    def _judge_drains(self) -> None:
        """See how far draining nodes are, and log what changed."""
        before, self.drains = self.drains, {}
        for name, node in self.nodes.nodes.items():
            verdict = verdict_of(node, self.runs, is_settled=self.is_settled)
            if verdict.state is not DrainState.NONE:
                self.drains[name] = verdict
            if verdict.state is not before.get(name, DrainVerdict()).state:
                words = {DrainState.NONE: "no longer drains", DrainState.DRAINING: "drains"}
                said = words.get(verdict.state, "is drained")
                self.timeline.allow_again("", "node_drain")
                self._log_event("", "node_drain", f"{name} {said}{': ' if verdict.reason else ''}{verdict.reason}")

    def locate(self, run: str, step: int) -> Located:
        """Where the shards of a complete snapshot are; ``step`` 0 is the newest.

        Raises:
            SnapshotNotFoundError: there is none. UnavailableError: not settled.
        """
        if not self.is_settled:
            raise UnavailableError(
                "the coordinator has just started and is collecting reports; try again", reason="settling"
            )
        state = self._named(run)
        if state is None or state.context is None or state.forgetting.is_under_way:
            raise SnapshotNotFoundError(f"no node knows run {run}", reason="unknown_run")
        return locate(state.context, step)

    def trust(self, run: str) -> int:
        """Trust every snapshot of ``run`` again and count its restores anew; returns how many were distrusted.

        Raises:
            SnapshotNotFoundError: no such run.
        """
        state = self._known(run)
        count = len(state.probation.distrusted)
        state.probation.trust.clear(state.probation.distrusted, survey_id=state.persisting.surveying.survey_id)
        self._log_event(run, "trusted", f"an operator trusts {count} snapshots again; restores are counted anew")
        self._is_dirty = True
        return count

    def _named(self, name: str) -> RunState | None:
        """The run called ``name``: job/run_id, or a run_id that only one job has."""
        found = [run for run in self.runs if run.partition("/")[2] == name] if "/" not in name else [name]
        if len(found) > 1:
            raise UsageError(f"{name} is a run of several jobs; name one of them: {', '.join(sorted(found))}")
        return self.runs.get(found[0]) if found else None

    def _known(self, run: str) -> RunState:
        state = self.runs.get(run)
        if state is None or state.context is None:
            known = listed(sorted(self.runs)) or "none at all"
            raise SnapshotNotFoundError(f"no node knows a run {run}; known: {known}", reason="unknown_run")
        return state

    def partly_recorded(self) -> dict[str, str]:
        """By run, the id of a decision that some hosts have recorded and others not."""
        found = {}
        recording = {name: state for name, state in self.runs.items() if state.recovery.stage is Stage.RECORD}
        present = {node.name: node for node in self.nodes.present()} if recording else {}
        for name, state in recording.items():
            decision = state.recovery.decision
            if decision is None:
                continue
            context = state.fresh_context(present, generation=self.generation, now_s=self._now_s)
            if state.recovery.is_recorded_on_some(context):
                found[name] = decision.decision_id
        return found

    def take_events(self) -> list[Event]:
        """What happened since the last call, for the log."""
        return self.timeline.take_fresh()

    def check_invariants(self) -> None:
        """Raise AssertionError for a mistake of ours."""
        for run, fault in self.faults.items():
            raise AssertionError(f"run {run} could not be evaluated") from fault
        for state in self.runs.values():
            state.check_invariants()
        if self.is_settled:
            own = [n.generation.number for n in self.nodes.present() if n.generation.incarnation == self.incarnation]
            assert self.generation.number >= max(own, default=0), "no node can know a generation not made yet"

    def _log_event(self, run: str, kind: str, message: str, *, cause: str = "") -> None:
        self.timeline.add(self._now_s, run, kind, message, cause=cause)

    def _new_run(self, run: str) -> RunState:
        return RunState(
            run=run,
            policy=self.policy,
            shapes=self._shapes,
            tombstones=self.tombstones,
            raise_generation=self._raise_generation,
            log=functools.partial(self._log_event, run),
            others=self._runs_of,
            allow_again=functools.partial(self.timeline.allow_again, run),
            unix_offset_s=self.unix_offset_s,
        )

    def _runs_of(self, owner: str) -> dict[str, str]:
        """Runs of a user, and what became of each."""
        over = {name: one.sentence() for name, one in self.tombstones.known.items() if one.owner == owner}
        used = [state for state in self.runs.values() if state.owner == owner and state.memory.is_known]
        return over | {state.run: state.became() for state in used}

    def _raise_generation(self, above: int) -> Generation:
        self.generation = Generation(max(self.generation.number, above) + 1, self.incarnation)
        return self.generation

    def _has_long_memory(self) -> bool:
        return self._now_s - self._started_s >= self._patience_s

    def _settle(self) -> None:
        highest = max((node.generation.number for node in self.nodes.nodes.values()), default=0)
        if self.is_settled:
            self._face_others()
            return
        named = self._named_nodes()
        have_reported = bool(named) and named <= set(self.nodes.nodes)
        waited_s = self._now_s - self._started_s
        if waited_s >= self._settle_leases * self._patience_s or (have_reported and self._settle_leases == 1.0):
            self.is_settled = True
            self.generation = Generation(max(highest, self.generation.number, self._floor) + 1, self.incarnation)
            missing = sorted(named - set(self.nodes.nodes))
            rest = f"; without {', '.join(missing)}, named by others but silent" if missing else ""
            self._log_event("", "settled", f"{len(self.nodes.nodes)} nodes have reported{rest}; deciding from now on")

    def _face_others(self) -> None:
        """Some nodes report a generation of another coordinator that is not below this one's.

        Either that coordinator acts now: a node that obeyed this one obeys it. Then this one steps down. Or it acted before,
        and nodes that were away bring its generation back. Then it ends nothing that was decided meanwhile: this one raises
        its generation above.
        """
        mine, ahead = self.incarnation, self.generation.number
        foreign = [n for n in self.nodes.present() if n.generation.incarnation != mine and n.generation.number >= ahead]
        if not foreign:
            return
        highest = max(node.generation.number for node in foreign)
        is_acting = any(node.has_obeyed for node in foreign)
        later = [state for state in self.runs.values() if state.outranks_former(self.generation)]
        if self._has_long_memory() and (is_acting or not later):
            self._step_down(highest)
            return
        self.generation = Generation(highest + 1, mine)
        names = listed(sorted(node.name for node in foreign))
        self._log_event(
            "",
            "settled",
            f"{names} came back with generation {highest} of a former coordinator: raising this one above it",
        )
        for state in later:
            state.recovery.raise_above(self.generation)

    def _step_down(self, number: int) -> None:
        """Another coordinator acts: want nothing for a time that grows with each, then settle above it."""
        self.is_settled = False
        self.generation = Generation(0, self.incarnation)
        self._started_s = self._now_s
        self._settle_leases = min(MAX_RESETTLE_LEASES, self._settle_leases * 2)
        for name in self.runs:
            self.runs[name] = self._new_run(name)
        self._orders.clear()
        self._log_event("", "settled", f"another coordinator has raised the generation to {number}: stepping down")

    def _named_nodes(self) -> set[str]:
        """Nodes that reports say have a part in some run."""
        present = {node.name: node for node in self.nodes.present()}
        return {name for state in self.runs.values() for name in state.named_nodes(present)}

    def _peers(self, runs: tuple[str, ...]) -> tuple[Peer, ...]:
        """Present nodes of these runs; worked out once for all nodes that have a part in the same."""
        found = self._peers_of.get(runs)
        if found is None:
            peers: dict[str, Peer] = {}
            for run in runs:
                peers |= self._orders[run].peers if run in self._orders else {}
            found = self._peers_of[runs] = tuple(peers[name] for name in sorted(peers))
        return found

    def _keep_ledger(self, state: RunState) -> None:
        """Keep the ledger of a run that is over for a while, and log its sum."""
        ledger, state.closed_ledger = state.closed_ledger, None
        if ledger is None:
            return
        self.finished.pop(state.run, None)
        self.finished[state.run] = ledger
        drop_oldest(self.finished, KEPT_LEDGERS)
        self._log_event(state.run, "ledger", ledger_sentence(ledger))

    def _is_over(self, run: str, present: Mapping[str, NodeState]) -> bool:
        """Whether no present node reports the run and nothing is remembered that a later world must know."""
        state = self.runs[run]
        is_mentioned = any(run in node.runs for node in present.values())
        return not is_mentioned and not state.memory.is_known and not state.recovery.is_active


def _can_be_read(run: str, node: NodeState) -> bool:
    """Whether what this node reports of the run can be calculated with."""
    try:
        build_views(take_inventory(run, [node]), ShapeCache())
    except Exception:  # noqa: BLE001 - whatever is raised: this node's report is the cause
        return False
    return True
