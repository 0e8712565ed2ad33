"""What snapshots cost the trainer, on its way to the daemon's metrics. Must not measure anything itself."""

from __future__ import annotations

import threading

from backstay.protocol import messages


class Costs:
    """Sums since they were last said; training threads add, the session's thread takes. Nothing is lost when a message is:
    what was taken can be put back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sum = messages.TrainerCost()

    def add(self, cost: messages.TrainerCost) -> None:
        with self._lock:
            self._sum = messages.TrainerCost(
                snapshot_s=self._sum.snapshot_s + cost.snapshot_s,
                fence_s=self._sum.fence_s + cost.fence_s,
                capture_s=self._sum.capture_s + cost.capture_s,
                copied_bytes=self._sum.copied_bytes + cost.copied_bytes,
                kept_bytes=self._sum.kept_bytes + cost.kept_bytes,
                waited_s=self._sum.waited_s + cost.waited_s,
            )

    def take(self) -> messages.TrainerCost:
        """The sums; they begin anew."""
        with self._lock:
            taken, self._sum = self._sum, messages.TrainerCost()
        return taken
