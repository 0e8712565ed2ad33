"""What the parts of a node share: its store, what the coordinator wants, and the signals that wake them."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

from backstayd.bounded import drop_oldest
from backstayd.change_signal import Signal
from backstayd.clock import Clock
from backstayd.core.messages.decisions import Decision
from backstayd.core.messages.desired import RunDesired
from backstayd.core.messages.report import NodeIdentity
from backstayd.node.drain_state import Drain
from backstayd.security.credentials import Credentials
from backstayd.store.store import Store
from backstayd.telemetry.metrics import NodeMetrics
from backstayd.transport.link import LinkState

logger = logging.getLogger(__name__)

MAX_EVENTS: Final = 500
MAX_FAILED_DECISIONS: Final = 100


class Timeline:
    """The last events on this node, for people: a bounded list, newest last, which the daemon never reads."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)

    def add(self, kind: str, run: str, message: str) -> None:
        event = {"time_unix_s": self._clock.unix_s(), "run": run, "kind": kind, "message": message}
        self._events.append(event)

    def document(self) -> list[dict[str, Any]]:
        return list(self._events)


@dataclass(slots=True, kw_only=True)
class NodeState:
    """Values that every part of a node reads. ``desired`` is replaced whole with each answer of the coordinator."""

    identity: NodeIdentity
    lease_s: float
    coordinator: str  # its configured address, or several separated by commas
    credentials: Credentials | None
    store: Store
    timeline: Timeline
    metrics: NodeMetrics
    clock: Clock
    drain: Drain
    report_due: Signal  # the coordinator should get a report
    pass_due: Signal = field(default_factory=Signal)  # the reconciler should compare again
    waiters: Signal = field(default_factory=Signal)  # requests of trainers that wait should look again
    link: LinkState = field(default_factory=LinkState)
    desired: dict[str, RunDesired] = field(default_factory=dict)  # by run
    peers: dict[str, str] = field(default_factory=dict)  # name -> bulk address
    failed_decisions: dict[str, str] = field(default_factory=dict)  # decision id -> why it cannot be staged here

    def changed(self) -> None:
        """Something that others wait for or report has changed."""
        self.waiters.notify()
        self.pass_due.notify()
        self.report_due.notify()

    def log_event(self, kind: str, run: str, message: str) -> None:
        """Log an event of a run and keep it in the timeline."""
        logger.info("run %s: %s: %s", run, kind, message)
        self.timeline.add(kind, run, message)

    def run_desired(self, run: str) -> RunDesired:
        return self.desired.get(run) or RunDesired(run=run)

    def decision_of(self, run: str) -> Decision | None:
        """The newest decision this node recorded."""
        index = self.store.runs.get(run)
        return index.decision if index is not None else None

    def current_world(self, run: str) -> str:
        """The only world that may write; "" while none is decided. What the coordinator wants, else the recorded decision's."""
        desired = self.desired.get(run)
        if desired is not None and desired.world_id:
            return desired.world_id
        decision = self.decision_of(run)
        return decision.world_id if decision is not None else ""

    def is_current(self, run: str, decision_id: str) -> bool:
        """Whether the coordinator still wants that decision, and this node has not given it up."""
        decision = self.run_desired(run).decision
        return decision is not None and decision.decision_id == decision_id and decision_id not in self.failed_decisions

    def fail_decision(self, run: str, decision_id: str, reason: str) -> None:
        """That decision cannot be staged here: the coordinator decides anew."""
        logger.error("run %s: decision %s cannot be staged here: %s", run, decision_id[:8], reason)
        drop_oldest(self.failed_decisions, MAX_FAILED_DECISIONS)
        self.failed_decisions[decision_id] = reason
        self.changed()

    def is_forgotten(self, run: str) -> bool:
        """Whether the run is forgotten and nobody uses its name; coders here and at peers may still work for it."""
        return run in self.store.tombstones and run not in self.store.runs and run not in self.desired
