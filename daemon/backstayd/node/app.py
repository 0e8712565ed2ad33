"""The node daemon as a process: puts its parts together, runs them in one loop, ends them in order.

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
from dataclasses import dataclass
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
        async with process.starting(f"adopting what lies in {config.memory_dir}"):
            node = await stack.enter_async_context(start_node(config, on_lost=process.give_up))
        reload = Reloader(config, load=load, apply=lambda settings: _adopt(settings, node))
        await process.serve(node.health, status=lambda: status_sentence(node.state, config.coordinator), reload=reload)
        logger.info("node %s ends; what it holds stays in %s", config.name, config.memory_dir)
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """The parts of a node, made in the order in which they need each other; what runs is started by :func:`start_node`."""

    state: NodeState
    coders: Coders
    sessions: Sessions
    reconciler: Reconciler
    reporter: Reporter
    server: TrainerServer
    gauges: NodeGauges
    health: Health


def _adopt(settings: NodeConfig, node: Node) -> None:
    """Bring settings into force that may change while it runs."""
    node.state.store.set_quota(settings.quota_bytes)
    node.state.store.user_quota_bytes = settings.user_quota_bytes
    logs.configure(level=settings.log_level, form=settings.log_format, component=f"node {settings.name}")
    node.state.metrics.set_config(settings)
    node.state.changed()


@contextlib.asynccontextmanager
async def start_node(
    config: NodeConfig, *, on_lost: Callable[[BackstayError], None] = lambda error: None
) -> AsyncIterator[Node]:
    """All parts of a node, running; they are ended in reverse order. ``on_lost`` is called when its memory was taken away."""
    loop, credentials = asyncio.get_running_loop(), load_credentials(config)
    async with contextlib.AsyncExitStack() as stack:
        store = await _open_store(config)
        stack.callback(store.close)
        bulk = stack.enter_context(_bulk_socket(config.bulk))
        listener = stack.enter_context(listen(config.socket, group=config.socket_group))
        stack.callback(config.socket.unlink, missing_ok=True)
        node = _make_node(config, store, bulk, credentials)
        state, health = node.state, node.health
        http = start_http(
            config.http,
            daemon_routes(health, state.metrics.registry, made_in_loop(loop, node.reporter.document)),
            credentials=credentials if config.http_tls else None,
        )
        stack.push_async_callback(asyncio.to_thread, http.close)
        await node.coders.start()
        stack.push_async_callback(node.coders.close)
        node.reconciler.start()
        stack.push_async_callback(node.reconciler.close)
        stack.push_async_callback(node.server.close)
        if config.kubernetes_node:
            unwatch = _watch_cordon(config.kubernetes_node, state.drain, loop)
            stack.push_async_callback(asyncio.to_thread, unwatch)
        else:
            state.drain.set_cordoned(False)  # remembered of a time when somebody looked
        link = _make_link(config, node, credentials)
        link.start()
        stack.push_async_callback(link.close)
        serving = asyncio.create_task(node.server.serve(listener))
        stack.push_async_callback(_end, serving)
        expiry = ExpiryWatch(credentials, state.metrics.set_expiry)
        maintaining = maintain(
            state, node.sessions, node.coders, gauges=node.gauges, health=health, expiry=expiry, on_lost=on_lost
        )
        stack.push_async_callback(_end, asyncio.create_task(maintaining))
        stack.callback(health.set_unready, "ending")
        watch(health, node.reconciler, node.coders, serving)
        health.watch("the line to the coordinator", link.failure)
        health.set_ready(lambda: ready_sentence(state, config.coordinator))
        logger.info(
            "node %s (%s) holds %s, serves trainers at %s, peers at %s, http at %s",
            config.name, store.incarnation, config.memory_dir, config.socket, state.identity.bulk_address, http.address,
        )  # fmt: skip
        yield node


async def _open_store(config: NodeConfig) -> Store:
    return await asyncio.to_thread(
        Store,
        config.memory_dir,
        incarnation=new_incarnation(),
        quota_bytes=config.quota_bytes,
        user_quota_bytes=config.user_quota_bytes,
        must_be_tmpfs=True,
        reader_wait_s=config.lease_s,
    )


def _make_state(config: NodeConfig, store: Store, bulk: socket.socket) -> NodeState:
    clock = Clock()
    timeline, report_due = Timeline(clock), Signal()
    metrics = NodeMetrics(version=__version__)
    metrics.set_config(config)

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
        store=store,
        timeline=timeline,
        metrics=metrics,
        clock=clock,
        drain=Drain(config.memory_dir, incarnation=store.incarnation, on_change=on_drain),
        report_due=report_due,
    )


def _make_node(config: NodeConfig, store: Store, bulk: socket.socket, credentials: Credentials | None) -> Node:
    state = _make_state(config, store, bulk)
    if credentials is not None:
        state.metrics.watch_certificates(credentials.ends_unix_s)
    durable = DurableRecords(state)
    coders = Coders(
        config,
        incarnation=store.incarnation,
        bulk=bulk,
        on_event=functools.partial(_on_coder_event, state, durable),
        on_result=functools.partial(job_metrics.note_job, state.metrics),
        credentials=credentials,
    )
    sessions = Sessions(state)
    bad_sources = BadSources(state)
    chunks = Chunks(state, coders, bad_sources.quarantine)
    reconciler = Reconciler(
        state, sessions=sessions, coders=coders, chunks=chunks, bad_sources=bad_sources, durable=durable
    )
    reporter = Reporter(
        state,
        coordinator=config.coordinator,
        sessions=sessions,
        reconciler=reconciler,
        chunks=chunks,
        bad_sources=bad_sources,
        durable=durable,
    )
    server = TrainerServer(
        store,
        sessions,
        requests=Requests(state, sessions, chunks, reconciler.staging),
        visits=Visits(state, chunks, coordinator=config.coordinator, credentials=credentials),
        document=reporter.document,
    )
    return Node(
        state=state,
        coders=coders,
        sessions=sessions,
        reconciler=reconciler,
        reporter=reporter,
        server=server,
        gauges=NodeGauges(state),
        health=Health(lease_s=config.lease_s),
    )


def _on_coder_event(state: NodeState, durable: DurableRecords, event: CoderEvent) -> None:
    if event.kind == "traffic":
        job_metrics.note_traffic(state.metrics, event)
    elif event.kind == "shard_uploading":
        durable.note_progress(event)
    else:
        note_stored(state, event)


def _make_link(config: NodeConfig, node: Node, credentials: Credentials | None) -> CoordinatorLink:
    state = node.state

    def on_desired(desired: NodeDesired) -> None:
        node.gauges.note_answer()
        if desired.has_storage:
            node.coders.warm_up_storage()
        node.reconciler.on_desired(desired, link.answered_s)

    def on_state(is_connected: bool) -> None:
        if not is_connected:
            node.gauges.note_lost()
        verb = "connected to" if is_connected else "lost"
        state.timeline.add("coordinator", "", f"{verb} the coordinator at {state.link.address}")
        state.waiters.notify()

    link = CoordinatorLink(
        config.coordinator,
        report=node.reporter.report,
        on_desired=on_desired,
        lease_s=config.lease_s,
        on_state=on_state,
        credentials=credentials,
        state=state.link,
        changed=state.report_due,
    )
    return link


def _watch_cordon(name: str, drain: Drain, loop: asyncio.AbstractEventLoop) -> Callable[[], None]:
    """The node drains while its Kubernetes node is cordoned; returns what ends that."""
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
            f"cannot serve peers on {address}: {error.strerror or error}", reason="bind_failed"
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
