"""What a simulated node does about a decision: stage what it names, record it, let trainers go or refuse them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backstayd.core.messages.decisions import Decision, DecisionPhase, ShardSource, SourceKind, Staging, StagingState
from backstayd.core.messages.report import SessionPhase
from tests.simulation.storing import fetch_stored, is_stored

if TYPE_CHECKING:
    from tests.simulation.node import Node


def follow(node: Node, decision: Decision, phase: DecisionPhase) -> None:
    """Bring the node to ``phase`` of ``decision``."""
    work, memory = node.work[decision.run], node.memory[decision.run]
    if phase is DecisionPhase.REFUSE:
        for trainer in node.trainers:
            if trainer.world_id == decision.world_id and trainer.phase is SessionPhase.RESTORING:
                node.cluster.refused(trainer, decision)
        return
    if phase is DecisionPhase.RELEASE:
        if node.name not in {place.node for place in decision.placements}:
            _recorder(node, decision)
        elif memory.decision is not None and memory.decision.decision_id == decision.decision_id:
            if memory.decision.generation.number < decision.generation.number:
                memory.decision = decision
                node.changed()
            _release_trainers(node, decision)
        return
    if work.staging is None or work.staging.decision_id != decision.decision_id:
        work.staging = Staging(decision_id=decision.decision_id, state=StagingState.STAGING)
        node.job(decision.run, ("stage", decision.decision_id), _stage, node, decision)
        node.changed()
    if phase is DecisionPhase.RECORD and work.staging.state is StagingState.READY and node.recording_trouble:
        _staged(node, decision, StagingState.FAILED, node.recording_trouble)
    elif phase is DecisionPhase.RECORD and work.staging.state is StagingState.READY:
        memory.decision, memory.recorded_s = decision, node.cluster.engine.now_s
        work.staging = Staging(decision_id=decision.decision_id, state=StagingState.RECORDED)
        node.cluster.recorded(node, decision)
        node.changed()


def _recorder(node: Node, decision: Decision) -> None:
    """Keep the decision of a run that lives on other nodes."""
    memory = node.memory[decision.run]
    here = memory.decision
    if here is None or here.generation.number < decision.generation.number:
        memory.decision, memory.recorded_s = decision, node.cluster.engine.now_s
        node.changed()


def _stage(node: Node, decision: Decision) -> bool:
    work, memory = node.work[decision.run], node.memory[decision.run]
    if work.staging is None or work.staging.decision_id != decision.decision_id:
        return True
    if node.staging_trouble:
        return _staged(node, decision, StagingState.FAILED, node.staging_trouble)
    if decision.base is not None and decision.base.world_size != decision.world_size:
        return _stage_chunks(node, decision)
    ranks = {place.rank for place in decision.placements if place.node == node.name}
    for source in decision.sources:
        if source.rank not in ranks or decision.base is None:
            continue
        held = memory.shards.get((decision.base.attempt, decision.base.step, source.rank))
        if held is not None and held.digest == source.digest:
            if held.digest in memory.corrupt:
                node.quarantine_shard(decision.run, held)
                return _staged(node, decision, StagingState.FAILED, "a local shard is corrupt")
            continue
        if source.kind is SourceKind.REBUILD:
            return False
        if source.kind is SourceKind.PERSISTED:
            if not fetch_stored(node, decision, source):
                return _staged(node, decision, StagingState.FAILED, f"rank {source.rank} cannot be read there")
            continue
        if not _fetch(node, decision, source.rank):
            return _staged(node, decision, StagingState.FAILED, f"no holder serves rank {source.rank}")
    return _staged(node, decision, StagingState.READY, "")


def _stage_chunks(node: Node, decision: Decision) -> bool:
    """Ranks of another layout read parts of every shard, here or elsewhere; nothing is published for it."""
    for source in decision.sources:
        readable = [_read_source(node, decision, source, name) for name in dict.fromkeys((node.name, *source.holders))]
        if "ok" in readable or (source.kind is SourceKind.PERSISTED and is_stored(node, decision, source)):
            continue
        if "corrupt" in readable or source.kind is not SourceKind.REBUILD:
            return _staged(node, decision, StagingState.FAILED, f"no holder serves rank {source.rank}")
        return False  # its owner is not there yet
    return _staged(node, decision, StagingState.READY, "")


def _read_source(node: Node, decision: Decision, source: ShardSource, name: str) -> str:
    assert decision.base is not None
    peer = node.cluster.reach(name)
    place = (decision.base.attempt, decision.base.step, source.rank)
    shard = peer.shard_at(decision.run, place) if peer is not None else None
    if peer is None or shard is None or shard.digest != source.digest:
        return "absent"
    if shard.digest in peer.memory[decision.run].corrupt:
        peer.quarantine_shard(decision.run, shard)
        return "corrupt"
    return "ok"


def _fetch(node: Node, decision: Decision, rank: int) -> bool:
    assert decision.base is not None
    source = decision.sources[rank]
    place = (decision.base.attempt, decision.base.step, rank)
    for holder in source.holders:
        peer = node.cluster.reach(holder)
        theirs = peer.shard_at(decision.run, place) if peer is not None else None
        if peer is None or theirs is None or theirs.digest != source.digest:
            continue
        if theirs.digest in peer.memory[decision.run].corrupt:
            peer.quarantine_shard(decision.run, theirs)
            continue
        node.memory[decision.run].shards[place] = theirs
        node.changed()
        return True
    return False


def _staged(node: Node, decision: Decision, state: StagingState, reason: str) -> bool:
    node.work[decision.run].staging = Staging(decision_id=decision.decision_id, state=state, reason=reason)
    node.changed()
    return True


def _has_gone(node: Node, decision: Decision, rank: int) -> bool:
    """Whether the rank's shard was here when the decision was recorded, and is no more."""
    base = decision.base
    if base is None or base.world_size != decision.world_size:
        return False
    held = node.memory[decision.run].shards.get((base.attempt, base.step, rank))
    return held is None or held.digest != decision.sources[rank].digest


def _release_trainers(node: Node, decision: Decision) -> None:
    for trainer in list(node.trainers):
        if (
            trainer.world_id == decision.world_id
            and trainer.is_alive
            and trainer.is_attached
            and trainer.phase is SessionPhase.RESTORING
        ):
            if _has_gone(node, decision, trainer.rank):
                node.cluster.kill_trainer(trainer)  # its restore() raises
                continue
            trainer.phase = SessionPhase.TRAINING
            trainer.attempt = decision.attempt
            trainer.last_step = decision.base.step if decision.base is not None else 0
            node.cluster.released(node, trainer, decision)
            node.changed()
