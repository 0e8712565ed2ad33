"""The coordinator as a process: one loop drives the core with reports and time, and serves nodes, operators and watchers.

Keeps nothing on disk: started again, it rebuilds everything from reports. Has a core only while it leads, which is asked before
anything is sent. Must not decide anything itself.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from backstay import __version__, faults
from backstay.ids import new_incarnation
from backstayd.clock import Clock
from backstayd.config.reload import Reloader
from backstayd.config.schema import CoordinatorConfig
from backstayd.coordinator.gauges import Gauges
from backstayd.coordinator.leadership import Leadership
from backstayd.core.coordinator import Coordinator
from backstayd.core.drain_orders import DrainVerdict
from backstayd.core.inventory.nodes import Liveness
from backstayd.core.messages.desired import NodeDesired
from backstayd.core.messages.report import NodeReport
from backstayd.core.policy import CorePolicy
from backstayd.core.recover.locate import Located
from backstayd.core.status.document import status_document
from backstayd.core.timeline import FREQUENT_KINDS, Event
from backstayd.process import DaemonProcess
from backstayd.security.credentials import ExpiryWatch, load_credentials
from backstayd.telemetry import logs
from backstayd.telemetry.health import Health
from backstayd.telemetry.http import start_http
from backstayd.telemetry.metrics import CoordinatorMetrics
from backstayd.telemetry.routes import Route, daemon_routes, in_turns, made_in_loop
from backstayd.telemetry.status_page import page_routes
from backstayd.transport.coordinator_service import CoordinatorServer

logger = logging.getLogger(__name__)

MAX_NAMED_RUNS: Final = 3  # in the sentence for systemctl status
COALESCE_S: Final = 0.003  # reports that arrive together are evaluated once
REST_FACTOR: Final = 3  # for so many times the last evaluation the loop serves others, up to a third of a lease
IDLE_FACTOR: Final = 20  # for so many times, up to a lease, when only time has passed
ELECTED_SETTLE_LEASES: Final = 2.0  # nodes notice the loss and try the addresses one by one, maybe a dead one first
SILENT_LEASES: Final = 2.0  # if all nodes are silent for so long, it is this coordinator that is cut off
WARNING_KINDS: Final = frozenset(
    {"node_lost", "session_lost", "abandoned", "behind", "quarantined"}
    | {"interval_raised", "distrusted", "ranks_missing", "report_refused"}
)
ERROR_KINDS: Final = frozenset({"refused", "gate_failed", "evaluation_failed"})


def run(config: CoordinatorConfig, load: Callable[[], CoordinatorConfig]) -> int:
    """Coordinate until SIGTERM or SIGINT; returns 0. ``load`` reads the settings again, at SIGHUP.

    Raises:
        ConfigError: an address cannot be bound.
    """
    return asyncio.run(_main(config, load))


async def _main(config: CoordinatorConfig, load: Callable[[], CoordinatorConfig]) -> int:
    process = DaemonProcess()
    service = CoordinatorProcess(config)
    async with process.starting("starting"):
        await service.start()
    try:
        await process.serve(
            service.health, status=service.sentence, reload=Reloader(config, load=load, apply=service.adopt)
        )
        logger.info("the coordinator stops; nodes keep what they hold until one starts again")
    finally:
        await service.close()
    return 0


def policy_of(config: CoordinatorConfig) -> CorePolicy:
    """The settings as the core sees them, under the same names."""
    return CorePolicy(**{field.name: getattr(config, field.name) for field in dataclasses.fields(CorePolicy)})


class CoordinatorProcess:
    """The core with its clock, its server and its watchers; everything in the loop that :meth:`start` ran in."""

    def __init__(self, config: CoordinatorConfig, *, clock: Clock | None = None) -> None:
        self._config = config
        self._credentials = load_credentials(config)
        self._clock = clock or Clock()
        self._offset_s = self._clock.unix_s() - self._clock.monotonic_s()
        self._policy = policy_of(config)
        self.incarnation = new_incarnation()
        self._core: Coordinator | None = None
        self._heard_s: float | None = None  # when a node reported last in this term
        self._leadership = Leadership(
            config, self.incarnation, clock=self._clock, on_lead=self._lead, on_step_down=self._step_down
        )
        self.metrics = CoordinatorMetrics(version=__version__)
        self.metrics.set_config(config)
        self.metrics.coordinator_is_leader.set_function(lambda: float(self._leadership.is_leading()))
        self.metrics.coordinator_lease_margin_seconds.set_function(self._leadership.margin_s)
        if self._credentials is not None:
            self.metrics.watch_certificates(self._credentials.ends_unix_s)
        self._gauges = Gauges(self.metrics, self._policy)
        self._server = CoordinatorServer(config.listen, self, lease_s=config.lease_s, credentials=self._credentials)
        self._evaluation: asyncio.TimerHandle | None = None
        self.health = Health(lease_s=config.lease_s)
        self._ticker: asyncio.Task[None] | None = None
        self._evaluated_s = self._cost_s = 0.0  # when the last evaluation ended, and what it took
        self._half_recorded: set[str] = set()
        self.address = ""
        self.http_address = ""

    async def start(self) -> None:
        """Serve; raises ConfigError if an address cannot be bound."""
        loop = asyncio.get_running_loop()
        self.address = await self._server.start()
        try:
            self._http = start_http(
                self._config.http,
                self._routes(loop),
                credentials=self._credentials if self._config.http_tls else None,
            )
        except BaseException:
            await self._server.close()
            raise
        self.http_address = self._http.address
        try:
            await self._leadership.start(self.address)
        except BaseException:
            await self._server.close()
            await asyncio.to_thread(self._http.close)
            raise
        self._ticker = loop.create_task(self._tick(), name="coordinator-ticks")
        self.health.watch("election", self._leadership.failure)
        self.health.set_ready(self._ready_sentence)
        logger.info("coordinator %s listens at %s, http at %s", self.incarnation, self.address, self.http_address)

    async def close(self) -> None:
        """Stop serving; nothing is left running."""
        self.health.set_unready("ending")
        self.health.watch("election", lambda: "")
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)
        await self._leadership.close()
        self._cancel_evaluation()
        await self._server.close()
        await asyncio.to_thread(self._http.close)

    def adopt(self, config: CoordinatorConfig) -> None:
        """Use other settings from now on, of those that may change while it runs."""
        logs.configure(level=config.log_level, form=config.log_format, component="coordinator")
        self._config = config
        self.metrics.set_config(config)
        self._policy = policy_of(config)
        self._gauges.adopt(self._policy)
        if self._core is not None:
            self._core.adopt(self._policy)
            self._evaluate()

    def sentence(self) -> str:
        """The state of the cluster, for ``systemctl status``."""
        core = self._core
        if core is None:
            return self._ready_sentence()
        nodes = Counter(node.liveness for node in core.nodes.nodes.values())
        counts = ", ".join(f"{nodes[liveness]} {liveness.value}" for liveness in Liveness if nodes[liveness])
        seen = [(state.evaluation, run) for run, state in core.runs.items() if state.evaluation is not None]
        seen.sort(key=lambda item: (item[0].spares, item[1]))  # the weakest first
        runs = [
            f"{run} protected at step {found.protected_step}, {found.spares} more losses survivable"
            for found, run in seen
        ]
        more = [f"{len(runs) - MAX_NAMED_RUNS} more runs"] if len(runs) > MAX_NAMED_RUNS else []
        return "; ".join([f"nodes: {counts or 'none'}", *runs[:MAX_NAMED_RUNS], *more])

    # -- leading ------------------------------------------------------------------------------------------------------

    @property
    def core(self) -> Coordinator:
        """The core that decides. Raises NotLeaderError if this coordinator does not lead (any more)."""
        if not self._leadership.may_act() or self._core is None:
            raise self._leadership.not_leading()
        return self._core

    def _lead(self, term: int) -> None:
        """A term begins: a fresh core, with an incarnation of its own, as each term counts generations anew."""
        now_s = self._clock.monotonic_s()
        self._core = Coordinator(
            self._policy,
            new_incarnation() if term else self.incarnation,
            now_s=now_s,
            term=term,
            settle_leases=ELECTED_SETTLE_LEASES if term else 1.0,
            unix_offset_s=self._offset_s,
        )
        if term:
            message = f"the coordinator at {self._leadership.address} leads, term {term}"
            self._core.timeline.add(now_s, "", "leads", message)

    def _step_down(self, reason: str) -> None:
        """A term is over: nothing more is decided or sent, and every stream ends with the address of the new leader."""
        self._core = self._heard_s = None
        self._cancel_evaluation()
        self._half_recorded.clear()
        self._gauges.close()
        self._server.notify()

    def _ready_sentence(self) -> str:
        if self._leadership.is_leading():
            return f"ready: coordinates at {self.address}"
        return f"ready: stands by at {self.address}; {self._leadership.leader() or 'nobody known'} leads"

    # -- what the server serves ---------------------------------------------------------------------------------------

    def observe(self, report: NodeReport) -> None:
        now_s, core = self._clock.monotonic_s(), self.core
        self._heard_s = now_s
        self._gauges.note_report(report, core.nodes, now_s)
        core.observe(report, now_s)
        if faults.is_set("recorded_on_some"):
            self._reach_partial_records()
        if core.has_observed:
            self._evaluate_soon()

    def suspect(self, node: str, incarnation: str) -> None:
        if self._core is not None:
            self._core.suspect(node, incarnation)
            self._evaluate_soon()

    def desired(self, node: str) -> NodeDesired:
        return self.core.desired(node)

    def status(self, *, is_brief: bool = False) -> dict[str, Any]:
        return self._document_of(self.core, is_brief=is_brief)

    def forget(self, run: str) -> None:
        self.core.forget(run)
        self._evaluate()

    def distrust(self, run: str, step: int, reason: str) -> str:
        core = self.core
        message = core.distrust(run, step, reason)
        self._spread(core)
        return message

    def drain(self, node: str, *, undo: bool) -> DrainVerdict:
        core = self.core
        verdict = core.drain(node, undo=undo)
        self._spread(core)
        return verdict

    def locate(self, run: str, step: int) -> Located:
        return self.core.locate(run, step)

    def trust(self, run: str) -> int:
        count = self.core.trust(run)
        self._evaluate()
        return count

    # -- driving the core ---------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        expiry = ExpiryWatch(self._credentials, self.metrics.set_expiry)
        while True:
            self.health.beat("the decisions")
            expiry.look()
            due_s = self._clock.monotonic_s() + self._config.lease_s / 6
            await asyncio.sleep(self._config.lease_s / 6)
            now_s = self._clock.monotonic_s()
            away_s = max(0.0, now_s - due_s)  # frozen or busy: what came meanwhile is read after this
            if self._heard_s is not None:
                self._heard_s = min(now_s, self._heard_s + away_s)
            if self._heard_s is not None and now_s - self._heard_s > SILENT_LEASES * self._config.lease_s:
                self._heard_s = None
                self._leadership.resign("no node reports any more; they may reach another coordinator")
            if self._leadership.may_act() and self._core is not None:
                self._core.tick(now_s, away_s=away_s)
                rest_s = min(self._config.lease_s, IDLE_FACTOR * self._cost_s)
                if self._core.has_observed or now_s >= self._evaluated_s + rest_s:
                    self._evaluate_soon()

    def _evaluate(self) -> None:
        self._cancel_evaluation()
        begun_s = self._clock.monotonic_s()
        if self._leadership.may_act() and self._core is not None and self._core.evaluate():
            self._spread(self._core)
        self._evaluated_s = self._clock.monotonic_s()
        self._cost_s = self._evaluated_s - begun_s

    def _cancel_evaluation(self) -> None:
        if self._evaluation is not None:
            self._evaluation.cancel()
            self._evaluation = None

    def _spread(self, core: Coordinator) -> None:
        """Tell people and nodes what the core has decided."""
        for event in core.take_events():
            self._log_event(event)
            if event.kind == "evaluation_failed" and event.run in core.faults:
                logger.error("run %s: its evaluation failed", event.run, exc_info=core.faults[event.run])
        self._gauges.update(core, now_s=self._clock.monotonic_s(), unix_s=self._clock.unix_s())
        if core.has_changed:
            self._server.notify()

    def _log_event(self, event: Event) -> None:
        """Log an event once; ``decided`` is where a test may stop the world before anything is sent."""
        level = logging.DEBUG if event.kind in FREQUENT_KINDS else logging.INFO
        if event.kind in WARNING_KINDS:
            level = logging.WARNING
        elif event.kind in ERROR_KINDS:
            level = logging.ERROR
        logger.log(level, "%s%s: %s", f"run {event.run}: " if event.run else "", event.kind, event.message)
        self._gauges.count(event)
        if event.kind == "decided":
            faults.reach("decided", run=event.run)

    def _evaluate_soon(self) -> None:
        """Evaluate in a moment; the costlier that is, the more of what happens is taken together."""
        if self._evaluation is None:
            rest_s = min(self._config.lease_s / 3, REST_FACTOR * self._cost_s)
            wait_s = max(COALESCE_S, self._evaluated_s + rest_s - self._clock.monotonic_s())
            self._evaluation = asyncio.get_running_loop().call_later(wait_s, self._evaluate)

    def _reach_partial_records(self) -> None:
        for run, decision_id in self.core.partly_recorded().items():
            if decision_id not in self._half_recorded:
                self._half_recorded.add(decision_id)
                faults.reach("recorded_on_some", run=run)

    def _routes(self, loop: asyncio.AbstractEventLoop) -> dict[str, Route]:
        whole = in_turns(made_in_loop(loop, lambda: self._document(is_brief=False)))
        brief = made_in_loop(loop, lambda: self._document(is_brief=True))
        return daemon_routes(self.health, self.metrics.registry, whole) | page_routes(brief)

    def _document(self, *, is_brief: bool) -> dict[str, Any]:
        """As of now; a standby, which knows no nodes and runs, has all fields too."""
        now_s, offset_s = self._clock.monotonic_s(), self._offset_s
        nothing = Coordinator(self._policy, self.incarnation, now_s=now_s, unix_offset_s=offset_s)
        core = self._core if self._leadership.may_act() else None
        return self._document_of(core or nothing, is_brief=is_brief)

    def _document_of(self, core: Coordinator, *, is_brief: bool) -> dict[str, Any]:
        document = status_document(core, self._clock.monotonic_s(), is_brief=is_brief)
        return document | {"leader": self._leadership.document()}
