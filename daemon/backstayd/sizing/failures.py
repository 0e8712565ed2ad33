"""How often things fail, how often to save, and what share of the time is then productive. Pure.

Times in seconds, rates per second. The default rates are published figures: Llama 3 405B (The Llama 3 Herd of Models, 2024;
as in Data Center Dynamics' account of it) had 419 unexpected interruptions in 54 days on 16,384 H100 GPUs, eight to a server.
Of them 148 were faulty GPUs, 72 HBM3, 19 GPU SRAM, 17 GPU system processors, 35 network switches and cables, 2 CPUs: hardware
that makes people take a node away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

DAY_S: Final = 86_400.0
LLAMA3_DAYS: Final = 54
LLAMA3_NODES: Final = 16_384 // 8
LLAMA3_INTERRUPTIONS: Final = 419
LLAMA3_HARDWARE: Final = 148 + 72 + 19 + 17 + 35 + 2

# Each hardware fault counts as the loss of a node's memory: too many, for most leave the host up.
NODE_LOSSES_PER_NODE_DAY: Final = LLAMA3_HARDWARE / (LLAMA3_DAYS * LLAMA3_NODES)
TRAINER_FAILURES_PER_NODE_DAY: Final = (LLAMA3_INTERRUPTIONS - LLAMA3_HARDWARE) / (LLAMA3_DAYS * LLAMA3_NODES)
SOURCE: Final = (
    f"Llama 3 405B: {LLAMA3_INTERRUPTIONS} interruptions, {LLAMA3_HARDWARE} of them by hardware, in {LLAMA3_DAYS} days on "
    f"{LLAMA3_NODES} nodes of 8 GPUs"
)


def best_interval_s(*, save_s: float, mean_between_failures_s: float) -> float:
    """Young's interval, sqrt(2 * C * M): C the time a save stops training, M the mean time between failures.

    J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17 (1974); Daly's refinement of 2006
    differs from it by terms of the order of C, which is small here.
    """
    return math.sqrt(2.0 * save_s * mean_between_failures_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Shares of the time, each of them small: saving, recomputing lost steps, and waiting for the restart."""

    saving: float
    recompute: float
    restart: float

    @property
    def goodput(self) -> float:
        """1 - the sum, as in GEMINI's T_wasted = t_ckpt + 1 / (2 f) + t_rtvl, over the time between failures."""
        return max(0.0, 1.0 - self.saving - self.recompute - self.restart)


def losses(*, save_s: float, interval_s: float, failures_per_s: float, restart_s: float) -> Losses:
    """With a save every ``interval_s`` that stops training for ``save_s``, and ``restart_s`` from a failure to training.

    On average a failure loses half an interval, and the save in progress.
    """
    return Losses(
        saving=save_s / interval_s,
        recompute=failures_per_s * (interval_s / 2.0 + save_s),
        restart=failures_per_s * restart_s,
    )


def snapshot_losses(
    *,
    blocked_s: float,
    interval_s: float,
    lag_s: float,
    failures_per_s: float,
    restart_s: float,
    rebuild_s: float,
    node_failures_per_s: float,
) -> Losses:
    """The same for snapshots in memory.

    ``blocked_s`` is how long a snapshot blocks the trainer, ``lag_s`` how long until it is protected: a node lost before that
    takes the newest snapshot with it, so half an interval and the lag are recomputed (a dead trainer loses half an interval).
    A lost node also costs ``rebuild_s``.
    """
    return Losses(
        saving=blocked_s / interval_s,
        recompute=failures_per_s * interval_s / 2.0 + node_failures_per_s * lag_s,
        restart=failures_per_s * restart_s + node_failures_per_s * rebuild_s,
    )
