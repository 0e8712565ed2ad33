"""One snapshot between snapshot() and its commit, shared by the training thread and the background thread.

Must not copy anything itself.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Sequence

import torch

from backstay.capture import unchanged
from backstay.capture.shard_plan import Plan
from backstay.trainer import raw_memory


class CaptureState(enum.StrEnum):
    """waiting → copying → copied, or waiting → dropped."""

    WAITING = "waiting"
    COPYING = "copying"
    COPIED = "copied"
    DROPPED = "dropped"


class Capture:
    """One snapshot on its way into a slot.

    States: waiting → copying → copied, or waiting → dropped. Only who moves it out of ``waiting`` decides whether it is
    copied; a capture that is ``copied`` or ``dropped`` no longer reads living tensors.
    """

    def __init__(self, plan: Plan, step: int, *, is_checked: bool, ready: torch.cuda.Event | None) -> None:
        self.plan = plan
        self.step = step
        self.is_checked = is_checked
        self.ready = ready
        self.slot: raw_memory.Mapping | None = None
        self.device_done: torch.cuda.Event | None = None
        self.stamps: Sequence[int] = ()  # by piece: the step since which it is unchanged
        self.kept = unchanged.Kept()  # what of it the slot held already
        self.copied_bytes = self.hashed_bytes = 0
        self.drop_reason = ""
        self.is_late = False  # dropped because its slot did not come in time
        self.settled = threading.Event()  # copied or dropped: neither living tensors nor staging are read from now on
        self.launched = threading.Event()  # settled, or all that is left to read waits behind ``device_done``
        self.began = threading.Event()  # copying, copied or dropped
        self.verdict = threading.Event()  # the byte check was made (or will not be)
        self._state = CaptureState.WAITING
        self._lock = threading.Lock()
        if not is_checked:
            self.verdict.set()

    @property
    def state(self) -> CaptureState:
        return self._state

    def begin(self, slot: raw_memory.Mapping) -> bool:
        """Claim the capture for copying; False if it was dropped meanwhile."""
        with self._lock:
            if self._state is not CaptureState.WAITING:
                return False
            self._state, self.slot = CaptureState.COPYING, slot
        self.began.set()
        return True

    def drop(self, reason: str) -> bool:
        """Give up a capture that has not begun; False if it has."""
        with self._lock:
            if self._state is not CaptureState.WAITING:
                return False
            self._state, self.drop_reason = CaptureState.DROPPED, reason
        for event in (self.began, self.launched, self.settled, self.verdict):
            event.set()
        return True

    def kept_names(self, names: Sequence[str]) -> list[str]:
        """Those of ``names`` that were not copied because the slot held them already."""
        held = {self.plan.pieces[index].name for index in self.kept.pieces}
        return [name for name in names if name in held]

    def discard(self, reason: str) -> None:
        """Whatever was copied must not be committed."""
        self.drop_reason = self.drop_reason or reason
        self.verdict.set()

    def mark_copied(self) -> None:
        with self._lock:
            self._state = CaptureState.COPIED
        self.began.set()
        self.launched.set()
        self.settled.set()
