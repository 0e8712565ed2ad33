"""What must go on for a node daemon to be of use, and how it stands, for probes and the service manager. Changes nothing.

A coordinator or a peer that is away is no illness of this daemon: restarting it would not bring them back.
"""

from __future__ import annotations

import asyncio
from typing import Final

from backstayd.coder.pool import CoderPool
from backstayd.node.node_state import NodeContext
from backstayd.node.reconcile.reconciler import Reconciler
from backstayd.telemetry.health import Health
from backstayd.units import format_size

MAX_NAMED_RUNS: Final = 3


def watch(health: Health, reconciler: Reconciler, pool: CoderPool, serving: asyncio.Task[None]) -> None:
    """Count a daemon dead that cannot reconcile, start coders or accept trainers any more."""

    def reconciling() -> str:
        owed_since_s = reconciler.owed_since_s
        silent_s = health.monotonic_s() - owed_since_s if owed_since_s else 0.0
        return f"no pass succeeded for {silent_s:.1f} s" if silent_s > health.bound_s else ""

    def accepting() -> str:
        return "trainers are not accepted any more" if serving.done() else ""

    health.watch("reconcile", reconciling)
    health.watch("coders", lambda: pool.failure)
    health.watch("socket", accepting)


def link_sentence(context: NodeContext) -> str:
    """Whether the coordinator is there."""
    if context.is_coordinator_connected():
        return f"connected to the coordinator at {context.coordinator().address}"
    return f"not connected to the coordinator at {context.coordinator_address}"


def ready_sentence(context: NodeContext) -> str:
    """What ``/readyz`` says of a node that serves."""
    return f"ready: memory adopted, trainers are served; {link_sentence(context)}"


def status_sentence(context: NodeContext) -> str:
    """How it stands, for ``systemctl status``: memory, runs, link."""
    held = f"{format_size(context.store.used_bytes)} of {format_size(context.store.capacity_bytes)} held"
    runs = [
        f"{run.run} {run.redundancy or 'UNPROTECTED'} at step {run.protected_step}"
        for _, run in sorted(context.desired.items())
        if not run.forget
    ]
    more = [f"{len(runs) - MAX_NAMED_RUNS} more runs"] if len(runs) > MAX_NAMED_RUNS else []
    return "; ".join([held, *runs[:MAX_NAMED_RUNS], *more, link_sentence(context)])
