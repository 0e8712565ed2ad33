"""The public API of training code: restore() once, snapshot() after each step, finish() at the end.

Must never stop, slow by surprise or change a training run: a failed snapshot is a warning (``strict=True`` raises).
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import os
import time
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Final, Self

import torch

from backstay._version import __version__
from backstay.capture.capturer import Capturer, Settings, Warnings
from backstay.capture.fence import Fence
from backstay.capture.sigterm import SigtermHook
from backstay.errors import UsageError
from backstay.ids import DEFAULT_JOB, RunKey
from backstay.protocol import messages
from backstay.protocol.connection import find_socket
from backstay.restore.load import Target
from backstay.restore.probation import Probation
from backstay.restore.restore import Restoration, restore
from backstay.restore.result import RestoreResult, make_result
from backstay.session.progress import announce
from backstay.stats import REFUSED, SnapshotStatus, Stats
from backstay.trainer import argument_checks, distributed_tensors, local_tensors, optimizer_state, uncaptured_state
from backstay.trainer.data import followed_loaders
from backstay.trainer.process_group import agree_on_id, current_world

_log = logging.getLogger("backstay")

__all__ = ["RestoreResult", "SnapshotStatus", "Snapshotter", "Stats"]

DEFAULT_MAX_WAIT_S: Final = 3.0
DEFAULT_CHECK_EVERY: Final = 50

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
            which continue with the next batch at their next ``for``. Plain values belong into :attr:`values`.
        socket: Path of the daemon's socket; default ``$BACKSTAY_SOCKET``, then ``/run/backstay/backstayd.sock``.
        max_wait_s: How long a step may wait at the fence for a free slot, in seconds.
        strict: Raise where a snapshot fails, instead of a warning.
        check_every: Every so many snapshots, and for the first two, the copy is compared byte for byte at the fence; 0: for the
            first two only.
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
        self._model = argument_checks.model_of(model)
        self._optimizers = argument_checks.optimizers_of(optimizer)
        self._run = RunKey(job, run_id)
        self._extra = followed_loaders.follow_all(argument_checks.extra_of(extra))
        self._values: dict[str, Any] = {}
        self._socket_path = find_socket(socket)
        self._group = argument_checks.process_group_of(process_group)
        self._settings = Settings(
            max_wait_s=argument_checks.seconds_of("max_wait_s", max_wait_s),
            check_every=argument_checks.count_of("check_every", check_every),
            strict=strict,
        )
        self._warnings = Warnings(strict=strict)
        self._pid = os.getpid()
        self._capturer: Capturer | None = None  # from restore() on
        self._probation: Probation | None = None
        self._sigterm: SigtermHook | None = None
        self._has_sigterm = persist_on_sigterm
        self._is_closed = False
        self._fence = Fence(self._optimizers, self.fence)
        self._last_stats = Stats(is_synchronous=self._fence.is_synchronous)
        if self._fence.unhooked:
            names = ", ".join(type(o).__name__ for o in self._fence.unhooked)
            _log.warning(
                "backstay: %s runs no step hooks; snapshots are copied synchronously, before snapshot() returns", names
            )
        _keepers.add(self)

    def restore(
        self, *, allow_fresh: bool = False, deadline_s: float = 600.0, missing_ok: Iterable[str] = ()
    ) -> RestoreResult:
        """Restore model, optimizers, extras and generators to the newest step that all ranks can have; step 0 of a new run.

        A collective: all ranks call it. Blocks up to ``deadline_s``. Tensors are written in place. The snapshot may be of
        another number of ranks or another parallelism; this rank's parts are assembled from it.

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
        begin_s = time.monotonic()
        deadline = begin_s + argument_checks.seconds_of("deadline_s", deadline_s)
        missing_ok = argument_checks.names_of("missing_ok", missing_ok)
        self._end_captures()
        target, identity = self._describe(missing_ok, deadline_s=deadline - begin_s)
        restoration = restore(self._socket_path, identity, target, allow_fresh=allow_fresh, deadline=deadline)
        restored, loaded = restoration.restored, restoration.loaded
        self._capturer = Capturer(
            target, restoration, values=lambda: self._values, fence=self._fence, settings=self._settings,
            warnings=self._warnings,
        )  # fmt: skip
        if self._has_sigterm and self._sigterm is None:
            self._sigterm = SigtermHook(self._request_persist)
        if loaded is not None:
            self._probation = self._begin_probation(target, self._capturer, restoration)
        announce(identity.run, restored, rank=target.rank)
        return make_result(restored, loaded, seconds=time.monotonic() - begin_s)

    @property
    def values(self) -> dict[str, Any]:
        """The script's own numbers, texts, lists and dictionaries, such as its epoch: each snapshot holds what is in it at that
        moment, and restore() makes it that again. Another dictionary may be put in its place."""
        return self._values

    @values.setter
    def values(self, values: dict[str, Any]) -> None:
        self._values = argument_checks.values_of(values)

    def report_loss(self, loss: float | torch.Tensor) -> None:
        """Check the loss of the current step, for the first steps after a restore; free afterwards.

        NaN or infinity then means that what was restored is bad: the next restore() takes an older snapshot. Never stops
        training. Gradients are checked without this, where the optimizer runs step hooks.
        """
        if self._probation is not None and os.getpid() == self._pid:
            self._probation.see_loss(loss)

    def snapshot(self, step: int) -> SnapshotStatus:
        """Capture the state after ``step`` completed optimizer steps; returns at once.

        Buffers, generators, scalars and extras are copied now, parameters and optimizer state until the next optimizer step.

        Raises:
            UsageError: before restore(), or for a step that is not an int of at least 1 or does not increase. Other errors only
                with ``strict``.
        """
        if os.getpid() != self._pid:
            return SnapshotStatus(step=step, state=REFUSED, reason="this is a forked child")
        self._refuse_closed("snapshot()")
        if self._capturer is None:
            raise UsageError(
                "snapshot() before restore(): call restore() first, also for a new run", reason="not_restored"
            )
        step = argument_checks.step_of("snapshot", step)
        if self._probation is not None:
            self._probation.note_step(step)
        return self._capturer.snapshot(step)

    def fence(self) -> None:
        """Wait until the running capture no longer reads parameters and optimizer state.

        Called by the optimizers' hooks; call it yourself before changing parameters by hand (EMA swaps, SAM, ``.data``, a
        captured CUDA graph). Cheap, re-entrant, and for any thread: autograd's may step optimizers too. Never raises unless
        ``strict``.
        """
        if self._capturer is not None and os.getpid() == self._pid:
            self._capturer.settle()

    def persist(self) -> None:
        """Have the newest protected snapshot copied to durable storage now, by the daemons; returns at once.

        The copy continues when the trainer has ended. Needs ``persist_url`` of the coordinator; logs a warning without.
        """
        if os.getpid() == self._pid:
            self._request_persist(0.0)

    def finish(self, *, keep: bool = False, timeout_s: float = 60.0) -> None:
        """The run ended well: free its memory everywhere (``keep=True``: it stays until ``job_ttl_s``), and close."""
        if os.getpid() != self._pid or self._is_closed:
            return
        timeout_s = argument_checks.seconds_of("timeout_s", timeout_s)
        try:
            self.fence()
            if self._capturer is not None and not self._capturer.background.finish(keep=keep, timeout_s=timeout_s):
                _log.warning(
                    "backstay: the daemon could not be informed that run %s ended; `backstay forget` frees its memory",
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
            self._end_captures()
            self._extra = {}  # a loader's workers end with it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stats(self) -> Stats:
        """What snapshots cost and came to since the last restore()."""
        return self._capturer.stats() if self._capturer is not None else self._last_stats

    def wait_committed(self, timeout_s: float = 60.0) -> bool:
        """Wait until no capture is under way (a checked one ends with the next fence); False if the time is over."""
        timeout_s = argument_checks.seconds_of("timeout_s", timeout_s)
        return self._capturer is None or self._capturer.background.wait_captures(timeout_s)

    # ---- inside

    def _describe(self, missing_ok: frozenset[str], *, deadline_s: float) -> tuple[Target, messages.Attach]:
        """What is to be restored, and what this rank attaches with; a collective: rank 0 draws the world's id."""
        place = current_world(self._group)
        uncaptured_state.warn(self._model)
        distributed_tensors.reshard(self._model)
        holdings = local_tensors.collect(self._model, self._optimizers, rank=place.rank, members=place.members)
        optimizer_state.read_values(self._optimizers, holdings, {})  # raises here, not at the first snapshot
        target = Target(
            model=self._model, optimizers=self._optimizers, extra=self._extra, rank=place.rank, world_size=place.size,
            run=str(self._run), signature=local_tensors.model_signature(holdings), members=place.members, values=self.values,
            missing_ok=missing_ok,
        )  # fmt: skip
        identity = messages.Attach(
            run=str(self._run), world_id=agree_on_id(place, deadline_s=deadline_s),
            rank=place.rank, world_size=place.size, needs=holdings.needs, model_signature=target.signature,
            collective_timeout_s=place.collective_timeout_s,
            client_version=__version__, layout=local_tensors.layout_signature(holdings),
        )  # fmt: skip
        return target, identity

    def _begin_probation(self, target: Target, capturer: Capturer, restoration: Restoration) -> Probation:
        restored = restoration.restored
        holdings = local_tensors.collect(target.model, self._optimizers, rank=target.rank, members=target.members)
        return Probation(
            self._optimizers, holdings.names, base_step=restored.step, steps=restored.probation_steps,
            report=capturer.background.distrust,
        )  # fmt: skip

    def _request_persist(self, timeout_s: float) -> None:
        if self._capturer is not None:
            self._capturer.background.persist(timeout_s)

    def _end_captures(self) -> None:
        """Cancel what is under way and end the session with the daemon."""
        if self._probation is not None:
            self._probation.close()
            self._probation = None
        capturer, self._capturer = self._capturer, None
        if capturer is not None:
            capturer.close()
            self._last_stats = dataclasses.replace(capturer.stats(), is_attached=False)

    def _forget_in_child(self) -> None:
        self._capturer = None  # its locks may be held for ever

    def _refuse_closed(self, what: str) -> None:
        if os.getpid() != self._pid:
            raise UsageError(f"{what} in a forked child: make its own Snapshotter there", reason="forked")
        if self._is_closed:
            raise UsageError(f"{what} on a keeper that was closed", reason="closed")


def _forget_in_child() -> None:
    for keeper in list(_keepers):
        keeper._forget_in_child()


def _close_all() -> None:
    for keeper in list(_keepers):
        keeper.close()


os.register_at_fork(after_in_child=_forget_in_child)
atexit.register(_close_all)
