"""Periodic work of a node: sessions without a connection, files that others deleted, gauges; and its health checks.

The loss of a coordinator or a peer is not a failure of this daemon: a restart would not bring them back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from backstay.errors import BackstayError
from backstayd.node.coders import Coders
from backstayd.node.node_state import NodeState
from backstayd.node.reconcile.reconciler import Reconciler
from backstayd.node.trainers.sessions import Sessions
from backstayd.node.trainers.users import drop_unused_names
from backstayd.security.credentials import ExpiryWatch
from backstayd.security.refusals import Refusals
from backstayd.store import remove
from backstayd.store.record_files import make_directory
from backstayd.telemetry.health import Health
from backstayd.telemetry.heartbeat_margin import LeastMargin

logger = logging.getLogger(__name__)
_grown = Refusals(logger)


def watch(health: Health, reconciler: Reconciler, coders: Coders, serving: asyncio.Task[None]) -> None:
    """Report the daemon dead once it can no longer reconcile, start coders or accept trainers."""

    def reconciling() -> str:
        owed_since_s = reconciler.owed_since_s
        silent_s = health.monotonic_s() - owed_since_s if owed_since_s else 0.0
        return f"no reconcile pass succeeded for {silent_s:.1f} s" if silent_s > health.bound_s else ""

    def accepting() -> str:
        return "trainers are no longer accepted" if serving.done() else ""

    health.watch("reconcile", reconciling)
    health.watch("coders", lambda: coders.pool.failure)
    health.watch("socket", accepting)


class NodeGauges:
    """Metrics that are read off the node, and how close the coordinator's answers come to the lease."""

    def __init__(self, node: NodeState) -> None:
        self._node = node
        self._margin = LeastMargin(node.lease_s)
        self._answered_s: float | None = None

    def note_answer(self) -> None:
        """The coordinator answered."""
        now_s = self._node.clock.monotonic_s()
        if self._answered_s is not None:
            self._margin.note(self._node.lease_s - (now_s - self._answered_s), now_s)
        self._answered_s = now_s

    def note_lost(self) -> None:
        """The connection is lost: the next answer is the first of another one."""
        self._margin.note(0.0, self._node.clock.monotonic_s())
        self._answered_s = None

    def update(self, sessions: Sessions) -> None:
        """Set the gauges; drops the series of runs that are gone from this node."""
        node = self._node
        metrics, store = node.metrics, node.store
        for use, size_bytes in store.used_by().items():
            metrics.memory_used_bytes.labels(use=use).set(size_bytes)
        metrics.memory_capacity_bytes.set(store.capacity_bytes)
        metrics.memory_free_bytes.set(store.free_bytes)
        metrics.memory_quota_bytes.set(store.quota_bytes)
        metrics.coordinator_connected.set(node.link.is_connected)
        metrics.node_draining.set(node.drain.is_draining)
        metrics.node_lease_margin_seconds.set(self._margin.least_s(node.clock.monotonic_s()))
        metrics.peers.set(sum(1 for name in node.peers if name != node.identity.name))
        metrics.keep_runs({*node.store.runs, *node.desired, *(session.run for session in sessions)})


async def maintain(
    node: NodeState,
    sessions: Sessions,
    coders: Coders,
    *,
    gauges: NodeGauges,
    health: Health,
    expiry: ExpiryWatch,
    on_lost: Callable[[BackstayError], None],
) -> None:
    """Run several times a lease, until cancelled. ``on_lost`` is called when the memory directory was taken away."""
    seen_restarts = 0
    while True:
        health.beat("the maintenance")
        sessions.end_lost()
        if (problem := node.store.why_lost()) is not None:
            on_lost(problem)
            return
        drop_unused_names(node.store, {session.run for session in sessions} | set(node.desired))
        _look_for_files(node)
        gauges.update(sessions)
        expiry.look()
        node.metrics.coder_restarts.inc(coders.pool.restart_count - seen_restarts)
        seen_restarts = coders.pool.restart_count
        await asyncio.sleep(node.lease_s / 6)


def _look_for_files(node: NodeState) -> None:
    directory = node.store.memory_dir
    try:
        make_directory(directory)
        vanished = remove.drop_vanished(node.store)
    except (BackstayError, OSError) as error:
        logger.error("cannot check the files in %s: %s", directory, error)
        return
    for who, sentence in node.store.slots.cut_back():
        node.timeline.add("grown", "", sentence)
        _grown.note(sentence, cause=who, level=logging.ERROR)
    if vanished:
        logger.error("others deleted %d files from %s: %s", len(vanished), directory, ", ".join(vanished[:5]))
        node.changed()
