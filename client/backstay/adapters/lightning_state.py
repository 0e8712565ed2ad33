"""What a Lightning Trainer holds besides model and optimizers, and where its loops resume.

Reads and writes the Trainer's own loops, as Lightning's checkpoint connector does. Must not import Lightning: it is given a
Trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

from backstay.errors import UsageError
from backstay.trainer.data.data_position import Place, Position

_VERSION: Final = "pytorch-lightning_version"


class LightningState:
    """An extra: loops, callbacks, schedulers, precision plugin, data module and the place in the data."""

    def __init__(self, trainer: Any, position: Position, ahead: Callable[[Place], int]) -> None:
        self._trainer, self._position, self._ahead = trainer, position, ahead
        self._accumulate: int | None = None
        self._call = import_module(type(trainer).__module__.rpartition(".")[0] + ".call")

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        state: dict[str, Any] = {
            "loops": _read_loops(trainer),
            "loaders": self._position.state(self._ahead),
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "precision": trainer.precision_plugin.state_dict(),
            "accumulate_grad_batches": trainer.accumulate_grad_batches,  # a callback sets it when an epoch begins
            "callbacks": self._call._call_callbacks_state_dict(trainer),
            "datamodule": trainer.datamodule.state_dict() if trainer.datamodule is not None else {},
        }
        state["hooks"] = self._read_hooks(state)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        trainer = self._trainer
        checkpoint = {**_frame(trainer, state), **state["hooks"]}
        if trainer.datamodule is not None:
            trainer.datamodule.load_state_dict(state["datamodule"])
        self._call._call_lightning_module_hook(trainer, "on_load_checkpoint", checkpoint)
        self._call._call_callbacks_on_load_checkpoint(trainer, checkpoint)
        self._call._call_callbacks_load_state_dict(trainer, checkpoint)
        trainer.precision_plugin.load_state_dict(state["precision"])
        self._accumulate = state["accumulate_grad_batches"]
        if state["loops"]["epoch_loop.batch_progress"]["current"]["ready"] == 0:
            self._accumulate = None  # the epoch restarts, and sets it
        trainer.fit_loop.load_state_dict(state["loops"])
        for config, scheduler in zip(trainer.lr_scheduler_configs, state["schedulers"], strict=True):
            config.scheduler.load_state_dict(scheduler)
        self._position.load(state["loaders"])

    def end_restart(self) -> None:
        """Have the epoch end like any other: Lightning would treat it as restarted to its end, and skip some schedulers."""
        self._trainer.fit_loop._restarting = False
        if self._accumulate is not None:  # not before the first batch: a callback checks that it alone sets it
            self._trainer.accumulate_grad_batches = self._accumulate

    def _read_hooks(self, state: dict[str, Any]) -> dict[str, Any]:
        """What ``on_save_checkpoint`` of module and callbacks put into a checkpoint."""
        trainer = self._trainer
        checkpoint = _frame(trainer, state)
        known = set(checkpoint)
        try:
            self._call._call_callbacks_on_save_checkpoint(trainer, checkpoint)
            self._call._call_lightning_module_hook(trainer, "on_save_checkpoint", checkpoint)
        except KeyError as error:
            raise UsageError(
                f"an on_save_checkpoint() of the module or a callback wants {error} of the checkpoint, which is not in what "
                "backstay passes: weights and optimizer state are kept apart; keep what it needs in state_dict()",
                reason="unsupported_state",
            ) from error
        return {key: value for key, value in checkpoint.items() if key not in known}


def is_within_epoch(trainer: Any) -> bool:
    """Whether an epoch has begun and not ended: between epochs the loops cannot be resumed."""
    current = trainer.fit_loop.epoch_progress.current
    return bool(current.started == current.ready == current.completed + 1)


def begin_pass(trainer: Any) -> None:
    """Where the first batch of an epoch is next, have Lightning begin that epoch as one that is new."""
    if trainer.fit_loop.epoch_loop.batch_progress.current.ready == 0:
        trainer.fit_loop.epoch_loop.restarting = False


def pass_over_checkpoint(trainer: Any, step: int) -> None:
    """Keep what came from memory: the file of ``fit(ckpt_path=...)`` is not loaded over it.

    Raises:
        UsageError: if the file is newer than what memory held.
    """
    connector = trainer._checkpoint_connector
    loaded = connector._loaded_checkpoint
    if loaded and loaded.get("global_step", 0) > step:
        raise UsageError(
            f"fit(ckpt_path=...) gave a checkpoint of step {loaded['global_step']}, memory holds step {step} of this run; "
            "leave ckpt_path out to continue from memory, or take a new run_id to continue from the file",
            reason="checkpoint_is_newer",
        )
    connector._loaded_checkpoint, connector._ckpt_path = {}, None


def _frame(trainer: Any, state: dict[str, Any]) -> dict[str, Any]:
    return {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        _VERSION: import_module(type(trainer).__module__.partition(".trainer")[0]).__version__,
        "callbacks": state["callbacks"],
    }


def _read_loops(trainer: Any) -> dict[str, Any]:
    """The loops' state in a form from which Lightning continues with the next batch.

    In the middle of an epoch: as if the last batch's ``on_train_batch_end`` were running. Lightning then completes that batch,
    and does not run its validation again.
    """
    loops: dict[str, Any] = trainer.fit_loop.state_dict()
    loops["state_dict"].pop("combined_loader", None)  # the loaders are followed
    progress = loops["epoch_loop.batch_progress"]
    if progress["current"]["ready"] > 0:
        progress["current"]["completed"] -= 1
        progress["total"]["completed"] -= 1
        if not trainer.fit_loop._should_accumulate():
            loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
    return loops
