"""The background thread of a training rank: reserves slots, has them filled, commits, and attaches again after a break.

All communication with the daemon after restore() happens here. Must never raise into training: an error is logged once and
kept for ``strict``.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from backstay import faults
from backstay.capture import unchanged
from backstay.capture.capture import Capture, CaptureState
from backstay.capture.fill import Filler
from backstay.capture.overhead import Costs
from backstay.errors import BackstayError, InvariantError, StaleGenerationError, UnavailableError
from backstay.format.digest import Digests
from backstay.protocol import framing, messages
from backstay.session.session import MAX_REASON, NOT_MAPPED, Session, Slot

_log = logging.getLogger("backstay")

T = TypeVar("T")

FIRST_BACKOFF_S: Final = 0.2
MAX_BACKOFF_S: Final = 5.0
MIN_CHECK_S: Final = 1.0  # between two checks of an idle thread whether its daemon is still there
MAX_AHEAD_WAIT_S: Final = 60.0
MAX_CAPTURES: Final = 2
DISTRUST_DEADLINE_S: Final = 2.0
CLOSED: Final = "the keeper was closed"


@dataclass(slots=True)
class Tally:
    """What happened so far; fields of :class:`backstay.stats.Stats`."""

    committed: int = 0
    skipped: int = 0
    abandoned: int = 0
    last_committed_step: int = -1
    copied_bytes: int = 0
    hashed_bytes: int = 0
    kept_bytes: int = 0
    redundancy: str = ""
    protected_step: int = 0
    last_problem: str = ""


class BackgroundThread:
    """Finishes captures, from restore() to close().

    Invariant: only this thread uses the session, but for :meth:`distrust`. ``is_responsive`` is False from the moment a call
    failed or overran until the daemon answered again; a step never waits for an unresponsive daemon.
    """

    def __init__(self, session: Session, filler: Filler, *, interval_steps: int, max_wait_s: float) -> None:
        self.tally = Tally()
        self.costs = Costs()
        self.schedule = messages.Schedule(
            interval_steps=max(1, interval_steps), previous_interval_steps=max(1, interval_steps)
        )
        self.is_responsive = True
        self.failure: BackstayError | None = None
        self._session, self._filler = session, filler
        self._max_wait_s = max_wait_s
        self._held: Slot | None = None  # granted and not yet used
        self._ahead: tuple[int, int, float] | None = None  # (step, bytes, wait) to reserve ahead
        self._distrust: messages.Distrust | None = None  # to be sent when the daemon is back
        self._wants_persist = False  # to be sent as soon as the daemon can take it
        self._captures: deque[Capture] = deque()
        self._is_busy = False
        self._is_stopping = False
        self._notice = ""  # the newest that was logged
        self._logged_reason = ""  # of the failure that was logged last, since a success
        self._backoff_s = FIRST_BACKOFF_S
        self._next_attach_s = 0.0
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="backstay-session", daemon=True)
        self._thread.start()

    # ---- called by the training thread

    def submit(self, capture: Capture) -> None:
        """Hand over a capture: at most one is being finished, and one is waiting."""
        with self._wake:
            if len(self._captures) >= MAX_CAPTURES:
                raise InvariantError(
                    f"capture of step {capture.step} submitted over that of step {self._captures[-1].step}"
                )
            self._captures.append(capture)
            self._wake.notify()

    def is_due(self, step: int) -> bool:
        """Whether ``step`` is one that all ranks capture."""
        return self.schedule.includes(step)

    def has_room(self) -> bool:
        """Whether a capture can be handed over now."""
        with self._wake:
            return len(self._captures) < MAX_CAPTURES

    def reserve_ahead(self, step: int, size_bytes: int, period_s: float) -> None:
        """Announce the next step, so that its slot is there before it; ``period_s`` is the time between snapshots."""
        with self._wake:
            self._ahead = (step, size_bytes, min(MAX_AHEAD_WAIT_S, 2 * period_s + self._max_wait_s))
            self._wake.notify()

    def note_stall(self) -> None:
        """A step waited its time for an answer: the next ones do not wait until there is one."""
        self.is_responsive = False

    def distrust(self, step: int, reason: str) -> bool:
        """Report at once that what was restored is bad: this process may end soon. False if the daemon does not answer.

        Called by the training thread, for up to two seconds; a connection serves one call at a time. What could not be
        reported, this thread reports when it is attached again.
        """
        message = messages.Distrust(step=step, reason=reason[:MAX_REASON])
        connection = self._session.connection
        if connection is not None:
            with contextlib.suppress(BackstayError, OSError):
                _, fds = connection.call(message, deadline_s=DISTRUST_DEADLINE_S)
                framing.close_fds(fds)
                return True
        with self._wake:
            self._distrust = message
            self._wake.notify_all()
        return False

    def persist(self, timeout_s: float = 0.0) -> bool:
        """Have the newest protected snapshot copied to durable storage; whether the daemon took it within ``timeout_s``.

        This thread asks for it, so a signal handler may call this.
        """
        with self._wake:
            self._wants_persist = True
            self._wake.notify_all()
            return timeout_s > 0 and self._wake.wait_for(lambda: not self._wants_persist, timeout_s)

    def wait_captures(self, timeout_s: float) -> bool:
        """Wait until no capture is under way (the slot of the next may still be); False if the time is over."""
        with self._wake:
            return self._wake.wait_for(lambda: not self._captures, timeout_s)

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is under way; False if the time is over."""
        with self._wake:
            return self._wake.wait_for(lambda: not self._captures and not self._is_busy, timeout_s)

    def finish(self, *, keep: bool, timeout_s: float) -> bool:
        """Report that the run ended well; False if the daemon could not be reached."""
        if not self.drain(timeout_s):
            return False
        self._stop_thread(timeout_s)
        if not self._session.is_attached or self._thread.is_alive():
            return False
        try:
            self._session.finish(keep=keep, timeout_s=timeout_s)
        except BackstayError as error:
            _log.warning(
                "backstay could not tell its daemon that the run ended: %s; its memory is freed by job_ttl_s", error
            )
            return False
        return True

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop the thread, give up what is under way, unmap the slots."""
        self._stop_thread(timeout_s if self.is_responsive else 0.1)
        self._session.disconnect()  # wakes the thread if it waits for a silent daemon
        self._thread.join(timeout_s)
        if not self._thread.is_alive():  # else it still uses the mappings; they go with the process
            self._session.close()

    # ---- the thread

    def _stop_thread(self, timeout_s: float) -> None:
        with self._wake:
            self._is_stopping = True
            for capture in self._captures:
                capture.drop(CLOSED)
                capture.discard(CLOSED)
            self._wake.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(self._has_work, self._idle_s())
                if self._is_stopping and not self._captures:
                    break
                capture, ahead = (self._captures[0] if self._captures else None), self._ahead
                self._is_busy = True
            try:
                self._work(capture, ahead)
            except Exception as error:  # noqa: BLE001 - the thread's boundary: training must continue
                self._fail(error if isinstance(error, BackstayError) else InvariantError(f"session thread: {error!r}"))
                if capture is not None:
                    capture.drop(str(error))
                    capture.discard(str(error))
                    if capture.state is CaptureState.COPYING:
                        capture.mark_copied()
            finally:
                with self._wake:
                    if capture is not None:
                        self._captures.popleft()
                    self._is_busy = False
                    self._wake.notify_all()
        if self._held is not None and self.is_responsive:
            self._abandon(self._held.step, CLOSED, is_unused=True)

    def _has_work(self) -> bool:
        has_request = self._ahead is not None or self._distrust is not None or self._wants_persist
        has_request = has_request and self._session.is_attached
        return self._is_stopping or bool(self._captures) or has_request or self._is_attach_due()

    def _idle_s(self) -> float | None:
        if self._session.is_attached:
            return max(MIN_CHECK_S, self._session.lease_s)
        return None if self._session.stale else max(0.0, self._next_attach_s - time.monotonic())

    def _is_attach_due(self) -> bool:
        session = self._session
        return not session.is_attached and session.stale is None and time.monotonic() >= self._next_attach_s

    def _work(self, capture: Capture | None, ahead: tuple[int, int, float] | None) -> None:
        session, connection = self._session, self._session.connection
        if capture is None and connection is not None and connection.is_lost():
            # a long step must not keep the next daemon waiting for us
            self._lose(UnavailableError(f"the daemon at {session.socket_path} has ended", reason="daemon_gone"))
            return
        if self._is_attach_due() and not self._is_stopping:
            self._attach()
        self._send_distrust()
        self._send_persist()
        if capture is not None:
            self._process(capture)
        elif ahead is not None and session.is_attached and not self._is_stopping:
            self._ahead = None if self._ahead == ahead else self._ahead
            step, size_bytes, wait_s = ahead
            self._reserve(step, size_bytes, wait_s, is_ahead=True)

    def _send_distrust(self) -> None:
        message = self._distrust
        if message is not None and self._session.is_attached:
            self._distrust = None
            if not self._send(message, messages.Done) and not self.is_responsive and self._session.stale is None:
                self._distrust = message  # for the next daemon

    def _send_persist(self) -> None:
        if not (self._wants_persist and self._session.is_attached):
            return
        is_taken = self._send(messages.Persist(), messages.Done)
        if is_taken or self.is_responsive or self._session.stale is not None:  # taken, or refused for good
            with self._wake:
                self._wants_persist = False
                self._wake.notify_all()

    def _process(self, capture: Capture) -> None:
        slot = None
        if capture.state is CaptureState.WAITING and self._session.is_attached:
            slot = self._reserve(capture.step, capture.plan.layout.size_bytes, self._max_wait_s)
        if slot is None:
            capture.drop(self.tally.last_problem or "no slot")
        if slot is None or not capture.begin(slot.mapping):
            self.tally.skipped += 1
            self._abandon(capture.step, capture.drop_reason, is_late=capture.is_late)
            return
        rank = self._session.identity.rank
        faults.reach("after_slot", rank=rank, step=capture.step)
        digests = self._fill(capture, slot)
        capture.verdict.wait()  # ends with the next fence, finish() or close()
        if capture.drop_reason:
            self.tally.abandoned += 1
            self._abandon(capture.step, capture.drop_reason)
            return
        faults.reach("before_commit", rank=rank, step=capture.step)
        self._commit(capture, slot, digests)
        faults.reach("after_commit", rank=rank, step=capture.step)

    def _fill(self, capture: Capture, slot: Slot) -> Digests:
        begin_s = time.perf_counter()
        digests = self._filler.fill(capture, slot.mapping)
        kept_bytes = capture.plan.layout.size_bytes - capture.hashed_bytes
        self.costs.add(
            messages.TrainerCost(
                capture_s=time.perf_counter() - begin_s, copied_bytes=capture.copied_bytes, kept_bytes=kept_bytes
            )
        )
        self.tally.copied_bytes += capture.copied_bytes
        self.tally.hashed_bytes += capture.hashed_bytes
        self.tally.kept_bytes += kept_bytes
        return digests

    # ---- requests

    def _reserve(self, step: int, size_bytes: int, wait_s: float, *, is_ahead: bool = False) -> Slot | None:
        """The slot for ``step``, which is ``_held`` then; None if there is none."""
        if self._held is not None:
            if (self._held.step, self._held.mapping.size_bytes) == (step, size_bytes):
                return self._held
            if self._held.step != step:
                self._abandon(self._held.step, f"reserved ahead; the next snapshot is of step {step}", is_unused=True)
            self._held = None  # of the same step: the daemon takes it back for one of the right size
        found = self._try(lambda: self._session.reserve(step, size_bytes, wait_s=wait_s, is_ahead=is_ahead))
        if isinstance(found, messages.Skipped):
            self._note(found)
            self.tally.last_problem = found.notice or found.reason
        elif found is not None:
            self._note(found.grant)
            self._held = found
        return self._held

    def _commit(self, capture: Capture, slot: Slot, digests: Digests) -> None:
        cost, plan = self.costs.take(), capture.plan
        # Nothing is stated of a checked capture: its parity is computed again, from bytes that are read and verified again.
        ranges = () if capture.is_checked else unchanged.unchanged(plan, capture.stamps, capture.step)
        committed = self._try(
            lambda: self._session.commit(
                slot, plan.layout, digests, layout_signature=plan.layout_signature, model_signature=plan.signature,
                unchanged=ranges, cost=cost,
            )
        )  # fmt: skip
        self._held = None
        if committed is None:
            self.costs.add(cost)
            self.tally.abandoned += 1
            return
        self._logged_reason = ""
        self._filler.note_committed(capture, digests)
        self.tally.committed += 1
        self.tally.last_committed_step = capture.step
        self._note(committed)

    def _abandon(self, step: int, reason: str, *, is_late: bool = False, is_unused: bool = False) -> None:
        slot_id = ""
        if self._held is not None and self._held.step != step:
            self._abandon(self._held.step, f"reserved ahead; the snapshot is of step {step}", is_unused=True)
        if self._held is not None:
            slot_id, self._held = self._held.slot_id, None
        if self._session.is_attached:
            cost = self.costs.take()
            request = messages.Abandon(
                step=step,
                slot_id=slot_id,
                reason=reason[:MAX_REASON],
                is_short_of_slots=is_late,
                cost=cost,
                is_unused=is_unused,
            )
            if not self._send(request, messages.Done):
                self.costs.add(cost)

    def _note(self, reply: messages.RunProgress) -> None:
        schedule = reply.schedule
        if schedule != self.schedule:
            _log.info("backstay snapshots every %d steps from step %d on", schedule.interval_steps, schedule.from_step)
        self.schedule = schedule
        self.tally.redundancy, self.tally.protected_step = reply.redundancy, reply.protected_step
        if reply.notice and reply.notice != self._notice:
            _log.warning("backstay: %s (further occurrences are not logged)", reply.notice)
        self._notice = reply.notice or self._notice

    def _send(self, request: object, kind: type[object]) -> bool:
        return self._try(lambda: self._session.expect(request, kind, self._session.lease_s)) is not None

    def _try(self, exchange: Callable[[], T]) -> T | None:
        """The result of an exchange with the daemon; a failure is noted and gives None."""
        if not self._session.is_attached:
            return None
        try:
            result = exchange()
        except (UnavailableError, StaleGenerationError) as error:
            (self._fail if error.reason == NOT_MAPPED else self._lose)(error)
            return None
        except BackstayError as error:
            self._fail(error)
            return None
        self.is_responsive = True
        return result

    # ---- the connection

    def _lose(self, error: BackstayError) -> None:
        """The daemon is gone, silent, or of another world: disconnect, and plan to attach again."""
        self._session.disconnect()
        self._held = None
        self._filler.forget_slots()
        self._fail(error)
        self.is_responsive = False
        self._next_attach_s = time.monotonic() + self._backoff_s

    def _fail(self, error: BackstayError) -> None:
        is_first, self._logged_reason = self._logged_reason != error.reason, error.reason
        self.tally.last_problem = str(error)
        self.failure = error
        if not is_first:
            return
        if self._session.stale is not None:
            consequence = "this process belongs to an older world and takes no more snapshots"
        elif error.is_retryable:
            consequence = "training goes on without snapshots until it answers"
        else:
            consequence = "this snapshot is skipped"
        _log.warning("backstay: %s; %s", error, consequence)

    def _attach(self) -> None:
        try:
            attached = self._session.attach()
        except (BackstayError, OSError) as error:
            self._backoff_s = min(MAX_BACKOFF_S, 2 * self._backoff_s)
            self._next_attach_s = time.monotonic() + self._backoff_s
            if isinstance(error, BackstayError) and not error.is_retryable:
                self._fail(error)
            return
        self._backoff_s = FIRST_BACKOFF_S
        self.is_responsive, self.failure, self._logged_reason = True, None, ""
        _log.warning("backstay: attached again to the daemon of node %s; snapshots continue", attached.node or "?")
