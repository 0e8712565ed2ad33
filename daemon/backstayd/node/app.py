"""The node daemon as a process: makes its parts, runs them in one event loop, ends them in reverse order.

On SIGTERM everything in memory stays where it is; the next daemon adopts it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

from backstay import __version__
from backstay.errors import BackstayError, ConfigError
from backstay.ids import new_incarnation
from backstayd.addresses import join_address, split_address
from backstayd.change_signal import Signal
from backstayd.clock import Clock
from backstayd.coder.jobs import CoderEvent
from backstayd.config.reload import Reloader
from backstayd.config.schema import NodeConfig
from backstayd.core.messages.desired import NodeDesired
from backstayd.core.messages.report import NodeIdentity
from backstayd.node import job_metrics
from backstayd.node.coders import Coders
from backstayd.node.drain_state import Drain
from backstayd.node.maintenance import NodeGauges, maintain, watch
from backstayd.node.node_state import NodeState, Timeline
from backstayd.node.reconcile.durable_jobs import DurableRecords
from backstayd.node.reconcile.memory_jobs import note_stored
from backstayd.node.reconcile.quarantine import BadSources
from backstayd.node.reconcile.reconciler import Reconciler
from backstayd.node.report import Reporter, ready_sentence, status_sentence
from backstayd.node.restores.chunks import Chunks
from backstayd.node.restores.read_only_access import Visits
from backstayd.node.trainers.listener import listen
from backstayd.node.trainers.requests import Requests
from backstayd.node.trainers.server import TrainerServer
from backstayd.node.trainers.sessions import Sessions
from backstayd.process import DaemonProcess
from backstayd.security.credentials import Credentials, ExpiryWatch, load_credentials
from backstayd.store.store import Store
from backstayd.telemetry import logs
from backstayd.telemetry.health import Health
from backstayd.telemetry.http import start_http
from backstayd.telemetry.metrics import NodeMetrics
from backstayd.telemetry.routes import daemon_routes, made_in_loop
from backstayd.transport.link import CoordinatorLink

logger = logging.getLogger(__name__)


def run(config: NodeConfig, load: Callable[[], NodeConfig]) -> int:
    """Run the daemon until SIGTERM or SIGINT; returns 0. ``load`` reads the settings again, at SIGHUP.

    Raises:
        ConfigError: a directory, socket or port cannot be used.
    """
    os.umask(0o077)
    return asyncio.run(_main(config, load))


async def _main(config: NodeConfig, load: Callable[[], NodeConfig]) -> int:
    process = DaemonProcess()
    async with contextlib.AsyncExitStack() as stack:
        async with process.starting(f"adopting the contents of {config.memory_dir}"):
            node = await stack.enter_async_context(start_node(config, on_lost=process.give_up))
        reload = Reloader(config, load=load, apply=lambda settings: _adopt(settings, node))
        await process.serve(node.health, status=lambda: status_sentence(node.state), reload=reload)
        logger.info("node %s stops; its snapshots stay in %s", config.name, config.memory_dir)
    return 0


class Node:
    """The parts of a node, made in the order in which they need each other; :func:`start_node` starts those that run."""

    def __init__(self, config: NodeConfig, store: Store, bulk: socket.socket, credentials: Credentials | None) -> None:
        self.state = state = _make_state(config, store, bulk, credentials)
        self.health = Health(lease_s=config.lease_s)
        self.gauges = NodeGauges(state)
        self.sessions = Sessions(state)
        durable, bad_sources = DurableRecords(state), BadSources(state)
        self.coders = Coders(
            config,
            incarnation=store.incarnation,
            bulk=bulk,
            on_event=functools.partial(_on_coder_event, state, durable),
            on_result=functools.partial(job_metrics.note_job, state.metrics),
            credentials=credentials,
        )
        chunks = Chunks(state, self.coders, bad_sources.quarantine)
        self.reconciler = Reconciler(state, self.sessions, self.coders, chunks, bad_sources, durable)
        self.reporter = Reporter(state, self.sessions, self.reconciler)
        self.server = TrainerServer(
            state,
            self.sessions,
            requests=Requests(state, self.sessions, chunks, self.reconciler.staging),
            visits=Visits(state, chunks),
            document=self.reporter.document,
        )
        self.link = CoordinatorLink(
            config.coordinator,
            report=self.reporter.report,
            on_desired=self._on_desired,
            lease_s=config.lease_s,
            on_state=self._on_link,
            credentials=credentials,
            state=state.link,
            changed=state.report_due,
        )

    def _on_desired(self, desired: NodeDesired) -> None:
        self.gauges.note_answer()
        if desired.has_storage:
            self.coders.warm_up_storage()
        self.reconciler.on_desired(desired, self.link.answered_s)

    def _on_link(self, is_connected: bool) -> None:
        if not is_connected:
            self.gauges.note_lost()
        verb = "connected to" if is_connected else "lost"
        self.state.timeline.add("coordinator", "", f"{verb} the coordinator at {self.state.link.address}")
        self.state.waiters.notify()


def _adopt(settings: NodeConfig, node: Node) -> None:
    """Apply the settings that may change while the daemon runs."""
    node.state.store.set_quota(settings.quota_bytes)
    node.state.store.user_quota_bytes = settings.user_quota_bytes
    logs.configure(level=settings.log_level, form=settings.log_format, component=f"node {settings.name}")
    node.state.metrics.set_config(settings)
    node.state.changed()


@contextlib.asynccontextmanager
async def start_node(
    config: NodeConfig, *, on_lost: Callable[[BackstayError], None] = lambda error: None
) -> AsyncIterator[Node]:
    """A running node; its parts are ended in reverse order. ``on_lost`` is called when its memory was taken away."""
    loop, credentials = asyncio.get_running_loop(), load_credentials(config)
    async with contextlib.AsyncExitStack() as stack:
        store = await asyncio.to_thread(
            Store,
            config.memory_dir,
            incarnation=new_incarnation(),
            quota_bytes=config.quota_bytes,
            user_quota_bytes=config.user_quota_bytes,
            must_be_tmpfs=True,
            reader_wait_s=config.lease_s,
        )
        stack.callback(store.close)
        bulk = stack.enter_context(_bulk_socket(config.bulk))
        listener = stack.enter_context(listen(config.socket, group=config.socket_group))
        stack.callback(config.socket.unlink, missing_ok=True)
        node = Node(config, store, bulk, credentials)
        routes = daemon_routes(node.health, node.state.metrics.registry, made_in_loop(loop, node.reporter.document))
        http = start_http(config.http, routes, credentials=credentials if config.http_tls else None)
        stack.push_async_callback(asyncio.to_thread, http.close)
        await _start_parts(node, config, stack)
        _start_loops(node, listener, stack, on_lost)
        logger.info(
            "node %s (%s) holds %s, serves trainers at %s, peers at %s, http at %s",
            config.name, store.incarnation, config.memory_dir, config.socket, node.state.identity.bulk_address,
            http.address,
        )  # fmt: skip
        yield node


async def _start_parts(node: Node, config: NodeConfig, stack: contextlib.AsyncExitStack) -> None:
    """Start coders, reconciler and the connection to the coordinator; ``stack`` ends them."""
    await node.coders.start()
    stack.push_async_callback(node.coders.close)
    node.reconciler.start()
    stack.push_async_callback(node.reconciler.close)
    stack.push_async_callback(node.server.close)
    if config.kubernetes_node:
        unwatch = _watch_cordon(config.kubernetes_node, node.state.drain, asyncio.get_running_loop())
        stack.push_async_callback(asyncio.to_thread, unwatch)
    else:
        node.state.drain.set_cordoned(False)  # kept from a time when the cordon was watched
    node.link.start()
    stack.push_async_callback(node.link.close)


def _start_loops(
    node: Node, listener: socket.socket, stack: contextlib.AsyncExitStack, on_lost: Callable[[BackstayError], None]
) -> None:
    """Serve trainers, maintain the node, and report its health; ``stack`` ends all three."""
    state, health = node.state, node.health
    serving = asyncio.create_task(node.server.serve(listener))
    stack.push_async_callback(_end, serving)
    expiry = ExpiryWatch(state.credentials, state.metrics.set_expiry)
    maintaining = maintain(
        state, node.sessions, node.coders, gauges=node.gauges, health=health, expiry=expiry, on_lost=on_lost
    )
    stack.push_async_callback(_end, asyncio.create_task(maintaining))
    stack.callback(health.set_unready, "ending")
    watch(health, node.reconciler, node.coders, serving)
    health.watch("the connection to the coordinator", node.link.failure)
    health.set_ready(lambda: ready_sentence(state))


def _make_state(config: NodeConfig, store: Store, bulk: socket.socket, credentials: Credentials | None) -> NodeState:
    clock = Clock()
    timeline, report_due = Timeline(clock), Signal()
    metrics = NodeMetrics(version=__version__)
    metrics.set_config(config)
    if credentials is not None:
        metrics.watch_certificates(credentials.ends_unix_s)

    def on_drain(sentence: str) -> None:
        logger.warning("%s", sentence)
        timeline.add("draining", "", sentence)
        report_due.notify()

    return NodeState(
        identity=NodeIdentity(
            name=config.name,
            incarnation=store.incarnation,
            bulk_address=_bound_address(config.bulk, bulk),
            domain=config.domain,
            version=__version__,
        ),
        lease_s=config.lease_s,
        coordinator=config.coordinator,
        credentials=credentials,
        store=store,
        timeline=timeline,
        metrics=metrics,
        clock=clock,
        drain=Drain(config.memory_dir, incarnation=store.incarnation, on_change=on_drain),
        report_due=report_due,
    )


def _on_coder_event(state: NodeState, durable: DurableRecords, event: CoderEvent) -> None:
    if event.kind == "traffic":
        job_metrics.note_traffic(state.metrics, event)
    elif event.kind == "shard_uploading":
        durable.note_progress(event)
    else:
        note_stored(state, event)


def _watch_cordon(name: str, drain: Drain, loop: asyncio.AbstractEventLoop) -> Callable[[], None]:
    """Drain the node while its Kubernetes node is cordoned; returns a function that stops watching."""
    try:
        from backstayd.kubernetes_cordon import CordonWatch
    except ImportError as error:
        raise ConfigError(
            f"kubernetes_node = {name} needs the package kubernetes: pip install 'backstay[kubernetes]' ({error})",
            reason="missing_package",
        ) from None

    def on_answer(is_cordoned: bool) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(drain.set_cordoned, is_cordoned)

    watch = CordonWatch(name, on_answer=on_answer)
    watch.start()
    return watch.close


async def _end(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _bulk_socket(address: str) -> socket.socket:
    host, port = split_address(address)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(
            f"cannot serve peers on {address}: {error.strerror or error}; choose another with --bulk",
            reason="bind_failed",
        ) from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(128)
    except OSError as error:
        sock.close()
        why = "another process uses it" if error.errno == errno.EADDRINUSE else (error.strerror or str(error))
        raise ConfigError(
            f"cannot serve peers on {address}: {why}; choose another with --bulk", reason="bind_failed"
        ) from error
    return sock


def _bound_address(address: str, sock: socket.socket) -> str:
    host, _ = split_address(address)
    return join_address(host, sock.getsockname()[1])
