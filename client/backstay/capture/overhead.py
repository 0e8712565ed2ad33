"""What snapshots cost training: sums for the daemon's metrics, and the share of its time that training waits.

Training waits for a slot, and for the copy of what the optimizer is about to change. How often snapshots are taken is the
coordinator's to change, for all ranks at once.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from backstay.protocol import messages

_COSTS: Final = tuple(field.name for field in dataclasses.fields(messages.TrainerCost))
LIMIT: Final = 0.05  # of training's time; above it the coordinator raises the interval
NOISE_S: Final = 0.005  # a shorter mean wait is scheduling noise
SNAPSHOTS: Final = 8  # that the share is taken over
LEAST_SNAPSHOTS: Final = 4  # below which no share is given


class Costs:
    """Sums since the daemon was last sent them; any thread adds. Nothing is lost with a message: sums can be added again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sum = messages.TrainerCost()

    def add(self, cost: messages.TrainerCost) -> None:
        with self._lock:
            sums = {name: getattr(self._sum, name) + getattr(cost, name) for name in _COSTS}
            self._sum = messages.TrainerCost(**sums)

    def take(self) -> messages.TrainerCost:
        """The sums so far, which are reset."""
        with self._lock:
            taken, self._sum = self._sum, messages.TrainerCost()
        return taken


@dataclass(frozen=True, slots=True)
class _Wait:
    at_s: float  # the end of it
    slot_s: float
    copy_s: float


@dataclass(slots=True)
class Waits:
    """The last few fences of one session. The first snapshots are left out: their slots are being allocated."""

    left_out: int
    total_s: float = 0.0
    _waits: deque[_Wait] = field(default_factory=lambda: deque(maxlen=SNAPSHOTS + 1))

    def note(self, *, slot_s: float, copy_s: float, now_s: float) -> float:
        """A fence waited, until ``now_s``. Returns what of it counts."""
        if self.left_out > 0:
            self.left_out -= 1
            return 0.0
        self._waits.append(_Wait(now_s, slot_s, copy_s))
        self.total_s += slot_s + copy_s
        return slot_s + copy_s

    @property
    def share(self) -> float:
        """Of the time of the last few snapshots; 0 before there are enough."""
        counted = list(self._waits)[1:]
        if len(counted) < LEAST_SNAPSHOTS:
            return 0.0
        spent_s = counted[-1].at_s - self._waits[0].at_s
        return min(1.0, sum(wait.slot_s + wait.copy_s for wait in counted) / spent_s) if spent_s > 0 else 0.0

    def warning(self) -> str:
        """The warning for the user when training waits more than it should; "" while it does not."""
        share, counted = self.share, list(self._waits)[1:]
        slot_s = sum(wait.slot_s for wait in counted)
        copy_s = sum(wait.copy_s for wait in counted)
        if share <= LIMIT or slot_s + copy_s <= NOISE_S * len(counted):
            return ""
        period_s = (counted[-1].at_s - self._waits[0].at_s) / len(counted)
        if slot_s >= copy_s:
            cause = "a slot is not free until a newer snapshot is protected, and that takes longer than the steps between two"
            remedy = "more bandwidth between the nodes, more `coders`, less `parity`"
        else:
            cause = "the state is not copied when the optimizer wants to change it"
            remedy = "more cores or memory bandwidth for this process"
        return (
            f"training waits {share:.0%} of its time for snapshots ({(slot_s + copy_s) / len(counted):.2f} of "
            f"{period_s:.2f} s from one to the next): {cause}. The coordinator raises the interval for all ranks until less "
            f"than {LIMIT:.0%} is waited; what would allow more snapshots: {remedy}. See stats().wait_share and "
            "`backstay plan`"
        )
