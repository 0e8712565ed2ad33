"""How often to save, and what share of the time is then productive. Times in seconds, rates per second. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass


def best_interval_s(*, save_s: float, mean_between_failures_s: float) -> float:
    """Young's interval, sqrt(2 * C * M): C the time a save stops training, M the mean time between failures.

    J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17 (1974); Daly's refinement of 2006
    differs from it by terms of the order of C, which is small here.
    """
    return math.sqrt(2.0 * save_s * mean_between_failures_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Shares of the time, each of them small: what saving costs, what is computed again, and waiting for the restart."""

    saving: float
    recompute: float
    restart: float

    @property
    def goodput(self) -> float:
        """1 - the sum, as in GEMINI's T_wasted = t_ckpt + 1 / (2 f) + t_rtvl, over the time between failures."""
        return max(0.0, 1.0 - self.saving - self.recompute - self.restart)


def losses(*, save_s: float, interval_s: float, failures_per_s: float, restart_s: float) -> Losses:
    """With a save every ``interval_s`` that stops training for ``save_s``, and ``restart_s`` from a failure to training.

    A failure finds half an interval undone on average, and the save in progress with it.
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

    ``blocked_s`` is what a snapshot costs the trainer. ``lag_s``: until it is protected; a node that goes before that takes
    the newest with it, so half an interval and the lag are computed again (a dead trainer loses half an interval). A lost
    node costs ``rebuild_s`` besides.
    """
    return Losses(
        saving=blocked_s / interval_s,
        recompute=failures_per_s * interval_s / 2.0 + node_failures_per_s * lag_s,
        restart=failures_per_s * restart_s + node_failures_per_s * rebuild_s,
    )
