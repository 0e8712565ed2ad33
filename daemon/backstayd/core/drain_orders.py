"""Which nodes drain, and which of them may be stopped: the operator's orders, and the verdict over all runs. Pure.

A node itself remembers that it drains; an order is kept here only until the node reports that it obeys.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from backstay.errors import UsageError
from backstayd.core.inventory.nodes import Liveness, NodeState, NodeTable, natural
from backstayd.core.messages.report import SessionPhase
from backstayd.core.run_state import RunState
from backstayd.core.sentences import amount, counted, listed


class DrainState(enum.StrEnum):
    NONE = ""
    DRAINING = "draining"  # what it holds is being copied elsewhere
    SAFE = "safe"  # every kept snapshot outlives its stop, with as many spares as the other nodes allow


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainVerdict:
    """How far one node is, and why in one sentence."""

    state: DrainState = DrainState.NONE
    reason: str = ""


def order_drain(table: NodeTable, name: str, *, undo: bool) -> None:
    """Note an operator's order, which is sent until the node reports that it obeys.

    Raises:
        UsageError: there is no such node, it is lost, or it drains because it is cordoned.
    """
    node = table.nodes.get(name)
    if node is None:
        names = sorted(table.nodes, key=natural)
        known = listed(names) or "none at all"
        raise UsageError(f"no node {name} has reported; known: {known}", reason="unknown_node")
    if undo and node.report.is_cordoned:
        raise UsageError(
            f"{name} drains because its Kubernetes node is cordoned; `kubectl uncordon` that one", reason="cordoned"
        )
    if not undo and node.liveness is Liveness.LOST:
        raise UsageError(
            f"{name} has not reported for a lease: it is considered lost, nothing can be copied from it, and its shards are "
            "being rebuilt as far as possible (`backstay status`)",
            reason="node_lost",
        )
    wanted = not undo
    is_ordered = node.drain_order is not None  # maybe the opposite, which it may have obeyed and not reported yet
    node.drain_order = wanted if is_ordered or node.report.is_draining != wanted else None


def verdict_of(node: NodeState, runs: Mapping[str, RunState], *, is_settled: bool) -> DrainVerdict:
    """Whether ``node`` may be stopped."""
    if not node.is_draining:
        return DrainVerdict()
    if node.liveness is Liveness.LOST:
        return DrainVerdict(state=DrainState.DRAINING, reason="it has stopped, and still drains if it comes back")
    lacks = "the coordinator has just started and is collecting reports" if not is_settled else ""
    lacks = lacks or ("it has not confirmed the order yet" if node.drain_order is not None else "")
    for name in sorted(node.runs):
        state = runs.get(name)
        if lacks or state is None or state.forgetting.is_under_way:
            continue
        evaluation = state.evaluation
        missing = "it has not been evaluated yet" if evaluation is None else evaluation.drain_lacks
        lacks = f"{name}: {missing}" if missing else ""
    if lacks:
        return DrainVerdict(state=DrainState.DRAINING, reason=lacks)
    return DrainVerdict(state=DrainState.SAFE, reason=f"it may be stopped{_trainers(node)}")


def _trainers(node: NodeState) -> str:
    """Who trains on the node: that its state is safe does not keep training running."""
    found = [
        f"{counted(ranks, 'rank')} of {name}"
        for name, run in sorted(node.runs.items())
        if (ranks := sorted(s.rank for s in run.sessions if s.phase is not SessionPhase.ENDED))
    ]
    if not found:
        return ""
    count = sum(1 for run in node.runs.values() for s in run.sessions if s.phase is not SessionPhase.ENDED)
    return (
        f" without losing state; {amount(count, 'trainer')} still {'runs' if count == 1 else 'run'} on it ({listed(found)}): "
        "a restart of the daemon alone does not disturb them, a stop of the machine ends them"
    )
