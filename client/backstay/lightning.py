"""Lightning: a callback that keeps a Trainer's state in memory, and a CheckpointIO that stores checkpoints without pickle.

    callback = backstay.lightning.BackstayCallback(run_id="mine")
    trainer = Trainer(..., callbacks=[callback])
    trainer.fit(model, loader)                   # after a crash, the same script continues from the last step

Must not change the training. Imported by those who use it, never by ``import backstay``. Works with ``lightning`` and
``pytorch_lightning``, whichever the program imported.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch

from backstay.adapters import lightning_state
from backstay.adapters.run_keeper import RunKeeper
from backstay.errors import UsageError
from backstay.trainer.data.data_position import Place, follow, place_of
from backstay.trainer.state import state_file

_log = logging.getLogger("backstay")
_HAS_NEW_NAME = find_spec("lightning") is not None

try:
    if _HAS_NEW_NAME and "pytorch_lightning" not in sys.modules:
        from lightning.fabric.plugins import CheckpointIO
        from lightning.pytorch.callbacks import Callback
    else:
        from lightning_fabric.plugins import CheckpointIO
        from pytorch_lightning.callbacks import Callback
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem
except ImportError as error:
    raise ImportError("backstay.lightning needs Lightning: pip install 'backstay[lightning]'") from error

__all__ = ["BackstayCallback", "BackstayCheckpointIO"]

_UNSUPPORTED = {
    "FSDPStrategy": "FSDP1: use ModelParallelStrategy (FSDP2) or DDPStrategy",
    "DeepSpeedStrategy": "DeepSpeed, which keeps its own optimizer state: use DDPStrategy or ModelParallelStrategy",
    "XLAStrategy": "XLA",
    "XLAFSDPStrategy": "XLA",
}
_UNSUPPORTED_CALLBACKS = {  # by class, subclasses too: what each does that a restart in mid-epoch could not do again
    "WeightAveraging": (
        "keeps the average outside of what is captured: average with torch.optim.swa_utils.AveragedModel in a callback of your "
        'own, and pass that model as BackstayCallback(extra={"average": averaged})'
    ),
    "StochasticWeightAveraging": (
        "changes schedulers and weights between epochs: average with torch.optim.swa_utils.AveragedModel in a callback of your "
        'own, pass that model as BackstayCallback(extra={"average": averaged}), and give SWALR in configure_optimizers()'
    ),
    "BaseFinetuning": (
        "adds parameters to the optimizer while training, so that a restarted script builds another one: give it all of them "
        "in configure_optimizers(), the backbone as a group of its own whose learning rate a scheduler holds at 0 "
        "until it is to train"
    ),
}


class BackstayCallback(RunKeeper, Callback):
    """Restores when fit() begins, captures after each optimizer step, frees the run's memory when fit() ends well.

    A step is captured right before the batch after it is fetched: validation, schedulers and all hooks of the step are behind
    it then. One callback serves one fit().

    Args:
        run_id: The training run whose state this is; a new one for a run that starts from scratch.
        **options: ``allow_fresh``, ``deadline_s``, ``missing_ok`` and ``keep`` as of
            :class:`~backstay.adapters.run_keeper.RunKeeper`, and those of :class:`backstay.Snapshotter`.
    """

    def __init__(self, *, run_id: str, **options: Any) -> None:
        super().__init__(run_id=run_id, **options)
        self._parts: lightning_state.LightningState | None = None
        self._is_resuming = False
        self._undo: Callable[[], None] | None = None

    # ---- hooks of Lightning, in their order

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        if self.restored is not None:
            raise UsageError(
                f"the callback of run {self._run_id!r} has served a fit() already; make another, with a new run_id",
                reason="used_twice",
            )
        if sum(isinstance(callback, BackstayCallback) for callback in trainer.callbacks) > 1:
            raise UsageError("the Trainer has two BackstayCallbacks; give it one", reason="attached_twice")
        kind = type(trainer.strategy).__name__
        if kind in _UNSUPPORTED:
            raise UsageError(f"strategy {kind} is {_UNSUPPORTED[kind]}", reason="unsupported_strategy")
        for callback in trainer.callbacks:
            names = [base.__name__ for base in type(callback).__mro__ if base.__name__ in _UNSUPPORTED_CALLBACKS]
            if names:
                raise UsageError(
                    f"callback {type(callback).__name__} {_UNSUPPORTED_CALLBACKS[names[0]]}",
                    reason="unsupported_callback",
                )
        self._trainer = trainer
        self._follow_loaders(trainer)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        parts = self._parts = lightning_state.LightningState(trainer, self._position, _batches_ahead)
        restored = self._restore(trainer.strategy.model, trainer.optimizers, {"lightning": parts})
        if restored.outcome != "NONE":
            lightning_state.pass_over_checkpoint(trainer, restored.step)
            self._last_step, self._is_resuming = restored.step, True

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self._is_resuming:
            lightning_state.begin_pass(trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._is_resuming:
            self._is_resuming = False
            assert self._parts is not None
            self._parts.end_restart()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if self.keeper is not None and isinstance(loss, torch.Tensor):
            self.keeper.report_loss(loss)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.keeper is not None:
            self.keeper.fence()  # Lightning moves the model next

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if self.keeper is not None:
            self.keeper.finish(keep=self._keep)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """What is in memory stays there; a fit() that ended well has freed it."""
        if stage != "fit":
            return
        if self.keeper is not None:
            self.keeper.close()
        if self._undo is not None:
            self._undo()
            self._undo = None

    # ---- the data, and the moment of a snapshot

    def _follow_loaders(self, trainer: Any) -> None:
        """Have Lightning pass each loader it has made by us, before it makes an iterator of it."""
        strategy = trainer.strategy
        process = strategy.process_dataloader

        def process_dataloader(loader: object) -> object:
            followed = follow(process(loader), self._position)
            place = place_of(followed)
            assert place is not None
            place.before_fetch = self._at_fetch
            place.keeps_states = not hasattr(loader, "__len__") or _has_no_length(loader)
            return followed

        def undo() -> None:
            with contextlib.suppress(AttributeError):
                del strategy.process_dataloader

        strategy.process_dataloader = process_dataloader
        self._undo = undo

    def _places(self) -> list[Place]:
        combined = self._trainer.fit_loop._combined_loader if self._trainer is not None else None
        loaders = combined.flattened if combined is not None else []
        return [place for loader in loaders if (place := place_of(loader)) is not None]

    def _at_fetch(self, place: Place) -> None:
        trainer, keeper = self._trainer, self.keeper
        if keeper is None or self.restored is None or not trainer.training or trainer.global_step <= self._last_step:
            return
        places = self._places()
        if places and places[0] is place and lightning_state.is_within_epoch(trainer):
            self._last_step = trainer.global_step
            keeper.snapshot(trainer.global_step)

    def __getstate__(self) -> dict[str, Any]:
        if self.keeper is not None:
            raise UsageError(
                "a BackstayCallback in use cannot be copied to another process; use a strategy whose processes start before "
                "fit(), such as ddp",
                reason="unsupported_strategy",
            )
        return self.__dict__


class BackstayCheckpointIO(CheckpointIO):
    """Stores what ``trainer.save_checkpoint()`` and ModelCheckpoint save as safetensors, without pickle, verified when read.

    For ``Trainer(plugins=[BackstayCheckpointIO()])``. A path may be a URL of any fsspec file system. Its files are checkpoints
    of their own, and no steps of a run: BackstayCallback neither writes nor reads them.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write ``checkpoint``; a file that is there is replaced at once or not at all, where the file system can do so.

        Raises:
            UsageError: naming what in ``checkpoint`` would need pickle; nothing is written then.
        """
        file_system, plain = url_to_fs(str(path), **(storage_options or {}))
        file_system.makedirs(file_system._parent(plain), exist_ok=True)
        is_local = isinstance(file_system, LocalFileSystem)
        written = f"{plain}.{os.getpid()}.part" if is_local else plain
        buffer = io.BytesIO()
        try:
            with file_system.open(written, "wb") if is_local else buffer as file:
                state_file.write(file, checkpoint, name="checkpoint")
                if not is_local:
                    file_system.pipe_file(plain, buffer.getvalue())
            if is_local:
                os.replace(written, plain)
        except BaseException:
            if is_local:
                with contextlib.suppress(OSError):
                    os.unlink(written)
            raise

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """What was saved, tensors on the CPU; ``weights_only`` makes no difference, for nothing is ever unpickled.

        Raises:
            IntegrityError: if a byte is wrong, or the file is not of this class.
        """
        file_system, plain = url_to_fs(str(path))
        if not file_system.exists(plain):
            raise FileNotFoundError(f"checkpoint {path} does not exist")
        with file_system.open(plain, "rb") as file:
            loaded: dict[str, Any] = state_file.read(file, size_bytes=file_system.size(plain), label=str(path))
        return loaded

    def remove_checkpoint(self, path: Any) -> None:
        file_system, plain = url_to_fs(str(path))
        if file_system.exists(plain):
            file_system.rm(plain, recursive=True)


def _batches_ahead(place: Place) -> int:
    """Lightning fetches one batch ahead of a loader without a length."""
    return min(place.fetched, 1) if place.keeps_states else 0


def _has_no_length(loader: Any) -> bool:
    try:
        len(loader)
    except (TypeError, NotImplementedError):
        return True
    return False
