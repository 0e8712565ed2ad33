"""Whose run it is: one user's, whatever others report under its name. Pure.

The first user that a node reports owns the run. A claim with a recorded decision or a persisted snapshot behind it precedes one
without, so that a new coordinator, or an empty cluster beside full storage, comes to the same answer. Nodes on which another
user attached under the name are *strangers* to the run: nothing that they report of it counts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

from backstayd.core.inventory.nodes import NodeState


def owner_of(run: str, nodes: Mapping[str, NodeState], *, known: str) -> str:
    """The user who owns ``run``, a number; ``known``: who did at the last look, "" for nobody."""
    claims: dict[str, int] = {}  # by user: the newest generation that supports the claim
    for node in nodes.values():
        report = node.runs.get(run)
        if report is None:
            continue
        decided = report.decision.generation.number if report.decision is not None else 0
        stored = report.survey.snapshots if report.survey is not None else ()
        for user, number in ((report.owner, decided), *((one.owner, one.generation) for one in stored)):
            if user:
                claims[user] = max(claims.get(user, 0), number)
    if known and (claims.get(known, 0) or not any(claims.values())):
        return known
    return max(claims, key=lambda user: (claims[user], user == known, -int(user)), default=known)


def strangers(run: str, nodes: Mapping[str, NodeState], owner: str) -> dict[str, str]:
    """Nodes that report ``run`` as another user's, and whose."""
    found = {name: node.runs[run].owner for name, node in nodes.items() if run in node.runs}
    return {name: user for name, user in found.items() if user not in ("", owner)}


def without(run: str, nodes: Mapping[str, NodeState], foreign: Mapping[str, str]) -> Mapping[str, NodeState]:
    """``nodes`` as if those in ``foreign`` had not reported ``run``."""
    if not foreign:
        return nodes
    return {name: _without(run, node) if name in foreign else node for name, node in nodes.items()}


def _without(run: str, node: NodeState) -> NodeState:
    changed = copy.copy(node)
    changed.runs = {name: report for name, report in node.runs.items() if name != run}
    return changed
