"""Which nodes keep a run's decision besides its hosts, so that the run is still known where its hosts are out of reach. Pure.

A witness records the released decision like a host and reports it; it holds nothing else of the run and stages nothing. That a
run existed, and up to which attempt and generation, is known as long as one witness is there: no world of it starts from
scratch in silence, and no attempt is given twice.
"""

from __future__ import annotations

import heapq
import zlib

from backstayd.core.inventory.nodes import NodeState
from backstayd.core.inventory.run_context import RunContext
from backstayd.core.messages.decisions import Decision

WITNESSES = 8  # enough to outlive the nodes of one job, and few enough that no message grows with the cluster


def choose_witnesses(context: RunContext, decision: Decision) -> frozenset[str]:
    """The nodes that keep ``decision``: those that have it, then any of the others, in other failure domains first.

    None that will be stopped, and none where somebody else's run has the name.
    """
    hosts = {place.node for place in decision.placements}
    others = [node for node in context.nodes.values() if node.name not in hosts and not node.is_draining]
    keepers = [node.name for node in others if _keeps(node, decision)]
    if len(keepers) >= WITNESSES:
        return frozenset(sorted(keepers)[:WITNESSES])
    near = {context.nodes[name].identity.domain for name in hosts & context.nodes.keys()}
    rest = (node for node in others if not _keeps(node, decision))
    order = {node.name: (node.identity.domain in near, _draw(node.name, decision.run), node.name) for node in rest}
    return frozenset([*keepers, *heapq.nsmallest(WITNESSES - len(keepers), order, key=order.__getitem__)])


def _keeps(node: NodeState, decision: Decision) -> bool:
    report = node.runs.get(decision.run)
    kept = report.decision if report is not None else None
    return kept is not None and kept.decision_id == decision.decision_id and kept.generation == decision.generation


def _draw(node: str, run: str) -> int:
    """Another order of the nodes for each run, and the same one again."""
    return zlib.crc32(f"{run}/{node}".encode())
