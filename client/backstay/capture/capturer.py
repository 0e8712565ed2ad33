"""The captures of one rank from a restore to the next: planned and staged by the training thread, settled at the fence.

Must never stop, slow by surprise or change a training run: a failed snapshot is a warning (``strict`` raises).
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from backstay.capture import byte_check, rank_state, shard_plan, unchanged
from backstay.capture.background import BackgroundThread
from backstay.capture.capture import Capture, CaptureState
from backstay.capture.fence import Fence
from backstay.capture.fill import Filler
from backstay.capture.overhead import Waits
from backstay.errors import BackstayError, UnavailableError, UsageError
from backstay.protocol import messages
from backstay.restore.load import Target
from backstay.restore.restore import Restoration
from backstay.session.session import Session
from backstay.stats import NOT_SCHEDULED, REFUSED, SKIPPED, STARTED, SnapshotStatus, Stats
from backstay.trainer import local_tensors, optimizer_state

_log = logging.getLogger("backstay")

FIRST_CHECKED: Final = 2
COPY_FLOOR_BYTES_PER_S: Final = 50e6
COPY_LIMIT_S: Final = 30.0  # and the bytes at that speed
STEPLESS_STEPS: Final = 100  # a GradScaler that looks for its scale skips fewer in a row


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Arguments of the Snapshotter, checked."""

    max_wait_s: float
    check_every: int
    strict: bool


class Warnings:
    """The warnings of one Snapshotter: each is logged once."""

    def __init__(self, *, strict: bool) -> None:
        self._strict = strict
        self._logged: set[str] = set()

    def is_new(self, key: str) -> bool:
        """Whether nothing was logged under ``key``; from now on something was."""
        if key in self._logged:
            return False
        self._logged.add(key)
        return True

    def fail(self, key: str, text: str) -> None:
        """A snapshot failed: logged, or raised where ``strict``."""
        if self._strict:
            raise UnavailableError(text)
        if self.is_new(key):
            _log.warning("backstay: %s (further occurrences are not logged)", text)


class Capturer:
    """Captures what ``target`` holds, over the session that a restore left.

    Invariant: at most one capture reads living tensors (``capture``), and only until the next fence.

    Args:
        values: Gives the script's own plain values of the moment.
        fence: The optimizers' hooks; knows whether captures must be copied before snapshot() returns.
    """

    def __init__(
        self,
        target: Target,
        restoration: Restoration,
        *,
        values: Callable[[], Mapping[str, Any]],
        fence: Fence,
        settings: Settings,
        warnings: Warnings,
    ) -> None:
        self._target, self._values = target, values
        self._fence, self._settings, self._warnings = fence, settings, warnings
        self._filler = Filler(rank=target.rank)
        session = Session(
            restoration.connection, restoration.identity, lease_s=restoration.lease_s, on_unmap=self._filler.forget
        )
        restored = restoration.restored
        self.background = BackgroundThread(
            session, self._filler, interval_steps=restored.interval_steps, max_wait_s=settings.max_wait_s
        )
        self.capture: Capture | None = None  # not yet fenced
        self._previous: Capture | None = None  # fenced; may still be hashed or committed
        self._plan: shard_plan.Plan | None = None
        self._freezing = unchanged.Freezing()
        self._lock = threading.RLock()
        self._last_step = restored.step if restored.outcome != "NONE" else -1
        self._last_started: tuple[int, float] | None = None
        self._started = self._refused = self._skipped = 0
        self._blocked_s = self._fence_s = 0.0
        self._waits = Waits(left_out=FIRST_CHECKED)

    def snapshot(self, step: int) -> SnapshotStatus:
        """See :meth:`backstay.Snapshotter.snapshot`."""
        if step <= self._last_step:
            raise UsageError(
                f"snapshot({step}) after step {self._last_step}: steps must increase", reason="step_not_increasing"
            )
        begin_s = time.perf_counter()
        try:
            return self._snapshot(step)
        except Exception as error:  # the user's state_dict() runs in it, and so does torch
            if self._settings.strict:
                raise
            reason = str(error) if isinstance(error, BackstayError) else f"{type(error).__name__}: {error}"
            self._warnings.fail(getattr(error, "reason", reason), f"snapshot of step {step} failed: {reason}")
            return self._refuse(step, reason)
        finally:
            spent_s = time.perf_counter() - begin_s
            self._blocked_s += spent_s
            self.background.costs.add(messages.TrainerCost(snapshot_s=spent_s))

    def settle(self) -> None:
        """See :meth:`backstay.Snapshotter.fence`."""
        with self._lock:
            capture = self.capture
            if capture is None:
                return
            begin_s = time.perf_counter()
            try:
                self._settle(capture)
            except BaseException as error:  # KeyboardInterrupt too: training may continue without having waited
                reason = f"the fence ended with {type(error).__name__}: {error}"
                capture.drop(reason)
                capture.discard(reason)
                if self._settings.strict or not isinstance(error, Exception):
                    raise
                self._warnings.fail("fence", f"snapshot of step {capture.step} is discarded: {reason}")
            finally:
                self.capture, self._previous = None, capture
                spent_s = time.perf_counter() - begin_s
                self._fence_s += spent_s
                self.background.costs.add(messages.TrainerCost(fence_s=spent_s))
            self._raise_if_strict()

    def close(self) -> None:
        """Cancel what is under way, end the session and let go of everything that was captured with."""
        capture, self.capture, self._previous = self.capture, None, None
        if capture is not None and not capture.drop("cancelled"):
            capture.launched.wait(_copy_limit_s(capture))
            if capture.is_checked:
                capture.discard("cancelled before the next optimizer step")
        self.background.drain(self._settings.max_wait_s if self.background.is_responsive else 0.0)
        self.background.close()
        self._filler.close()
        self._plan = None

    def stats(self) -> Stats:
        tally = dataclasses.asdict(self.background.tally)
        skipped = self._skipped + tally.pop("skipped")
        return Stats(
            blocked_s=self._blocked_s,
            fence_s=self._fence_s,
            waited_s=self._waits.total_s,
            wait_share=self._waits.share,
            started=self._started,
            refused=self._refused,
            skipped=skipped,
            is_attached=self.background.is_responsive,
            is_synchronous=self._fence.is_synchronous,
            **tally,
        )

    # ---- one snapshot

    def _snapshot(self, step: int) -> SnapshotStatus:
        background = self.background
        self._last_step = step
        if not background.is_due(step):
            return SnapshotStatus(step=step, state=NOT_SCHEDULED)
        if self.capture is not None:
            return self._refuse_without_step(step, self.capture)
        self._raise_if_strict()
        if not background.is_responsive or not self._is_previous_done():
            self._skipped += 1
            reason = background.tally.last_problem or "the capture before is unfinished"
            return SnapshotStatus(step=step, state=SKIPPED, reason=reason)
        with torch.inference_mode(mode=False), torch.no_grad():  # staging is written to again, in whatever mode
            plan = self._current_plan()
        check_every = self._settings.check_every
        is_checked = self._started < FIRST_CHECKED or (check_every > 0 and self._started % check_every == 0)
        capture = Capture(plan, step, is_checked=is_checked, ready=self._mark_ready(plan))
        self.capture = capture  # first: interrupted between the two lines, a capture would run without a fence
        background.submit(capture)
        self._started += 1
        self._reserve_ahead(step, plan.layout.size_bytes)
        if self._fence.is_synchronous or self._fence.is_doubtful():
            self.settle()
        return SnapshotStatus(step=step, state=STARTED)

    def _refuse(self, step: int, reason: str) -> SnapshotStatus:
        self._refused += 1
        return SnapshotStatus(step=step, state=REFUSED, reason=reason)

    def _refuse_without_step(self, step: int, capture: Capture) -> SnapshotStatus:
        reason = f"no optimizer step since snapshot({capture.step})"
        if self._warnings.is_new("no_step"):
            _log.info("backstay: snapshot(%d) not taken: %s (a GradScaler that skips a step is harmless)", step, reason)
        if step - capture.step >= STEPLESS_STEPS:
            self._warnings.fail(
                "stepless",
                f"snapshot({step}) is not taken: {reason}. None will be while the optimizers given to Snapshotter take no "
                "step: if others train the model now, make a new Snapshotter with these",
            )
        return self._refuse(step, reason)

    def _is_previous_done(self) -> bool:
        """Whether staging and the background are free; the one before may still be hashed or committed."""
        return self.background.has_room() and (self._previous is None or self._previous.launched.is_set())

    def _current_plan(self) -> shard_plan.Plan:
        """The plan, rebuilt where something moved, with everything eager copied into its staging."""
        target, plan = self._target, self._plan
        is_current = plan is not None and plan.holdings.is_current() and not self._freezing.is_due(plan.holdings)
        holdings = (
            plan.holdings
            if plan is not None and is_current
            else local_tensors.collect(target.model, target.optimizers, rank=target.rank, members=target.members)
        )
        found = rank_state.read(target.optimizers, target.extra, holdings, rank=target.rank, values=self._values())
        if len(found.document) > rank_state.HEAVY_JSON_BYTES and self._warnings.is_new("heavy"):
            _warn_of_heavy_state(found)
        if plan is None or not is_current or not plan.fits(found.tensors, found.document):
            metadata = {optimizer_state.METADATA_KEY: optimizer_state.describe(target.optimizers, holdings)}
            plan = self._plan = shard_plan.build(
                holdings, rank=target.rank, dynamic=found.tensors, state=found.document, metadata=metadata,
                places=found.places, previous=plan,
            )  # fmt: skip
            if plan.signature != target.signature and self._warnings.is_new("model"):
                _log.warning(
                    "backstay: model tensors were added, removed or changed shape or dtype since restore(); a restart "
                    "must build the model as it is now before it calls restore()"
                )
        plan.stage(found.tensors, found.document)
        return plan

    def _mark_ready(self, plan: shard_plan.Plan) -> torch.cuda.Event | None:
        device = next((p.source.device for p in plan.pieces if p.source.device.type == "cuda"), None)
        return None if device is None else self._filler.copier(device).mark_ready()

    def _reserve_ahead(self, step: int, size_bytes: int) -> None:
        """Have the next slot reserved, if steps come as closely as they are scheduled."""
        interval = max(1, self.background.schedule.interval_steps)
        now = time.monotonic()
        if self._last_started is not None and step - self._last_started[0] == interval:
            self.background.reserve_ahead(step + interval, size_bytes, now - self._last_started[1])
        self._last_started = (step, now)

    # ---- the fence

    def _settle(self, capture: Capture) -> None:
        wait_s = self._settings.max_wait_s if self.background.is_responsive else 0.0
        begin_s = time.monotonic()
        has_begun = capture.began.wait(wait_s)
        slot_s = time.monotonic() - begin_s
        if not has_begun and capture.drop(f"no slot within {wait_s:g} s"):
            capture.is_late = wait_s > 0
            self.background.note_stall()
            self._note_wait(slot_s, 0.0)
            problem = self.background.tally.last_problem or capture.drop_reason
            self._warnings.fail("no_slot", f"step {capture.step} is not captured: {problem}")
            return
        limit_s = _copy_limit_s(capture)
        is_copied = capture.launched.wait(limit_s)
        self._note_wait(slot_s, time.monotonic() - begin_s - slot_s)
        if not is_copied:
            capture.discard(f"copying took longer than {limit_s:.0f} s")
            self._warnings.fail(
                "slow", f"step {capture.step}: {capture.drop_reason}; training goes on, this snapshot is discarded"
            )
            return
        if capture.state is CaptureState.DROPPED:
            return
        if capture.is_checked and byte_check.check(capture, self._filler):
            self._fence.is_synchronous = True
        if capture.device_done is not None:
            for copier in self._filler.copiers.values():
                copier.hold_stream(capture.device_done)

    def _note_wait(self, slot_s: float, copy_s: float) -> None:
        counted_s = self._waits.note(slot_s=slot_s, copy_s=copy_s, now_s=time.monotonic())
        self.background.costs.add(messages.TrainerCost(waited_s=counted_s))
        warning = self._waits.warning()
        if warning and self._warnings.is_new("waits"):
            _log.warning("backstay: %s (further occurrences are not logged)", warning)

    def _raise_if_strict(self) -> None:
        if self._settings.strict and self.background.failure is not None:
            failure, self.background.failure = self.background.failure, None
            raise failure


def _warn_of_heavy_state(found: rank_state.RankState) -> None:
    name, size = found.heaviest()
    _log.warning(
        "backstay: %.1f MiB of each snapshot are numbers and texts that the training thread writes as JSON, about 0.1 s "
        "per MiB; most of it is %s (%.1f MiB): keep it in tensors, which are copied as bytes",
        len(found.document) / 2**20, name, size / 2**20,
    )  # fmt: skip


def _copy_limit_s(capture: Capture) -> float:
    return COPY_LIMIT_S + capture.plan.layout.size_bytes / COPY_FLOOR_BYTES_PER_S
