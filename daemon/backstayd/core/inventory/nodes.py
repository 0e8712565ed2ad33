"""Which nodes there are and how sure that is: live, suspect, lost. Time is an argument. Pure."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Mapping

from backstay.ids import Generation
from backstayd.core.messages.report import NodeIdentity, NodeReport, RunReport


class Liveness(enum.StrEnum):
    LIVE = "live"
    SUSPECT = "suspect"  # no report for half a lease
    LOST = "lost"  # no report for a lease: its shards are considered lost


class NodeState:
    """The last report of one node and when it came."""

    def __init__(self, report: NodeReport, seen_s: float) -> None:
        self.report = report
        self.seen_s = seen_s
        self.liveness = Liveness.LIVE
        self.retired: deque[str] = deque(maxlen=32)  # incarnations before this one: their late reports are ignored
        self.runs: dict[str, RunReport] = {run.run: run for run in report.runs}
        self.drain_order: bool | None = None  # of an operator, until the node reports that it obeys
        self.has_obeyed = False  # it has reported a generation of this coordinator

    @property
    def is_draining(self) -> bool:
        """Whether it will be stopped."""
        return self.report.is_draining if self.drain_order is None else self.drain_order

    @property
    def name(self) -> str:
        return self.report.node.name

    @property
    def identity(self) -> NodeIdentity:
        return self.report.node

    @property
    def generation(self) -> Generation:
        return self.report.generation

    @property
    def free_bytes(self) -> int:
        """Room left; without a known capacity it is taken to be plenty."""
        if self.report.capacity_bytes == 0:
            return 1 << 60
        return max(0, self.report.capacity_bytes - self.report.used_bytes)


class NodeTable:
    """The newest report of each node.

    Invariant: it never goes back, neither in sequence nor to an incarnation that was replaced. A late report would bring
    back shards that are deleted by now.
    """

    def __init__(self, lease_s: float, coordinator: str = "") -> None:
        self._lease_s = lease_s
        self._coordinator = coordinator  # its incarnation
        self.nodes: dict[str, NodeState] = {}

    def observe(self, report: NodeReport, now_s: float) -> str | None:
        """Take in a report. Returns whether the node "joined", "restarted" or "returned" with it, or else "".

        None: there is nothing to decide anew, as it is stale or a bare heartbeat (the same record again).
        """
        name = report.node.name
        state = self.nodes.get(name)
        if state is not None and state.report is report and state.liveness is Liveness.LIVE:
            state.seen_s = now_s
            return None
        is_obeying = bool(self._coordinator) and report.generation.incarnation == self._coordinator
        if state is None:
            self.nodes[name] = NodeState(report, now_s)
            self.nodes[name].has_obeyed = is_obeying
            return "joined"
        if report.node.incarnation in state.retired:
            return None
        change = ""
        if report.node.incarnation != state.identity.incarnation:
            state.retired.append(state.identity.incarnation)
            change = "restarted"
        elif report.sequence < state.report.sequence:
            return None
        elif state.liveness is Liveness.LOST:
            change = "returned"
        state.report = report
        state.has_obeyed |= is_obeying
        state.seen_s = now_s
        state.liveness = Liveness.LIVE
        state.runs = {run.run: run for run in report.runs}
        if report.is_draining == state.drain_order or report.is_cordoned:
            state.drain_order = None
        return change

    def suspect(self, name: str, incarnation: str) -> bool:
        """The connection to a node broke: until it reports again, nobody waits for it. Returns whether that is a change."""
        state = self.nodes.get(name)
        if state is None or state.identity.incarnation != incarnation or state.liveness is not Liveness.LIVE:
            return False
        state.liveness = Liveness.SUSPECT
        return True

    def excuse(self, away_s: float, now_s: float) -> None:
        """The coordinator did not listen for ``away_s`` until now: no node was silent for that time."""
        for state in self.nodes.values():
            state.seen_s = min(now_s, state.seen_s + away_s)

    def tick(self, now_s: float) -> list[str]:
        """Let leases run out; returns the names of nodes that are lost from now on."""
        lost = []
        for state in self.nodes.values():
            silent_s = now_s - state.seen_s
            if silent_s >= self._lease_s:
                if state.liveness is not Liveness.LOST:
                    lost.append(state.name)
                state.liveness = Liveness.LOST
            elif silent_s >= self._lease_s / 2:
                state.liveness = Liveness.SUSPECT
        return sorted(lost)

    def forget_lost(self, now_s: float, after_s: float) -> None:
        """Drop nodes that are lost for ``after_s``, so that the table stays bounded."""
        for name in [n.name for n in self.nodes.values() if n.liveness is Liveness.LOST and now_s - n.seen_s > after_s]:
            del self.nodes[name]

    def present(self) -> list[NodeState]:
        """Nodes whose lease has not run out, by name."""
        return sorted((n for n in self.nodes.values() if n.liveness is not Liveness.LOST), key=lambda n: n.name)

    def live(self) -> list[NodeState]:
        return [node for node in self.present() if node.liveness is Liveness.LIVE]


def staying(nodes: Mapping[str, NodeState]) -> Mapping[str, NodeState]:
    """Those that do not drain; all, if all do."""
    return {name: node for name, node in nodes.items() if not node.is_draining} or nodes


def natural(name: str) -> tuple[object, ...]:
    """Sort key under which node-2 comes before node-10."""
    parts: list[object] = []
    digits = ""
    for character in name + "\0":
        if character.isdecimal():
            digits += character
            continue
        if digits:
            parts.append((1, int(digits), ""))
            digits = ""
        parts.append((0, 0, character))
    return tuple(parts)
