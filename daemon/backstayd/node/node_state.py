"""What the parts of a node share: its store, its bell, what the coordinator said last. Holds no logic of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from backstay.protocol import messages
from backstayd.clock import Clock
from backstayd.core.messages.decisions import Decision
from backstayd.core.messages.desired import RunDesired
from backstayd.core.messages.report import NodeIdentity
from backstayd.node.drain_state import Drain
from backstayd.node.signal import Bell
from backstayd.node.timeline import Timeline
from backstayd.node.trainers.session import Session
from backstayd.security.credentials import Credentials
from backstayd.store.store import Store
from backstayd.telemetry.metrics import NodeMetrics

if TYPE_CHECKING:
    from backstayd.node.restores.chunks import Offers


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkState:
    """Which coordinator the node is or was last connected to, and, while to none, what each address answered."""

    address: str = ""
    error: str = ""


@dataclass(slots=True, kw_only=True)
class NodeContext:
    """What the parts of a node share. ``desired`` holds what the coordinator said last, by run."""

    identity: NodeIdentity
    lease_s: float
    store: Store
    bell: Bell
    timeline: Timeline
    metrics: NodeMetrics
    clock: Clock
    desired: dict[str, RunDesired]
    drain: Drain
    coordinator_address: str = ""  # one, or several with commas between
    credentials: Credentials | None = None
    notify: Callable[[], None] = lambda: None  # the report changed
    kick: Callable[[], None] = lambda: None  # look again at what is desired
    is_coordinator_connected: Callable[[], bool] = lambda: False
    coordinator: Callable[[], LinkState] = LinkState
    document: Callable[[], dict[str, Any]] = dict
    progress: Callable[[Session], messages.Progress] = lambda session: messages.Progress(phase="waiting")
    offer_due: Callable[[Session], Decision | None] = lambda session: None
    offers: Offers = field(init=False)

    def changed(self) -> None:
        """Something that others wait for or report has changed."""
        self.bell.ring()
        self.kick()
        self.notify()

    def run_desired(self, run: str) -> RunDesired:
        return self.desired.get(run) or RunDesired(run=run)

    def decision_of(self, run: str) -> Decision | None:
        """The newest decision this node recorded."""
        index = self.store.runs.get(run)
        return index.decision if index is not None else None

    def current_world(self, run: str) -> str:
        """The only world that may write; "" while none is decided. The coordinator's word, else the recorded decision's."""
        desired = self.desired.get(run)
        if desired is not None and desired.world_id:
            return desired.world_id
        decision = self.decision_of(run)
        return decision.world_id if decision is not None else ""
