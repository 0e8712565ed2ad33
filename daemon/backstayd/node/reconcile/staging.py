"""How far this node is with the decision of a run: which shards its trainers need, which are staged. Pure."""

from __future__ import annotations

from backstayd.core.messages.decisions import (
    Decision,
    DecisionPhase,
    ShardSource,
    Staging,
    StagingState,
    base_size,
    takes_whole,
)
from backstayd.core.messages.plans import Rebuild, RebuildTarget
from backstayd.node.reconcile.actions import View


def staging_of(view: View) -> Staging | None:
    """What this node has staged of the decision; None if it is not one of its hosts."""
    decision = view.desired.decision
    if decision is None or view.node not in {place.node for place in decision.placements}:
        return None
    if view.decision is not None and view.decision.decision_id == decision.decision_id:
        return Staging(decision_id=decision.decision_id, state=StagingState.RECORDED)
    if decision.decision_id in view.failed:
        reason = view.failed[decision.decision_id]
        return Staging(decision_id=decision.decision_id, state=StagingState.FAILED, reason=reason)
    sources = wanted_sources(view, decision)
    done = [source for source in sources if (decision.decision_id, source.digest) in view.verified]
    is_ready = len(done) == len(sources) and not unstaged_ranks(view, decision)
    return Staging(
        decision_id=decision.decision_id,
        state=StagingState.READY if is_ready else StagingState.STAGING,
        done_bytes=sum(source.size_bytes for source in done),
        total_bytes=sum(source.size_bytes for source in sources),
    )


def needs_open_files(view: View) -> bool:
    """Whether trainers here may still need the files that were verified for the decision."""
    decision = view.desired.decision
    if decision is None:
        return False
    is_coming = view.desired.decision_phase in (DecisionPhase.PREPARE, DecisionPhase.RECORD)
    return is_coming or any(trainer.world_id == decision.world_id for trainer in view.restoring)


def wanted_ranks(view: View, decision: Decision) -> frozenset[int]:
    """Ranks whose whole shards the trainers of that world on this node will read."""
    if base_size(decision) != decision.world_size:
        return frozenset()
    choosing = _choosing(view, decision)
    ranks = {place.rank for place in decision.placements if place.node == view.node} - set(choosing)
    for session in view.sessions:
        if session.world_id == decision.world_id and session.rank not in choosing:
            ranks |= {session.rank, *session.needs}
    return frozenset(ranks)


def unstaged_ranks(view: View, decision: Decision) -> frozenset[int]:
    """Ranks of that world on this node that fetch chunks of another layout and do not have them all yet."""
    choosing = _choosing(view, decision)
    ranks = {rank for rank, staged in choosing.items() if staged != decision.decision_id}
    if decision.base is not None and base_size(decision) != decision.world_size:
        ranks |= {place.rank for place in decision.placements if place.node == view.node} - set(choosing)
    return frozenset(ranks)


def _choosing(view: View, decision: Decision) -> dict[int, str]:
    """Ranks here with another layout than the base, and the decision that each has staged."""
    return {
        trainer.rank: trainer.staged
        for trainer in view.restoring
        if trainer.world_id == decision.world_id and not takes_whole(decision, rank=trainer.rank, layout=trainer.layout)
    }


def rebuilt_bytes(view: View) -> tuple[int, int]:
    """(done, total) bytes of the shards that are rebuilt onto this node."""
    done = total = 0
    for rebuild in view.desired.rebuilds:
        for target in rebuild.targets:
            if target.node != view.node:
                continue
            size = target_size(rebuild, target)
            total += size
            missing = view.missing.get((rebuild.rebuild_id, target.digest[:16]))
            if target.digest in view.digests:
                done += size
            elif missing is not None:
                stripes = max(1, rebuild.plan.k)
                done += size * (stripes - min(stripes, len(missing))) // stripes
    return done, total


def wanted_sources(view: View, decision: Decision) -> list[ShardSource]:
    wanted = wanted_ranks(view, decision)
    return [source for source in decision.sources if source.rank in wanted]


def target_size(rebuild: Rebuild, target: RebuildTarget) -> int:
    shards = rebuild.plan.members[target.member_index].shards
    return next((shard.size_bytes for shard in shards if shard.rank == target.rank), 0)
