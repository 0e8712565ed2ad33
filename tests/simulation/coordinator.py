"""One coordinator process of the simulated cluster, which runs the real core."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backstayd.core.coordinator import Coordinator
from backstayd.core.messages.desired import NodeDesired
from backstayd.core.messages.report import NodeReport

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster

EVALUATE_COALESCE_S = 0.005


class Control:
    """One coordinator process: the core, a coalescing loop, one ordered stream per node."""

    def __init__(self, cluster: Cluster) -> None:
        engine = cluster.engine
        self.cluster = cluster
        self.is_running = True
        self.is_paused = False
        self.core = Coordinator(cluster.policy, f"c{engine.random.getrandbits(32):08x}", now_s=engine.now_s)
        self.sent: dict[str, NodeDesired] = {}
        self.arrival_s: dict[str, float] = {}
        self.streams: dict[str, str] = {}
        self.answered_s: dict[str, float] = {}  # by node: when the newest report was sent that has come
        self.is_due = False
        self._tick()

    def _tick(self) -> None:
        if not self.is_running:
            return
        if not self.is_paused:
            self.core.tick(self.cluster.engine.now_s)
            self._evaluate(is_heartbeat=True)
        self.cluster.engine.after(self.cluster.lease_s / 6, self._tick)

    def receive(self, report: NodeReport, sent_s: float) -> None:
        if not self.is_running or self.is_paused:
            return
        self.core.observe(report, self.cluster.engine.now_s)
        name = report.node.name
        if self.streams.get(name) != report.node.incarnation:
            self.answered_s[name] = sent_s
        self.streams[name] = report.node.incarnation
        self.answered_s[name] = max(sent_s, self.answered_s[name])
        if not self.is_due:
            self.is_due = True
            self.cluster.engine.after(EVALUATE_COALESCE_S, self._evaluate_due)

    def _evaluate_due(self) -> None:
        self.is_due = False
        if self.is_running and not self.is_paused:
            self._evaluate(is_heartbeat=False)

    def _evaluate(self, *, is_heartbeat: bool) -> None:
        self.core.evaluate()
        self.core.check_invariants()
        self.core.take_events()
        for name, incarnation in self.streams.items():
            desired = self.core.desired(name)
            if is_heartbeat or desired != self.sent.get(name):
                self.sent[name] = desired
                self._send(name, incarnation, desired)

    def _send(self, name: str, incarnation: str, desired: NodeDesired) -> None:
        cluster = self.cluster
        for delay_s in cluster.fates():
            arrival_s = max(cluster.engine.now_s + delay_s, self.arrival_s.get(name, 0.0))
            self.arrival_s[name] = arrival_s
            answered_s = self.answered_s[name]
            arrive_s = arrival_s - cluster.engine.now_s
            cluster.engine.after(arrive_s, cluster.deliver, self, name, incarnation, desired, answered_s)
