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
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any, Final

from backstay import __version__
from backstay.errors import BackstayError, ConfigError, UnavailableError
from backstay.ids import new_incarnation
from backstayd.addresses import join_address, split_address
from backstayd.clock import Clock
from backstayd.coder.jobs import CoderEvent
from backstayd.coder.pool import CoderPool
from backstayd.config.reload import Reloader
from backstayd.config.schema import NodeConfig
from backstayd.core.messages.desired import NodeDesired
from backstayd.core.messages.report import NodeIdentity
from backstayd.node import gauges
from backstayd.node.drain_state import Drain
from backstayd.node.durable_coder import StorageCoder
from backstayd.node.gauges import NodeGauges
from backstayd.node.health import ready_sentence, status_sentence, watch
from backstayd.node.node_state import LinkState, NodeContext
from backstayd.node.reconcile.durable import Storing
from backstayd.node.reconcile.reconciler import Reconciler
from backstayd.node.report import Reporter
from backstayd.node.restores.chunks import Offers
from backstayd.node.signal import Bell
from backstayd.node.timeline import Timeline
from backstayd.node.trainers.listener import listen
from backstayd.node.trainers.sessions import Sessions
from backstayd.node.trainers.user_limits import drop_unused_names
from backstayd.process import DaemonProcess
from backstayd.security.configured import load_credentials
from backstayd.security.expiry import ExpiryWatch
from backstayd.security.refusals import Refusals
from backstayd.store import remove
from backstayd.store.record_files import make_directory
from backstayd.store.store import Store
from backstayd.telemetry import logs
from backstayd.telemetry.health import Health
from backstayd.telemetry.http import start_http
from backstayd.telemetry.metrics import NodeMetrics
from backstayd.telemetry.routes import Route, document_route, metrics_route, probe_route
from backstayd.transport.link import CoordinatorLink

logger = logging.getLogger(__name__)
_grown = Refusals(logger)

DOCUMENT_TIMEOUT_S: Final = 2.0


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
        await process.serve(node.health, status=lambda: status_sentence(node.context), reload=reload)
        logger.info("node %s ends; what it holds stays in %s", config.name, config.memory_dir)
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """The parts of a running node."""

    context: NodeContext
    sessions: Sessions
    reconciler: Reconciler
    reporter: Reporter
    storing: Storing
    pool: CoderPool
    health: Health


def _adopt(settings: NodeConfig, node: Node) -> None:
    """Bring settings into force that may change while it runs."""
    node.context.store.set_quota(settings.quota_bytes)
    node.context.store.user_quota_bytes = settings.user_quota_bytes
    logs.configure(level=settings.log_level, form=settings.log_format, component=f"node {settings.name}")
    node.context.metrics.set_config(settings)
    node.context.changed()


@contextlib.asynccontextmanager
async def start_node(
    config: NodeConfig, *, on_lost: Callable[[BackstayError], None] = lambda error: None
) -> AsyncIterator[Node]:
    """All parts of a node, running; they are ended in reverse order. ``on_lost`` hears when its memory was taken away."""
    loop, clock, incarnation = asyncio.get_running_loop(), Clock(), new_incarnation()
    credentials = load_credentials(config)
    async with contextlib.AsyncExitStack() as stack:
        store = await asyncio.to_thread(
            Store,
            config.memory_dir,
            incarnation=incarnation,
            quota_bytes=config.quota_bytes,
            user_quota_bytes=config.user_quota_bytes,
            must_be_tmpfs=True,
            reader_wait_s=config.lease_s,
        )
        stack.callback(store.close)
        bulk = stack.enter_context(_bulk_socket(config.bulk))
        listener = stack.enter_context(listen(config.socket, group=config.socket_group))
        stack.callback(config.socket.unlink, missing_ok=True)
        identity = NodeIdentity(
            name=config.name,
            incarnation=incarnation,
            bulk_address=_bound_address(config.bulk, bulk),
            domain=config.domain,
            version=__version__,
        )
        context = NodeContext(
            identity=identity,
            lease_s=config.lease_s,
            store=store,
            bell=Bell(),
            timeline=Timeline(clock),
            metrics=NodeMetrics(version=__version__),
            clock=clock,
            desired={},
            drain=Drain(config.memory_dir, incarnation=incarnation),
            coordinator_address=config.coordinator,
            credentials=credentials,
        )
        context.metrics.set_config(config)
        if credentials is not None:
            context.metrics.watch_certificates(credentials.ends_unix_s)
        node_gauges = NodeGauges(context.metrics, lease_s=config.lease_s, now_s=clock.monotonic_s)
        on_result = functools.partial(gauges.note_job, context.metrics)
        sessions = Sessions(context)
        reconciler = Reconciler(context, sessions)
        offers = context.offers = Offers(context, reconciler)
        storage_coder = StorageCoder(config, incarnation, bulk, on_result, credentials=credentials)
        storing = Storing(context, storage_coder.run, reconciler.quarantine)
        storage_coder.on_event = lambda event: _on_storage_event(event, reconciler, storing)
        reporter = Reporter(context, sessions, reconciler, storing)
        context.progress, context.document = reconciler.progress, reporter.document
        context.offer_due, reconciler.tidy = reconciler.offer_due, offers.tidy
        health = Health(lease_s=config.lease_s)
        http = start_http(
            config.http,
            _routes(context, health, document=lambda: _from_thread(loop, reporter)),
            credentials=credentials if config.http_tls else None,
        )
        stack.push_async_callback(asyncio.to_thread, http.close)
        pool = CoderPool(
            count=config.coders,
            memory_dir=config.memory_dir,
            incarnation=incarnation,
            listen_socket=bulk,
            on_event=lambda event: _on_coder_event(event, context, reconciler),
            on_result=on_result,
            credentials=credentials,
        )
        await pool.start()
        stack.push_async_callback(pool.close)
        stack.push_async_callback(storage_coder.close)
        reconciler.attach_pool(pool, storage_coder.run)
        offers.attach_pool(pool, storage_coder.run)
        stack.push_async_callback(reconciler.close)
        stack.push_async_callback(storing.close)
        stack.push_async_callback(sessions.close)
        link = CoordinatorLink(
            config.coordinator,
            report=reporter.report,
            on_desired=lambda desired: _on_desired(
                desired, reconciler, storing, storage_coder, node_gauges, answered_s=link.answered_s
            ),
            lease_s=config.lease_s,
            on_state=lambda is_connected: _on_link(context, node_gauges, link.address, is_connected=is_connected),
            credentials=credentials,
        )
        context.is_coordinator_connected = lambda: link.is_connected
        context.coordinator = lambda: LinkState(address=link.address, error=link.last_error)
        context.notify, context.kick = link.notify, lambda: _kick(reconciler, storing)
        context.drain.on_change = lambda sentence: _on_drain(context, sentence)
        if config.kubernetes_node:
            unwatch = _watch_cordon(config.kubernetes_node, context, loop)
            stack.push_async_callback(asyncio.to_thread, unwatch)
        else:
            context.drain.set_cordoned(False)  # remembered of a time when somebody looked
        link.start()
        stack.push_async_callback(link.close)
        serving = asyncio.create_task(sessions.serve(listener))
        for task in (
            serving,
            asyncio.create_task(
                _maintain(
                    context,
                    sessions,
                    pool,
                    health=health,
                    update_gauges=lambda: node_gauges.update(context, sessions, reconciler),
                    expiry=ExpiryWatch(credentials, context.metrics.set_expiry),
                    on_lost=on_lost,
                    period_s=config.lease_s / 6,
                )
            ),
        ):
            stack.push_async_callback(_end, task)
        stack.callback(health.set_unready, "ending")
        watch(health, reconciler, pool, serving)
        health.watch("the line to the coordinator", link.failure)
        health.set_ready(lambda: ready_sentence(context))
        logger.info(
            "node %s (%s) holds %s, serves trainers at %s, peers at %s, http at %s",
            identity.name, incarnation, config.memory_dir, config.socket, identity.bulk_address, http.address,
        )  # fmt: skip
        yield Node(
            context=context,
            sessions=sessions,
            reconciler=reconciler,
            reporter=reporter,
            storing=storing,
            pool=pool,
            health=health,
        )


def _on_desired(
    desired: NodeDesired,
    reconciler: Reconciler,
    storing: Storing,
    storage_coder: StorageCoder,
    node_gauges: NodeGauges,
    *,
    answered_s: float,
) -> None:
    node_gauges.note_answer()
    reconciler.on_desired(desired)
    if desired.has_storage:
        storage_coder.warm_up()
    storing.on_desired(desired, answered_s)


def _on_coder_event(event: CoderEvent, context: NodeContext, reconciler: Reconciler) -> None:
    if event.kind == "traffic":
        gauges.note_traffic(context.metrics, event)
    else:
        reconciler.on_event(event)


def _on_storage_event(event: CoderEvent, reconciler: Reconciler, storing: Storing) -> None:
    if event.kind == "shard_uploading":
        storing.on_event(event)
    else:
        reconciler.on_event(event)


def _kick(reconciler: Reconciler, storing: Storing) -> None:
    reconciler.kick()
    storing.kick()


def _on_link(context: NodeContext, node_gauges: NodeGauges, address: str, *, is_connected: bool) -> None:
    if not is_connected:
        node_gauges.note_lost()
    word = "connected to" if is_connected else "lost"
    context.timeline.add("coordinator", "", f"{word} the coordinator at {address}")
    context.bell.ring()


def _watch_cordon(name: str, context: NodeContext, loop: asyncio.AbstractEventLoop) -> Callable[[], None]:
    """The node drains while its Kubernetes node is cordoned; returns what ends that."""
    try:
        from backstayd.kubernetes_cordon import CordonWatch
    except ImportError as error:
        raise ConfigError(
            f"kubernetes_node = {name} needs the package kubernetes: pip install 'backstay[kubernetes]' ({error})",
            reason="missing_package",
        ) from None

    def tell(is_cordoned: bool) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(context.drain.set_cordoned, is_cordoned)

    watch = CordonWatch(name, on_answer=tell)
    watch.start()
    return watch.close


def _on_drain(context: NodeContext, sentence: str) -> None:
    logger.warning("%s", sentence)
    context.timeline.add("draining", "", sentence)
    context.notify()


def _routes(context: NodeContext, health: Health, *, document: Callable[[], dict[str, Any]]) -> dict[str, Route]:
    return {
        "/livez": probe_route(health.not_alive, well=health.alive),
        "/metrics": metrics_route(context.metrics.registry),
        "/readyz": probe_route(health.not_ready, well=health.ready),
        "/status.json": document_route(document),
    }


async def _maintain(
    context: NodeContext,
    sessions: Sessions,
    pool: CoderPool,
    *,
    health: Health,
    update_gauges: Callable[[], None],
    expiry: ExpiryWatch,
    on_lost: Callable[[BackstayError], None],
    period_s: float,
) -> None:
    """What no event says: sessions without connection, files that others deleted, gauges, coders that were restarted."""
    seen_restarts = 0
    while True:
        health.beat("the maintenance")
        sessions.end_lost()
        if (problem := context.store.why_lost()) is not None:
            on_lost(problem)
            return
        drop_unused_names(context.store, sessions, set(context.desired))
        _look_for_files(context)
        update_gauges()
        expiry.look()
        context.metrics.coder_restarts.inc(pool.restart_count - seen_restarts)
        seen_restarts = pool.restart_count
        await asyncio.sleep(period_s)


def _look_for_files(context: NodeContext) -> None:
    directory = context.store.memory_dir
    try:
        make_directory(directory)
        vanished = remove.drop_vanished(context.store)
    except (BackstayError, OSError) as error:
        logger.error("cannot look for what should lie in %s: %s", directory, error)
        return
    for sentence in context.store.slots.cut_back():
        context.timeline.add("grown", "", sentence)
        _grown.note(sentence, cause=sentence.partition(" added ")[0], level=logging.ERROR)
    if vanished:
        logger.error("%d files were deleted from %s by others: %s", len(vanished), directory, ", ".join(vanished[:5]))
        context.changed()


async def _end(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _from_thread(loop: asyncio.AbstractEventLoop, reporter: Reporter) -> dict[str, Any]:
    """The status document, made in the loop, for a thread of the HTTP server."""

    async def make() -> dict[str, Any]:
        return reporter.document()

    future = asyncio.run_coroutine_threadsafe(make(), loop)
    try:
        return future.result(DOCUMENT_TIMEOUT_S)
    except FutureTimeoutError as error:
        future.cancel()
        raise UnavailableError(f"the daemon's loop did not answer within {DOCUMENT_TIMEOUT_S:g} s") from error


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
