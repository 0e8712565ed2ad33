"""The face of backstay in a trainer: restore() once, snapshot() after each step, finish() at the end.

Must never stop, slow by surprise or change a training run: a failed snapshot is a warning (``strict=True`` raises).
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import logging
import os
import threading
import time
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Final, Self

import torch

from backstay._version import __version__
from backstay.capture import byte_check, extras, shard_plan, unchanged
from backstay.capture.background import Identity, Session
from backstay.capture.capture import Capture, CaptureState
from backstay.capture.fence import Fence
from backstay.capture.fill import Filler
from backstay.capture.sigterm import SigtermHook
from backstay.capture.wait_share import Waits
from backstay.errors import BackstayError, UnavailableError, UsageError
from backstay.ids import DEFAULT_JOB, RunKey
from backstay.protocol import messages
from backstay.protocol.connection import DaemonConnection, find_socket
from backstay.restore import gate_statements, layout_gate, load
from backstay.restore.load import Target
from backstay.restore.probation import Probation
from backstay.restore.result import RestoreResult, make_result
from backstay.session import join
from backstay.stats import NOT_SCHEDULED, REFUSED, SKIPPED, STARTED, SnapshotStatus, Stats
from backstay.trainer import checked_arguments, fsdp2, held_tensors, left_out_state, optimizer_state, torch_world
from backstay.trainer.data import followed_loaders

_log = logging.getLogger("backstay")

__all__ = ["RestoreResult", "SnapshotStatus", "Snapshotter", "Stats"]

DEFAULT_MAX_WAIT_S: Final = 3.0
DEFAULT_CHECK_EVERY: Final = 50
FIRST_CHECKED: Final = 2
MIN_ASK_S: Final = 0.1  # what is left for the daemon's answer, however long rank 0 let wait
COPY_FLOOR_BYTES_PER_S: Final = 50e6
STEPLESS_STEPS: Final = 100  # a GradScaler that looks for its scale skips fewer in a row

_keepers: weakref.WeakSet[Snapshotter] = weakref.WeakSet()


class Snapshotter:
    """Keeps one rank's training state in the memory of its node's daemon.

    Not thread-safe: restore(), snapshot(), finish() and close() belong to the training thread. In a forked child restore()
    raises, and everything else does nothing.

    Args:
        model: A plain module, DDP, FSDP2 (also as HSDP), tensor parallel, or one stage of a pipeline; may be compiled.
        optimizer: One optimizer, or several in an order that stays the same.
        run_id: The training run whose state this is; a new one for a run that starts from scratch.
        job: Name of the job the run belongs to.
        extra: Things with ``state_dict()`` and ``load_state_dict()``: schedulers, scalers, an EMA; and DataLoaders of any kind,
            which go on with the next batch at their next ``for``. Plain values belong into :attr:`values`.
        socket: Path of the daemon's socket; default ``$BACKSTAY_SOCKET``, then ``/run/backstay/backstayd.sock``.
        max_wait_s: How long a step may wait for a free slot, at the fence.
        strict: Raise where a snapshot fails, instead of a warning.
        check_every: One in so many snapshots is compared byte for byte at the fence (and the first two are); 0: no other.
        persist_on_sigterm: On SIGTERM, ask for a durable copy (:meth:`persist`), then do what the signal did before.
        process_group: The ranks that train this model, where they are not all of torch.distributed.

    Raises:
        UsageError: for names that cannot be used, and arguments that are not what they must be.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        *,
        run_id: str,
        job: str = DEFAULT_JOB,
        extra: Mapping[str, Any] | None = None,
        socket: str | os.PathLike[str] | None = None,
        max_wait_s: float = DEFAULT_MAX_WAIT_S,
        strict: bool = False,
        check_every: int = DEFAULT_CHECK_EVERY,
        persist_on_sigterm: bool = False,
        process_group: Any = None,
    ) -> None:
        self._model = checked_arguments.model_of(model)
        self._optimizers = checked_arguments.optimizers_of(optimizer)
        self._run = RunKey(job, run_id)
        self._extra = followed_loaders.follow_all(checked_arguments.extra_of(extra))
        self._values: dict[str, Any] = {}
        self._socket_path = find_socket(socket)
        self._group = checked_arguments.process_group_of(process_group)
        self._max_wait_s = checked_arguments.seconds_of("max_wait_s", max_wait_s)
        self._strict = strict
        self._check_every = checked_arguments.count_of("check_every", check_every)
        self._pid = os.getpid()
        self._session: Session | None = None
        self._filler: Filler | None = None
        self._plan: shard_plan.Plan | None = None
        self._freezing = unchanged.Freezing()
        self._target: Target | None = None
        self._capture: Capture | None = None  # not yet fenced
        self._previous: Capture | None = None  # fenced; may still be hashed or committed
        self._fence_lock = threading.RLock()
        self._is_closed = False
        self._probation: Probation | None = None
        self._sigterm: SigtermHook | None = None
        self._has_sigterm = persist_on_sigterm
        self._last_step = -1
        self._last_started: tuple[int, float] | None = None
        self._counts = {"started": 0, "refused": 0, "skipped": 0}
        self._blocked_s = self._fence_s = 0.0
        self._waits = Waits(left_out=FIRST_CHECKED)
        self._told: set[str] = set()
        self._fence = Fence(self._optimizers, self.fence)
        self._is_synchronous = bool(self._fence.unhooked)
        if self._is_synchronous:
            names = ", ".join(type(o).__name__ for o in self._fence.unhooked)
            _log.warning(
                "backstay: %s runs no step hooks; snapshots are copied synchronously, before snapshot() returns", names
            )
        _keepers.add(self)

    # ---- what a trainer calls

    def restore(
        self, *, allow_fresh: bool = False, deadline_s: float = 600.0, missing_ok: Iterable[str] = ()
    ) -> RestoreResult:
        """Bring model, optimizers, extras and generators to the newest step that all ranks can have, or say: a new run.

        A collective: all ranks call it. Blocks up to ``deadline_s``. Tensors are written in place. The snapshot may be of
        another number of ranks or another parallelism: this rank's parts are put together then.

        Args:
            allow_fresh: Start over (step 0) if the run is known, or was finished, and nothing of it can be restored.
            deadline_s: How long all of it may take.
            missing_ok: Names of extras that were added or removed since the snapshot: those stay as the script made them.

        Raises:
            UsageError: a model or optimizer that cannot be captured, or several processes without torch.distributed.
            UnavailableError: no daemon, or no decision in time. UnrecoverableError: a known run without a restorable snapshot,
                or one that finished or was freed.
            IntegrityError: the snapshot does not fit or a byte is wrong.
        """
        self._refuse_closed("restore()")
        deadline_s = checked_arguments.seconds_of("deadline_s", deadline_s)
        missing_ok = checked_arguments.names_of("missing_ok", missing_ok)
        begin_s = time.monotonic()
        self._end_session()
        place = torch_world.current(self._group)
        left_out_state.warn(self._model)
        fsdp2.reshard(self._model)
        holdings = held_tensors.collect(self._model, self._optimizers, rank=place.rank, members=place.members)
        optimizer_state.read_values(self._optimizers, holdings, {})  # raises here, not at the first snapshot
        target = Target(
            model=self._model, optimizers=self._optimizers, extra=self._extra, rank=place.rank, world_size=place.size,
            run=str(self._run), signature=held_tensors.model_signature(holdings), members=place.members, values=self.values,
            missing_ok=missing_ok,
        )  # fmt: skip
        attach = messages.Attach(
            run=str(self._run), world_id=torch_world.agree_on_id(place, deadline_s=deadline_s),
            rank=place.rank, world_size=place.size, needs=holdings.needs, model_signature=target.signature,
            collective_timeout_s=place.collective_timeout_s,
            client_version=__version__, layout=held_tensors.layout_signature(holdings),
        )  # fmt: skip
        answer = join.ask(
            self._socket_path, attach, functools.partial(load.prepare, target), allow_fresh=allow_fresh,
            deadline_s=max(MIN_ASK_S, deadline_s - (time.monotonic() - begin_s)),
        )  # fmt: skip
        restored, loaded = answer.restored, None
        check = layout_gate.Gate(
            answer.connection, attach, restored, deadline_s=deadline_s - (time.monotonic() - begin_s)
        )
        try:
            if answer.error is not None:
                raise answer.error
            if answer.prepared is not None:
                loaded = answer.prepared.load()
                check.pass_with(gate_statements.make(target, restored, loaded), join.Progress(place.rank))
        except BaseException as error:
            check.report_failure(error)
            check.connection.close()
            raise
        finally:
            answer.close_snapshot()
        self._begin_session(target, attach, answer.attached, restored, check.connection)
        if self._has_sigterm and self._sigterm is None:
            self._sigterm = SigtermHook(self._request_persist)
        if loaded is not None:
            self._begin_probation(restored)
        join.announce(attach.run, restored, rank=place.rank)
        return make_result(restored, loaded, seconds=time.monotonic() - begin_s)

    @property
    def values(self) -> dict[str, Any]:
        """The script's own numbers, texts, lists and dictionaries, such as its epoch: each snapshot holds what is in it at that
        moment, and restore() makes it that again. Another dictionary may be put in its place."""
        return self._values

    @values.setter
    def values(self, values: dict[str, Any]) -> None:
        self._values = checked_arguments.values_of(values)

    def report_loss(self, loss: float | torch.Tensor) -> None:
        """Have the loss of the step under way looked at, for the first steps after a restore; free afterwards.

        NaN or infinity then means that what was restored is bad: the next restore() takes an older snapshot. Never stops
        training. Gradients are looked at without this, where the optimizer runs step hooks.
        """
        if self._probation is not None and os.getpid() == self._pid:
            self._probation.see_loss(loss)

    def snapshot(self, step: int) -> SnapshotStatus:
        """Capture the state after ``step`` completed optimizer steps; returns at once.

        Buffers, generators, scalars and extras are copied now, parameters and optimizer state until the next optimizer step.

        Raises:
            UsageError: before restore(), for a step that is no int from 1 on, or that does not increase. Anything else only
                with ``strict``.
        """
        if os.getpid() != self._pid:
            return SnapshotStatus(step=step, state=REFUSED, reason="this is a forked child")
        self._refuse_closed("snapshot()")
        if (session := self._session) is None:
            raise UsageError(
                "snapshot() before restore(): call restore() first, also for a new run", reason="not_restored"
            )
        step = checked_arguments.step_of("snapshot", step)
        if step <= self._last_step:
            raise UsageError(
                f"snapshot({step}) after step {self._last_step}: steps must increase", reason="step_not_increasing"
            )
        begin_s = time.perf_counter()
        try:
            return self._snapshot(session, step)
        except Exception as error:  # the user's state_dict() runs in it, and so does torch
            if self._strict:
                raise
            reason = str(error) if isinstance(error, BackstayError) else f"{type(error).__name__}: {error}"
            self._warn_once(f"snapshot of step {step} failed: {reason}", key=getattr(error, "reason", reason))
            self._counts["refused"] += 1
            return SnapshotStatus(step=step, state=REFUSED, reason=reason)
        finally:
            spent_s = time.perf_counter() - begin_s
            self._blocked_s += spent_s
            session.costs.add(messages.TrainerCost(snapshot_s=spent_s))

    def fence(self) -> None:
        """Wait until the running capture does not read parameters and optimizer state any more.

        Called by the optimizers' hooks; call it yourself before changing parameters by hand (EMA swaps, SAM, ``.data``, a
        captured CUDA graph). Cheap, re-entrant, and for any thread: autograd's may step optimizers too. Never raises unless
        ``strict``.
        """
        if os.getpid() != self._pid:
            return
        with self._fence_lock:
            capture, session = self._capture, self._session
            if capture is None or session is None:
                return
            begin_s = time.perf_counter()
            try:
                self._settle(capture, session)
            except BaseException as error:  # KeyboardInterrupt too: training may go on without having waited
                reason = f"the fence ended with {type(error).__name__}: {error}"
                capture.drop(reason)
                capture.discard(reason)
                if self._strict or not isinstance(error, Exception):
                    raise
                self._warn_once(f"snapshot of step {capture.step} is discarded: {reason}", key="fence")
            finally:
                self._capture, self._previous = None, capture
                spent_s = time.perf_counter() - begin_s
                self._fence_s += spent_s
                session.costs.add(messages.TrainerCost(fence_s=spent_s))
            self._raise_if_strict(session)

    def persist(self) -> None:
        """Have the newest protected snapshot copied to durable storage now, by the daemons; returns at once.

        The copy goes on when the trainer is gone. Needs ``persist_url`` of the coordinator; without, a warning says so.
        """
        if os.getpid() == self._pid:
            self._request_persist()

    def finish(self, *, keep: bool = False, timeout_s: float = 60.0) -> None:
        """The run ended well: free its memory everywhere (``keep=True``: it stays until ``job_ttl_s``), and close."""
        if os.getpid() != self._pid or self._is_closed:
            return
        timeout_s = checked_arguments.seconds_of("timeout_s", timeout_s)
        try:
            self.fence()
            if self._session is not None and not self._session.finish(keep=keep, timeout_s=timeout_s):
                _log.warning(
                    "backstay: the daemon could not be told that run %s ended; `backstay forget` frees its memory",
                    self._run,
                )
        finally:
            self.close()

    def close(self) -> None:
        """Detach: finish what is under way, remove the hooks, unmap the slots. What is committed stays in memory."""
        if os.getpid() != self._pid or self._is_closed:
            return
        try:
            self.fence()
        finally:
            self._is_closed = True
            self._fence.remove()
            if self._sigterm is not None:
                self._sigterm.remove()
            self._end_session()
            self._target, self._extra = None, {}  # a loader's workers end with it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stats(self) -> Stats:
        """What snapshots cost and came to so far."""
        session = self._session
        tally = session.tally if session is not None else None
        return Stats(
            blocked_s=self._blocked_s,
            fence_s=self._fence_s,
            waited_s=self._waits.total_s,
            wait_share=self._waits.share,
            started=self._counts["started"],
            committed=tally.committed if tally else 0,
            skipped=self._counts["skipped"] + (tally.skipped if tally else 0),
            abandoned=tally.abandoned if tally else 0,
            refused=self._counts["refused"],
            last_committed_step=tally.last_committed_step if tally else -1,
            copied_bytes=tally.copied_bytes if tally else 0,
            hashed_bytes=tally.hashed_bytes if tally else 0,
            kept_bytes=tally.kept_bytes if tally else 0,
            protected_step=tally.protected_step if tally else 0,
            redundancy=tally.redundancy if tally else "",
            last_problem=tally.last_problem if tally else "",
            is_attached=session is not None and session.is_responsive,
            is_synchronous=self._is_synchronous,
        )

    def wait_committed(self, timeout_s: float = 60.0) -> bool:
        """Wait until no capture is under way (a checked one ends with the next fence); False if the time is over."""
        timeout_s = checked_arguments.seconds_of("timeout_s", timeout_s)
        return self._session is None or self._session.wait_captures(timeout_s)

    # ---- one snapshot

    def _snapshot(self, session: Session, step: int) -> SnapshotStatus:
        self._last_step = step
        if self._probation is not None:
            self._probation.note_step(step)
        if not session.is_due(step):
            return SnapshotStatus(step=step, state=NOT_SCHEDULED)
        if self._capture is not None:
            return self._refuse_without_step(step)
        self._raise_if_strict(session)
        if not session.is_responsive or not self._is_previous_done(session):
            self._counts["skipped"] += 1
            return SnapshotStatus(
                step=step, state=SKIPPED, reason=session.tally.last_problem or "the capture before is unfinished"
            )
        with torch.inference_mode(mode=False), torch.no_grad():  # staging is written to again, in whatever mode
            made = self._current_plan()
        checked = self._counts["started"] < FIRST_CHECKED or (
            self._check_every > 0 and self._counts["started"] % self._check_every == 0
        )
        capture = Capture(made, step, is_checked=checked, ready=self._mark_ready(made))
        self._capture = capture  # first: interrupted between the two lines, a capture would run without a fence
        session.submit(capture)
        self._counts["started"] += 1
        self._plan_ahead(session, step, made.layout.size_bytes)
        if self._is_synchronous or self._fence.is_doubtful():
            self.fence()
        return SnapshotStatus(step=step, state=STARTED)

    def _refuse_without_step(self, step: int) -> SnapshotStatus:
        assert self._capture is not None
        reason = f"no optimizer step since snapshot({self._capture.step})"
        self._counts["refused"] += 1
        if "no_step" not in self._told:
            self._told.add("no_step")
            _log.info("backstay: snapshot(%d) not taken: %s (a GradScaler that skips a step is harmless)", step, reason)
        if step - self._capture.step >= STEPLESS_STEPS:
            self._warn_once(
                f"snapshot({step}) is not taken: {reason}. None will be while the optimizers given to Snapshotter take no "
                "step: if others train the model now, make a new Snapshotter with these",
                key="stepless",
            )
        return SnapshotStatus(step=step, state=REFUSED, reason=reason)

    def _is_previous_done(self, session: Session) -> bool:
        """Whether staging and the session are free; the one before may still be hashed or committed."""
        return session.has_room() and (self._previous is None or self._previous.launched.is_set())

    def _current_plan(self) -> shard_plan.Plan:
        """The plan, made anew where something moved, with everything eager copied into its staging."""
        target = self._target
        assert target is not None
        made = self._plan
        is_current = made is not None and made.holdings.is_current() and not self._freezing.is_due(made.holdings)
        holdings = (
            made.holdings
            if made is not None and is_current
            else held_tensors.collect(target.model, target.optimizers, rank=target.rank, members=target.members)
        )
        found = extras.read(target.optimizers, target.extra, holdings, rank=target.rank, values=self._values)
        if len(found.document) > extras.HEAVY_JSON_BYTES and "heavy" not in self._told:
            self._warn_of_heavy_state(found)
        if made is None or not is_current or not made.fits(found.tensors, found.document):
            metadata = {optimizer_state.METADATA_KEY: optimizer_state.describe(target.optimizers, holdings)}
            made = self._plan = shard_plan.build(
                holdings, rank=target.rank, dynamic=found.tensors, state=found.document, metadata=metadata,
                places=found.places, previous=made,
            )  # fmt: skip
            if made.signature != target.signature and "model" not in self._told:
                self._told.add("model")
                _log.warning(
                    "backstay: tensors of the model appeared, went or changed their type since restore(); a restart must "
                    "build the model as it is now before it calls restore()"
                )
        made.stage(found.tensors, found.document)
        return made

    def _warn_of_heavy_state(self, found: extras.Dynamic) -> None:
        self._told.add("heavy")
        name, size = found.heaviest()
        _log.warning(
            "backstay: %.1f MiB of each snapshot are numbers and texts that the training thread writes as JSON, about 0.1 s "
            "per MiB; most of it is %s (%.1f MiB): keep it in tensors, which are copied as bytes",
            len(found.document) / 2**20, name, size / 2**20,
        )  # fmt: skip

    def _mark_ready(self, made: shard_plan.Plan) -> torch.cuda.Event | None:
        device = next((p.source.device for p in made.pieces if p.source.device.type == "cuda"), None)
        if device is None or self._filler is None:
            return None
        return self._filler.copier(device).mark_ready()

    def _plan_ahead(self, session: Session, step: int, size_bytes: int) -> None:
        """Have the next slot reserved, if steps come as closely as they are scheduled."""
        interval = max(1, session.schedule.interval_steps)
        now = time.monotonic()
        if self._last_started is not None and step - self._last_started[0] == interval:
            session.reserve_ahead(step + interval, size_bytes, now - self._last_started[1])
        self._last_started = (step, now)

    def _settle(self, capture: Capture, session: Session) -> None:
        wait_s = self._max_wait_s if session.is_responsive else 0.0
        begin_s = time.monotonic()
        has_begun = capture.began.wait(wait_s)
        slot_s = time.monotonic() - begin_s
        if not has_begun and capture.drop(f"no slot within {wait_s:g} s"):
            capture.is_late = wait_s > 0
            session.note_stall()
            self._note_wait(session, slot_s, 0.0)
            self._warn_once(
                f"step {capture.step} is not captured: {session.tally.last_problem or capture.drop_reason}",
                key="no_slot",
            )
            return
        limit_s = _copy_limit_s(capture)
        is_copied = capture.launched.wait(limit_s)
        self._note_wait(session, slot_s, time.monotonic() - begin_s - slot_s)
        if not is_copied:
            capture.discard(f"copying took longer than {limit_s:.0f} s")
            self._warn_once(
                f"step {capture.step}: {capture.drop_reason}; training goes on, this snapshot is discarded", key="slow"
            )
            return
        if capture.state is CaptureState.DROPPED:
            return
        if capture.is_checked:
            assert self._filler is not None
            self._is_synchronous |= byte_check.check(capture, self._filler)
        if capture.device_done is not None and self._filler is not None:
            for copier in self._filler.copiers.values():
                copier.hold_stream(capture.device_done)

    def _note_wait(self, session: Session, slot_s: float, copy_s: float) -> None:
        counted_s = self._waits.note(slot_s=slot_s, copy_s=copy_s, now_s=time.monotonic())
        session.costs.add(messages.TrainerCost(waited_s=counted_s))
        warning = self._waits.warning() if "waits" not in self._told else ""
        if warning:
            self._told.add("waits")
            _log.warning("backstay: %s (further occurrences are not logged)", warning)

    # ---- sessions

    def _begin_session(
        self,
        target: Target,
        attach: messages.Attach,
        attached: messages.Attached,
        restored: messages.Restored,
        connection: DaemonConnection,
    ) -> None:
        self._target = target
        self._filler = Filler(rank=target.rank)
        identity = Identity(
            socket_path=self._socket_path,
            attach=dataclasses.replace(attach, attempt=restored.attempt),
            writer=f"backstay {__version__}, pid {os.getpid()}",
            lease_s=attached.lease_s,
        )
        self._session = Session(
            connection, identity, self._filler, interval_steps=restored.interval_steps, max_wait_s=self._max_wait_s
        )
        self._last_step = restored.step if restored.outcome != "NONE" else -1
        self._last_started = None
        self._counts = dict.fromkeys(self._counts, 0)
        self._blocked_s = self._fence_s = 0.0
        self._waits = Waits(left_out=FIRST_CHECKED)

    def _begin_probation(self, restored: messages.Restored) -> None:
        assert self._target is not None
        assert self._session is not None
        target = self._target
        holdings = held_tensors.collect(target.model, self._optimizers, rank=target.rank, members=target.members)
        self._probation = Probation(
            self._optimizers, holdings.names, base_step=restored.step, steps=restored.probation_steps,
            tell=self._session.distrust,
        )  # fmt: skip

    def _request_persist(self, timeout_s: float = 0.0) -> None:
        if self._session is not None:
            self._session.persist(timeout_s)

    def _end_session(self) -> None:
        """Cancel what is under way and let go of everything of the session."""
        if self._probation is not None:
            self._probation.close()
            self._probation = None
        capture, self._capture, self._previous = self._capture, None, None
        if capture is not None and not capture.drop("cancelled"):
            capture.launched.wait(_copy_limit_s(capture))
            if capture.is_checked:
                capture.discard("cancelled before the next optimizer step")
        if self._session is not None:
            self._session.drain(self._max_wait_s if self._session.is_responsive else 0.0)
            self._session.close()
        if self._filler is not None:
            self._filler.close()
        self._session, self._filler, self._plan = None, None, None

    def _forget_in_child(self) -> None:
        if self._session is not None:
            self._session.forget_in_child()
        # Its locks may be held for ever, its descriptors' numbers be given to others.
        self._session = self._capture = None

    def _raise_if_strict(self, session: Session) -> None:
        if self._strict and session.failure is not None:
            failure, session.failure = session.failure, None
            raise failure

    def _warn_once(self, text: str, *, key: str) -> None:
        if self._strict:
            raise UnavailableError(text)
        if key not in self._told:
            self._told.add(key)
            _log.warning("backstay: %s (said once)", text)

    def _refuse_closed(self, what: str) -> None:
        if os.getpid() != self._pid:
            raise UsageError(f"{what} in a forked child: make its own Snapshotter there", reason="forked")
        if self._is_closed:
            raise UsageError(f"{what} on a keeper that was closed", reason="closed")


def _copy_limit_s(capture: Capture) -> float:
    return 30.0 + capture.plan.layout.size_bytes / COPY_FLOOR_BYTES_PER_S


def _forget_in_child() -> None:
    for keeper in list(_keepers):
        keeper._forget_in_child()


def _close_all() -> None:
    for keeper in list(_keepers):
        keeper.close()


os.register_at_fork(after_in_child=_forget_in_child)
atexit.register(_close_all)
