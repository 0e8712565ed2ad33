"""The status document: what the coordinator knows, as plain JSON values. Pure."""

from __future__ import annotations

import enum
from collections import Counter
from typing import Any

from backstay.format import json_records
from backstayd.core.coordinator import Coordinator
from backstayd.core.drain_orders import DrainVerdict
from backstayd.core.inventory.catalog import MAX_LISTED_RANKS, PlanState, SnapshotView
from backstayd.core.inventory.nodes import NodeState
from backstayd.core.inventory.run_context import RunContext, World
from backstayd.core.messages.decisions import Decision, ShardSource
from backstayd.core.messages.plans import Plan
from backstayd.core.recover.choice import choose, missing_sentence, sources_of
from backstayd.core.run_state import RunState
from backstayd.core.status.verdict import activity_of, verdict_of

FORMAT = 1


def status_document(coordinator: Coordinator, now_s: float, *, is_brief: bool = False) -> dict[str, Any]:
    """Everything an operator may want to know; docs/status.md has the fields.

    Args:
        is_brief: Leave out what there is for each rank: sessions, shards, sources, placements.
    """
    unix_offset_s = coordinator.unix_offset_s
    return {
        "format": FORMAT,
        "role": "coordinator",
        "generation": {"number": coordinator.generation.number, "incarnation": coordinator.incarnation},
        "time_unix_s": now_s + unix_offset_s,
        "is_settled": coordinator.is_settled,
        "is_brief": is_brief,
        "lease_s": coordinator.policy.lease_s,
        "nodes": [
            _node(node, coordinator.drains.get(node.name, DrainVerdict()))
            for node in sorted(coordinator.nodes.nodes.values(), key=lambda n: n.name)
        ],
        "runs": [_run(coordinator.runs[name], now_s, is_brief=is_brief) for name in sorted(coordinator.runs)],
        "finished": [{"run": run, "ledger": ledger} for run, ledger in coordinator.finished.items()],
        "timeline": [
            {"time_unix_s": event.at_s + unix_offset_s, "run": event.run, "kind": event.kind, "message": event.message}
            for event in coordinator.timeline.all()
        ],
    }


def _node(node: NodeState, drain: DrainVerdict) -> dict[str, Any]:
    return {
        "name": node.name,
        "incarnation": node.identity.incarnation,
        "bulk_address": node.identity.bulk_address,
        "domain": node.identity.domain,
        "version": node.identity.version,
        "state": node.liveness.value,
        "used_bytes": node.report.used_bytes,
        "capacity_bytes": node.report.capacity_bytes,
        "corrupt_count": node.report.corrupt_count,
        "draining": drain.state.value,
        "drain_reason": drain.reason,
    }


def _run(state: RunState, now_s: float, *, is_brief: bool) -> dict[str, Any]:
    document = _outline(state, now_s, is_brief=is_brief)
    context, evaluation = state.context, state.evaluation
    if context is None or evaluation is None or state.forgetting.is_under_way:
        return document
    world = context.worlds.get(state.recovery.world_id) or next(iter(context.worlds.values()), {})
    sizes = [session.record.world_size for session in world.values()] or [view.world_size for view in context.views]
    document.update(
        world_size=sizes[0] if sizes else 0,
        trainer_count=len(world),
        last_step=max((session.record.last_step for session in world.values()), default=0),
        redundancy=evaluation.redundancy,
        spares=evaluation.spares,
        wanted_spares=evaluation.wanted,
        reason=evaluation.reason,
        complete_step=evaluation.complete_step,
        protected_step=evaluation.protected_step,
        sessions=[] if is_brief else _sessions(world),
        snapshots=[_snapshot(state, context, index, is_brief=is_brief) for index in range(len(context.views))],
        groups=_groups(state, context),
        gate=state.probation.gate.verdict.state.value if state.probation.gate.verdict is not None else "",
        quarantined=_quarantined(context),
        explain=_explain(state, context, is_brief=is_brief),
    )
    return document


def _outline(state: RunState, now_s: float, *, is_brief: bool) -> dict[str, Any]:
    """All fields of a run, as they are before it is evaluated."""
    verdict = verdict_of(state)
    return {
        "run": state.run,
        "verdict": {"word": verdict.word.value, "survives": verdict.survives, "reason": verdict.reason},
        "activity": activity_of(state),
        "world_id": state.recovery.world_id,
        "world_size": 0,
        "trainer_count": 0,
        "last_step": 0,
        "attempt": state.head.attempt if state.head is not None else 0,
        "redundancy": verdict.word.value.upper(),
        "spares": -1,
        "wanted_spares": 0,
        "reason": "forgetting" if state.forgetting.is_under_way else "not evaluated yet",
        "forgotten_in_s": state.forgotten_in_s(),
        "complete_step": 0,
        "protected_step": 0,
        "behind": _behind(state, now_s),
        "interval_steps": state.interval.schedule.interval_steps,
        "wait_ratio": round(state.interval.waits.share, 4),
        "missing_ranks": list(state.missing.found.ranks) if state.missing.found is not None else [],
        "decision": _decision(state, is_brief=is_brief),
        "sessions": [],
        "snapshots": [],
        "groups": [],
        "quarantined": [],
        "distrusted": [json_records.to_json(item) for item in state.probation.distrusted],
        "gate": "",
        "explain": None,
        "storage": state.persisting.document(),
        "ledger": state.accounts.document(now_s),
    }


def _behind(state: RunState, now_s: float) -> dict[str, Any] | None:
    """How far training is ahead of what is protected; None while it is within the usual distance."""
    behind = state.lag.behind
    if behind is None:
        return None
    return {"steps": behind.steps, "seconds": now_s - behind.since_s, "reason": behind.reason}


def _sessions(world: World) -> list[dict[str, Any]]:
    return [
        {"rank": rank, "node": s.node, "phase": s.record.phase.value, "last_step": s.record.last_step}
        for rank, s in sorted(world.items())
    ]


def _decision(state: RunState, *, is_brief: bool) -> dict[str, Any] | None:
    decision = state.recovery.decision
    if decision is None:
        return None
    return {
        "decision_id": decision.decision_id,
        "phase": state.recovery.phase.value,
        "outcome": decision.outcome.value,
        "attempt": decision.attempt,
        "base": _base(decision),
        "message": decision.message,
        "tries": decision.tries,
        "placements": [] if is_brief else [{"rank": p.rank, "node": p.node} for p in decision.placements],
        "sources": [] if is_brief else _sources(decision.sources),
        "source_counts": dict(Counter(source.kind.value for source in decision.sources)),
    }


def _base(decision: Decision) -> dict[str, Any] | None:
    base = decision.base
    if base is None:
        return None
    return {
        "attempt": base.attempt,
        "step": base.step,
        "snapshot_id": base.snapshot_id,
        "world_size": base.world_size or decision.world_size,
        "url": base.url,
    }


def _sources(sources: tuple[ShardSource, ...]) -> list[dict[str, Any]]:
    return [{"rank": s.rank, "kind": s.kind.value, "holders": list(s.holders)} for s in sources]


def _snapshot(state: RunState, context: RunContext, index: int, *, is_brief: bool) -> dict[str, Any]:
    view = context.views[index]
    word = _snapshot_state(state, context, index)
    is_calm = word in (SnapshotState.BEING_WRITTEN, SnapshotState.BEING_FREED, SnapshotState.DEAD)
    return {
        "attempt": view.key.attempt,
        "step": view.key.step,
        "is_distrusted": view.key in context.tainted,
        "state": word.value,
        "spares": view.spares,
        "snapshot_id": view.snapshot_id,
        "size_bytes": view.size_bytes,
        "shards": []
        if is_brief
        else [
            {"rank": rank, "nodes": list(view.holders.get(rank, ())), "size_bytes": view.sizes.get(rank, 0)}
            for rank in (range(view.world_size) if view.world_size <= MAX_LISTED_RANKS else sorted(view.digests))
        ],
        "missing": "" if is_calm else missing_sentence(context, state.memory, view),
    }


class SnapshotState(enum.StrEnum):
    """What a snapshot in memory is, for people."""

    BEING_WRITTEN = "being written"  # ranks are still committing their shards
    INCOMPLETE = "incomplete"  # a rank never committed its shard
    COMPLETE = "complete"  # every shard is there, parity is not
    DEGRADED = "degraded"
    PROTECTED = "protected"
    UNRECOVERABLE = "unrecoverable"
    BEING_FREED = "being freed"  # a newer one is as well protected: nodes delete it in their own time
    DEAD = "dead"  # a restore of an older step left it behind


def _snapshot_state(state: RunState, context: RunContext, index: int) -> SnapshotState:
    view, evaluation = context.views[index], state.evaluation
    assert evaluation is not None
    if view.key in evaluation.release:
        return SnapshotState.BEING_FREED
    if index not in context.live:
        return SnapshotState.DEAD
    if not view.snapshot_id:
        return SnapshotState.BEING_WRITTEN if _is_being_written(state, context, view) else SnapshotState.INCOMPLETE
    if not view.is_restorable:
        return SnapshotState.UNRECOVERABLE
    if view.spares >= evaluation.wanted:
        return SnapshotState.PROTECTED
    return SnapshotState.COMPLETE if view.is_complete and view.spares <= 0 else SnapshotState.DEGRADED


def _is_being_written(state: RunState, context: RunContext, view: SnapshotView) -> bool:
    """Whether each rank may still commit its shard: the world is whole, and none has come past the step without it."""
    decision, world = state.recovery.decision, state.world(context)
    if decision is None or view.key.attempt != decision.attempt or len(world) < decision.world_size:
        return False
    missing = [world[rank].record for rank in view.lost_ranks if rank in world]
    return all(max(session.last_step, session.skipped_step) <= view.key.step for session in missing)


def _groups(state: RunState, context: RunContext) -> list[dict[str, Any]]:
    """Groups of the newest snapshot that is as well protected as any, or else of the newest that is being encoded.

    The parity of a snapshot that is still being encoded is no weakness of its groups. A set of plans that lost a member
    is planned anew.
    """
    assert state.evaluation is not None
    views = context.live_views
    best = [view for view in views if view.is_restorable and view.spares == state.evaluation.spares]
    for view in [*best[:1], *views]:
        plan_set = state.protection.sets.get(view.snapshot_id)
        plans = plan_set.plans if plan_set is not None else _newest_plans(view)
        if plans:
            states = {plan_state.plan.plan_id: plan_state for plan_state in view.plans}
            is_new = view.snapshot_id not in state.memory.protected  # its parity is still being made
            groups = [_group(plan, states.get(plan.plan_id), context) for plan in plans]
            return [group | {"is_weak": _is_weak(group, is_new=is_new)} for group in groups]
    return []


def _is_weak(group: dict[str, Any], *, is_new: bool) -> bool:
    return bool(group["missing"]) or (not is_new and group["spares"] < group["m"])


def _newest_plans(view: SnapshotView) -> list[Plan]:
    serial = max((state.plan.serial for state in view.plans), default=0)
    return [state.plan for state in view.plans if state.plan.serial == serial]


def _group(plan: Plan, state: PlanState | None, context: RunContext) -> dict[str, Any]:
    members = [member.node for member in plan.members]
    return {
        "step": plan.step,
        "members": members,
        "missing": [name for name in members if name not in context.nodes],
        "k": plan.k,
        "m": plan.m,
        "spares": min(state.rank_spares.values(), default=0) if state is not None else 0,
        "fragments": state.fragment_count if state is not None else 0,
        "fragments_wanted": state.fragment_total if state is not None else 0,
    }


def _quarantined(context: RunContext) -> list[dict[str, Any]]:
    return [
        {
            "node": holder,
            "what": mark.what,
            "attempt": mark.attempt,
            "step": mark.step,
            "reason": mark.reason,
        }
        for holder, mark in context.quarantined()
    ]


def _explain(state: RunState, context: RunContext, *, is_brief: bool) -> dict[str, Any]:
    """What a world that asked now would restore."""
    choice = choose(context, state.memory, is_fresh_allowed=False)
    view = choice.view
    placements = state.recovery.placements() or (state.head.node_of_rank if state.head is not None else {})
    is_same = view is not None and view.world_size == len(placements)
    readers = {rank: node for rank, node in placements.items() if is_same and node in context.nodes}
    return {
        "outcome": choice.outcome.value,
        "attempt": view.key.attempt if view is not None else 0,
        "step": view.key.step if view is not None else 0,
        "message": choice.message,
        "sources": [] if view is None or is_brief else _sources(sources_of(view, readers=readers, targets=readers)),
    }
