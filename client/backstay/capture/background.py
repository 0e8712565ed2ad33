"""The background thread of a training rank: reserves slots, has them filled, commits, and re-attaches when the daemon died.

All talk with the daemon after restore() happens here. Must never raise into training; what went wrong is logged once and kept
for ``strict``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from backstay import faults
from backstay.capture import unchanged
from backstay.capture.capture import Capture, CaptureState
from backstay.capture.fill import Filler
from backstay.capture.trainer_cost import Costs
from backstay.errors import BackstayError, InvariantError, StaleGenerationError, UnavailableError
from backstay.format import json_records, shard
from backstay.format.digest import Digests
from backstay.protocol import framing, messages
from backstay.protocol.connection import DaemonConnection
from backstay.trainer import raw_memory

_log = logging.getLogger("backstay")

FIRST_BACKOFF_S: Final = 0.2
MAX_BACKOFF_S: Final = 5.0
MIN_LOOK_S: Final = 1.0  # so often an idle session looks whether its daemon is still there
MAX_AHEAD_WAIT_S: Final = 60.0
ATTACH_DEADLINE_S: Final = 5.0
MAX_MAPPINGS: Final = 4
MAX_CAPTURES: Final = 2
DISTRUST_DEADLINE_S: Final = 2.0


@dataclass(slots=True)
class Tally:
    """What happened so far; read by ``Snapshotter.stats()``."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who this rank is in this world, for Attach and manifests."""

    socket_path: str
    attach: messages.Attach  # with the attempt this world writes
    writer: str
    lease_s: float


@dataclass(slots=True)
class _MappedSlot:
    fd: int
    mapping: raw_memory.Mapping


class Session:
    """One rank's line to its daemon, from restore() to close().

    Invariant: only the session's thread uses the slots, and the connection but for :meth:`distrust`. ``is_responsive`` is
    False from the moment a call failed or overran until the daemon answered again; a step never waits for an unresponsive
    daemon.
    """

    def __init__(
        self,
        connection: DaemonConnection,
        identity: Identity,
        filler: Filler,
        *,
        interval_steps: int,
        max_wait_s: float,
    ) -> None:
        self.identity = identity
        self.tally = Tally()
        self.costs = Costs()
        self.schedule = messages.Schedule(
            interval_steps=max(1, interval_steps), previous_interval_steps=max(1, interval_steps)
        )
        self.is_responsive = True
        self.failure: BackstayError | None = None
        self._connection: DaemonConnection | None = connection
        self._filler = filler
        self._max_wait_s = max_wait_s
        self._slots: dict[str, _MappedSlot] = {}
        self._held: tuple[int, str] | None = None  # (step, slot id) of a slot that is granted and not yet used
        self._ahead: tuple[int, int, float] | None = None  # (step, bytes, wait) to reserve ahead
        self._distrust: messages.Distrust | None = None  # to be said when the daemon is back
        self._wants_persist = False  # to be said as soon as the daemon can hear it
        self._captures: deque[Capture] = deque()
        self._is_busy = False
        self._is_stopping = False
        self._is_banned = False
        self._notice = ""  # the newest that was logged
        self._said = ""  # reason of the failure that was told last, since something went well
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
        """Say which step comes next, so that its slot is there before it; ``period_s`` is the time between snapshots."""
        with self._wake:
            self._ahead = (step, size_bytes, min(MAX_AHEAD_WAIT_S, 2 * period_s + self._max_wait_s))
            self._wake.notify()

    def note_stall(self) -> None:
        """A step waited its time for an answer: the next ones do not wait until there is one."""
        self.is_responsive = False

    def distrust(self, step: int, reason: str) -> bool:
        """Tell the daemon at once that what was restored is bad: this process may end soon. False if it does not answer.

        Called by the training thread, for up to two seconds; a connection serves one call at a time. What could not be said is
        said by the session's thread when it is attached again.
        """
        message = messages.Distrust(step=step, reason=reason[:500])
        connection = self._connection
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
        """Have the newest protected snapshot copied to durable storage; whether the daemon was told within ``timeout_s``.

        The session's thread says it, so this may be called by a signal handler.
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
        """Tell the daemon that the run ended well; False if it could not be told."""
        if not self.drain(timeout_s):
            return False
        self._stop_thread(timeout_s)
        if self._connection is None or self._thread.is_alive():
            return False
        try:
            self._connection.call(messages.Finish(keep=keep), deadline_s=timeout_s)
        except BackstayError as error:
            _log.warning(
                "backstay could not tell its daemon that the run ended: %s; its memory is freed by job_ttl_s", error
            )
            return False
        return True

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop the thread, give up what is under way, unmap the slots."""
        self._stop_thread(timeout_s if self.is_responsive else 0.1)
        if self._connection is not None:
            self._connection.close()  # wakes the thread if it waits for a silent daemon
            self._connection = None
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return  # it still uses the mappings; they go with the process
        for slot_id in list(self._slots):
            self._unmap(slot_id)

    def forget_in_child(self) -> None:
        """In a forked child: close the descriptors it inherited, touch nothing else."""
        for slot in self._slots.values():
            with contextlib.suppress(OSError):
                os.close(slot.fd)
        if self._connection is not None:
            self._connection.close_in_child()

    # ---- the thread

    def _stop_thread(self, timeout_s: float) -> None:
        with self._wake:
            self._is_stopping = True
            for capture in self._captures:
                capture.drop("the keeper was closed")
                capture.discard("the keeper was closed")
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
            except Exception as error:  # noqa: BLE001 - the thread's boundary: training must go on
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
            self._abandon(self._held[0], "the keeper was closed", is_unused=True)

    def _has_work(self) -> bool:
        has_request = self._ahead is not None or self._distrust is not None or self._wants_persist
        has_request = has_request and self._connection is not None
        return self._is_stopping or bool(self._captures) or has_request or self._is_attach_due()

    def _idle_s(self) -> float | None:
        if self._connection is None and not self._is_banned:
            return max(0.0, self._next_attach_s - time.monotonic())
        return None if self._connection is None else max(MIN_LOOK_S, self.identity.lease_s)

    def _is_attach_due(self) -> bool:
        return self._connection is None and not self._is_banned and time.monotonic() >= self._next_attach_s

    def _work(self, capture: Capture | None, ahead: tuple[int, int, float] | None) -> None:
        if capture is None and self._connection is not None and self._connection.is_lost():
            # a long step must not keep the next daemon waiting for us
            self._lose(UnavailableError(f"the daemon at {self.identity.socket_path} has ended", reason="daemon_gone"))
            return
        if self._is_attach_due() and not self._is_stopping:
            self._attach()
        if self._distrust is not None and self._connection is not None:
            message, self._distrust = self._distrust, None
            reply, _ = self._call(message, self.identity.lease_s)
            if reply is None and not self.is_responsive and not self._is_banned:
                self._distrust = message  # for the next daemon
        if self._wants_persist and self._connection is not None:
            self._say_persist()
        if capture is not None:
            self._process(capture)
        elif ahead is not None and self._connection is not None and not self._is_stopping:
            self._ahead = None if self._ahead == ahead else self._ahead
            step, size_bytes, wait_s = ahead
            self._reserve(step, size_bytes, wait_s, is_ahead=True)

    def _say_persist(self) -> None:
        reply, _ = self._call(messages.Persist(), self.identity.lease_s)
        if reply is not None or self.is_responsive or self._is_banned:  # heard, or refused for good
            with self._wake:
                self._wants_persist = False
                self._wake.notify_all()

    def _process(self, capture: Capture) -> None:
        slot = None
        if capture.state is CaptureState.WAITING and self._connection is not None:
            slot = self._slot_for(capture)
        if slot is None:
            reason = self.tally.last_problem or "no slot"
            capture.drop(reason)
        if slot is None or not capture.begin(slot):
            self.tally.skipped += 1
            self._abandon(capture.step, capture.drop_reason, is_late=capture.is_late)
            return
        assert self._held is not None
        slot_id = self._held[1]
        faults.reach("after_slot", rank=self.identity.attach.rank, step=capture.step)
        begin_s = time.perf_counter()
        digests = self._filler.fill(capture, slot)
        self.costs.add(
            messages.TrainerCost(
                capture_s=time.perf_counter() - begin_s,
                copied_bytes=capture.copied_bytes,
                kept_bytes=capture.plan.layout.size_bytes - capture.hashed_bytes,
            )
        )
        self.tally.copied_bytes += capture.copied_bytes
        self.tally.hashed_bytes += capture.hashed_bytes
        self.tally.kept_bytes += capture.plan.layout.size_bytes - capture.hashed_bytes
        capture.verdict.wait()  # ends with the next fence, finish() or close()
        if capture.drop_reason:
            self.tally.abandoned += 1
            self._abandon(capture.step, capture.drop_reason)
            return
        faults.reach("before_commit", rank=self.identity.attach.rank, step=capture.step)
        self._commit(capture, slot_id, digests)
        faults.reach("after_commit", rank=self.identity.attach.rank, step=capture.step)

    def _slot_for(self, capture: Capture) -> raw_memory.Mapping | None:
        size = capture.plan.layout.size_bytes
        if self._held is not None:
            step, slot_id = self._held
            if step == capture.step and self._slots[slot_id].mapping.size_bytes == size:
                return self._slots[slot_id].mapping
        if self._reserve(capture.step, size, self._max_wait_s) and self._held is not None:
            return self._slots[self._held[1]].mapping
        return None

    def _reserve(self, step: int, size_bytes: int, wait_s: float, *, is_ahead: bool = False) -> bool:
        """Ask for a slot; afterwards it is ``_held``, or the daemon had none."""
        if self._held is not None:
            held_step, held_id = self._held
            if held_step == step and self._slots[held_id].mapping.size_bytes == size_bytes:
                return True
            if held_step != step:
                self._abandon(held_step, f"reserved ahead; the next snapshot is of step {step}", is_unused=True)
            self._held = None  # of the same step: the daemon takes it back for one of the right size
        self._prune(size_bytes)
        request = messages.Reserve(
            step=step, size_bytes=size_bytes, wait_s=wait_s, known_slots=tuple(self._slots), is_ahead=is_ahead
        )
        reply, fds = self._call(request, wait_s + self.identity.lease_s)
        if isinstance(reply, messages.Skipped):
            self._note(reply)
            self.tally.last_problem = reply.notice or reply.reason
            return False
        if not isinstance(reply, messages.Reserved):
            return False
        self._note(reply)
        if not self._map(reply.slot_id, fds, size_bytes):
            return False
        self._held = (step, reply.slot_id)
        return True

    def _map(self, slot_id: str, fds: Sequence[int], size_bytes: int) -> bool:
        if fds:
            self._unmap(slot_id)
            try:
                mapping = raw_memory.Mapping(fds[0], is_writable=True, size_bytes=size_bytes)
            except (BackstayError, OSError) as error:
                for fd in fds:
                    os.close(fd)
                raise UnavailableError(f"slot {slot_id} cannot be mapped: {error}; this snapshot is skipped") from error
            for fd in fds[1:]:
                os.close(fd)
            self._slots[slot_id] = _MappedSlot(fds[0], mapping)
        return slot_id in self._slots and self._slots[slot_id].mapping.size_bytes == size_bytes

    def _prune(self, size_bytes: int) -> None:
        """Let go of slots that the daemon deleted or that have another size: a mapping would keep their memory."""
        for slot_id, slot in list(self._slots.items()):
            status = os.fstat(slot.fd)
            if status.st_nlink == 0 or slot.mapping.size_bytes != size_bytes or len(self._slots) > MAX_MAPPINGS:
                self._unmap(slot_id)

    def _unmap(self, slot_id: str) -> None:
        slot = self._slots.pop(slot_id, None)
        if slot is not None:
            for copier in self._filler.copiers.values():
                copier.forget(slot.mapping)
            slot.mapping.close()
            os.close(slot.fd)

    def _commit(self, capture: Capture, slot_id: str, digests: Digests) -> None:
        attach = self.identity.attach
        manifest = shard.build_manifest(
            capture.plan.layout,
            run=attach.run,
            attempt=attach.attempt,
            step=capture.step,
            rank=attach.rank,
            world_size=attach.world_size,
            world_id=attach.world_id,
            chunk_crcs=digests.chunk_crcs,
            tensor_crcs=digests.tensor_crcs,
            # Nothing is said of a checked capture: its parity is made anew from bytes that are read and verified again.
            unchanged=() if capture.is_checked else unchanged.unchanged(capture.plan, capture.stamps, capture.step),
            model_signature=capture.plan.signature,
            layout_signature=capture.plan.layout_signature,
            writer=self.identity.writer,
        )
        self._held = None
        cost = self.costs.take()
        request = messages.Commit(
            step=capture.step, slot_id=slot_id, manifest=json_records.to_json(manifest), cost=cost
        )
        reply, _ = self._call(request, self.identity.lease_s + 10.0)
        if reply is None:
            self.costs.add(cost)
        if isinstance(reply, messages.Committed):
            self._said = ""
            self._filler.note_committed(capture, digests)
            self.tally.committed += 1
            self.tally.last_committed_step = capture.step
            self._note(reply)
        else:
            self.tally.abandoned += 1

    def _abandon(self, step: int, reason: str, *, is_late: bool = False, is_unused: bool = False) -> None:
        slot_id = ""
        if self._held is not None and self._held[0] != step:
            held_step, _ = self._held
            self._abandon(held_step, f"reserved ahead; the snapshot is of step {step}", is_unused=True)
        if self._held is not None:
            slot_id, self._held = self._held[1], None
        if self._connection is not None:
            cost = self.costs.take()
            request = messages.Abandon(
                step=step,
                slot_id=slot_id,
                reason=reason[:500],
                is_short_of_slots=is_late,
                cost=cost,
                is_unused=is_unused,
            )
            reply, _ = self._call(request, self.identity.lease_s)
            if reply is None:
                self.costs.add(cost)

    def _note(self, reply: messages.Reserved | messages.Skipped | messages.Committed) -> None:
        schedule = reply.schedule
        if schedule != self.schedule:
            _log.info("backstay snapshots every %d steps from step %d on", schedule.interval_steps, schedule.from_step)
        self.schedule = schedule
        self.tally.redundancy, self.tally.protected_step = reply.redundancy, reply.protected_step
        if reply.notice and reply.notice != self._notice:
            _log.warning("backstay: %s (further occurrences are not logged)", reply.notice)
        self._notice = reply.notice or self._notice

    def _call(self, request: object, deadline_s: float) -> tuple[object | None, list[int]]:
        """One call; a failure is noted and gives ``(None, [])``."""
        if self._connection is None:
            return None, []
        try:
            reply, fds = self._connection.call(request, deadline_s=deadline_s)
        except UnavailableError as error:
            self._lose(error)
            return None, []
        except StaleGenerationError as error:
            self._is_banned = True
            self._lose(error)
            return None, []
        except BackstayError as error:
            self._fail(error)
            return None, []
        self.is_responsive = True
        if not (isinstance(request, messages.Reserve) and isinstance(reply, messages.Reserved)):
            framing.close_fds(fds)  # of something that nobody asked for
        return reply, list(fds)

    def _lose(self, error: BackstayError) -> None:
        """The daemon is gone, silent, or told us to stop: close the line, and plan to attach again."""
        if self._connection is not None:
            self._connection.close()
        self._connection, self._held = None, None
        self._filler.forget_slots()
        self._fail(error)
        self.is_responsive = False
        self._next_attach_s = time.monotonic() + self._backoff_s

    def _fail(self, error: BackstayError) -> None:
        is_news, self._said = self._said != error.reason, error.reason
        self.tally.last_problem = str(error)
        self.failure = error
        if is_news:
            end = (
                "this process belongs to an older world and takes no more snapshots"
                if self._is_banned
                else (
                    "training goes on without snapshots until it answers"
                    if error.is_retryable
                    else "this snapshot is skipped"
                )
            )
            _log.warning("backstay: %s; %s", error, end)

    def _attach(self) -> None:
        connection = None
        try:
            connection = DaemonConnection(self.identity.socket_path, timeout_s=ATTACH_DEADLINE_S)
            attached = connection.attach(self.identity.attach, deadline_s=ATTACH_DEADLINE_S)
        except (BackstayError, OSError) as error:
            if connection is not None:
                connection.close()
            self._is_banned = isinstance(error, StaleGenerationError)
            self._backoff_s = min(MAX_BACKOFF_S, 2 * self._backoff_s)
            self._next_attach_s = time.monotonic() + self._backoff_s
            problem = (
                error if isinstance(error, BackstayError) else UnavailableError(f"{self.identity.socket_path}: {error}")
            )
            if self._is_banned or not problem.is_retryable:
                self._fail(problem)
            return
        self._connection, self._backoff_s = connection, FIRST_BACKOFF_S
        self.identity = dataclasses.replace(self.identity, lease_s=attached.lease_s)
        self.is_responsive, self.failure, self._said = True, None, ""
        _log.warning("backstay: attached again to the daemon of node %s; snapshots go on", attached.node or "?")
