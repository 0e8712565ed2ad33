"""Transformers: a callback that keeps a Trainer's state in memory, and what lets the Trainer continue from there.

    trainer = Trainer(...)
    backstay.transformers.attach(trainer, run_id="mine")
    trainer.train()                              # after a crash, the same script continues from the last step

The Trainer resumes from folders only; here six of its methods are wrapped, on this one object, and read memory instead. Must
not change the training. Imported by those who use it, never by ``import backstay``.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any, Final

import torch

from backstay.adapters.run_keeper import RunKeeper
from backstay.errors import ConfigError, UsageError
from backstay.snapshotter import RestoreResult
from backstay.trainer.data.data_position import Place, place_of

try:
    import transformers
    from accelerate import skip_first_batches
    from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerState
except ImportError as error:
    raise ImportError("backstay.transformers needs Transformers: pip install 'backstay[transformers]'") from error

from backstay.accelerate import batches_ahead, follow_prepared, refuse_unsupported

_log = logging.getLogger("backstay")

__all__ = ["BackstayCallback", "attach"]

_WRAPPED: Final = (
    "get_train_dataloader", "_init_training_state", "_prepare_for_training", "_run_epoch", "_load_rng_state",
    "get_batch_samples",
)  # fmt: skip
_FROM_MEMORY: Final = "<backstay>"  # in place of a checkpoint folder; no file of that name is read
_SUMS: Final = ("_total_loss_scalar", "_globalstep_last_logged", "current_flos")


def attach(trainer: transformers.Trainer, *, run_id: str, **options: Any) -> BackstayCallback:
    """Give ``trainer`` a :class:`BackstayCallback` that knows it; ``trainer.train()`` then restores, captures and frees.

    Args:
        trainer: A Trainer that has not begun to train.
        run_id: The training run whose state this is; a new one for a run that starts from scratch.
        **options: As of :class:`BackstayCallback`.
    """
    if not isinstance(trainer, transformers.Trainer):
        raise UsageError(
            f"attach() was given a {type(trainer).__name__}: give the transformers.Trainer, before train()"
        )
    if any(isinstance(callback, BackstayCallback) for callback in trainer.callback_handler.callbacks):
        raise UsageError("this Trainer has a BackstayCallback already; attach() once", reason="attached_twice")
    callback = BackstayCallback(run_id=run_id, **options)
    trainer.add_callback(callback)
    callback.serve(trainer)
    return callback


class BackstayCallback(RunKeeper, TrainerCallback):
    """Restores when train() has built model, optimizer and scheduler, captures after each optimizer step.

    A step is captured right before the batches after it are fetched: logging, evaluation and all callbacks of the step are
    behind it then.

    Args:
        run_id: The training run whose state this is.
        **options: ``allow_fresh``, ``deadline_s``, ``missing_ok`` and ``keep`` as of
            :class:`~backstay.adapters.run_keeper.RunKeeper`, and those of :class:`backstay.Snapshotter`.
    """

    def __init__(self, *, run_id: str, **options: Any) -> None:
        super().__init__(run_id=run_id, **options)
        self._original: dict[str, Callable[..., Any]] = {}
        self._loader: Any = None
        self._prepared: tuple[Any, Any] | None = None
        self._rest: Any = None  # what is left of an epoch that is resumed in its middle
        self._epoch = self._windows = 0
        self._left_out = 0  # batches of the epoch that were used before a checkpoint folder, from which the run began

    def serve(self, trainer: Any) -> None:
        """Wrap the methods of ``trainer`` by which it resumes."""
        missing = [name for name in _WRAPPED if not callable(getattr(trainer, name, None))]
        if missing:
            raise ConfigError(
                f"Transformers {transformers.__version__} has no Trainer.{missing[0]}(); backstay.transformers works with the "
                "Trainer of Transformers 5 (tried: 5.23.0)"
            )
        refuse_unsupported(trainer.accelerator)
        if trainer.args.ignore_data_skip:
            raise UsageError(
                "ignore_data_skip=True gives up the position in the data, without which a run cannot continue exactly: "
                "leave it out",
                reason="wrong_arguments",
            )
        self._trainer = trainer
        for name in _WRAPPED:
            self._original[name] = getattr(trainer, name)
            setattr(trainer, name, getattr(self, f"_wrapped_{name.lstrip('_')}"))

    # ---- callbacks of the Trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.keeper is None:
            raise UsageError(
                "a BackstayCallback alone cannot make the Trainer resume: use backstay.transformers.attach(trainer, "
                "run_id=...) in place of callbacks=[...]",
                reason="not_attached",
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.keeper is not None:
            self.keeper.finish(keep=self._keep)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.keeper is not None and logs and "loss" in logs:
            self.keeper.report_loss(logs["loss"])

    # ---- methods of the Trainer, in the order in which train() calls them

    def _wrapped_get_train_dataloader(self) -> Any:
        self._loader = self._original["get_train_dataloader"]()
        follow_prepared(self._loader, self._position)
        return self._loader

    def _wrapped_init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int,
        resume_from_checkpoint: str | None, trial: Any,
    ) -> tuple[int, int]:  # fmt: skip
        """The Trainer's own, and then what comes from memory: that needs the optimizer, which is built first for it."""
        trainer = self._trainer
        arguments = (max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial)
        begin: tuple[int, int] = self._original["_init_training_state"](*arguments)
        self._prepared = self._original["_prepare_for_training"](max_steps, self._loader, resume_from_checkpoint)
        restored = self._restore_into(self._prepared[0])
        self._last_step = trainer.state.global_step
        if restored.outcome == "NONE":
            return begin
        trainer.state.init_training_references(trainer, max_steps, num_train_epochs, trial)
        return self._epoch, self._windows * trainer.args.gradient_accumulation_steps

    def _wrapped_prepare_for_training(self, max_steps: int, loader: Any, resume_from_checkpoint: str | None) -> Any:
        prepared, self._prepared = self._prepared, None
        return prepared

    def _wrapped_run_epoch(self, **arguments: Any) -> Any:
        """The Trainer's own; in an epoch that is gone on with, the rest of the data is a loader's that we follow."""
        is_first = arguments["epoch"] == arguments["epochs_trained"]
        is_restored = self._is_restored() and is_first
        self._progress.load_sums()
        self._epoch, self._rest, self._loader = arguments["epoch"], None, arguments["train_dataloader"]
        if is_restored:
            arguments["resume_from_checkpoint"] = _FROM_MEMORY
        else:
            self._windows = self._left_out = 0
        used = arguments["steps_trained_in_current_epoch"]
        if is_first and used and arguments["resume_from_checkpoint"] is not None:
            if not is_restored:
                self._left_out, self._windows = used, used // self._trainer.args.gradient_accumulation_steps
            self._follow_rest(is_restored)
        return self._original["_run_epoch"](**arguments)

    def _follow_rest(self, is_restored: bool) -> None:
        """Have the batches come from where the epoch was left, by a loader with a place."""
        if not is_restored and hasattr(self._loader, "set_epoch"):
            self._loader.set_epoch(self._epoch)
        if self._left_out:
            self._loader = skip_first_batches(self._loader, self._left_out)
            follow_prepared(self._loader, self._position)
            if is_restored:
                self._loader.skip_batches = 0  # of a stream; its place counts them
        self._rest = iter(self._loader)

    def _wrapped_load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint != _FROM_MEMORY:  # from memory they are set when the first batch is fetched
            self._original["_load_rng_state"](checkpoint)

    def _wrapped_get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The Trainer's own; before it, everything of the last step is done: the moment of a snapshot."""
        step = self._trainer.state.global_step
        if self.keeper is not None and step > self._last_step:
            self._last_step = step
            self.keeper.snapshot(step)
        iterator = epoch_iterator if self._rest is None else self._rest
        samples = self._original["get_batch_samples"](iterator, num_batches, device)
        self._windows += 1
        return samples

    # ---- restoring

    def _restore_into(self, model: Any) -> RestoreResult:
        trainer = self._trainer
        if self.keeper is not None:
            raise UsageError(
                f"the callback of run {self._run_id!r} has served a train() already; a second one is another run: attach to a "
                "new Trainer, with a new run_id",
                reason="used_twice",
            )
        self._progress = _Progress(self)
        extra: dict[str, Any] = {"trainer": self._progress, "scheduler": trainer.lr_scheduler}
        if trainer.accelerator.scaler is not None:
            extra["scaler"] = trainer.accelerator.scaler
        return self._restore(model, getattr(trainer.optimizer, "optimizer", trainer.optimizer), extra)

    def _is_restored(self) -> bool:
        return self.restored is not None and self.restored.outcome != "NONE"

    def _places(self) -> list[Place]:
        place = place_of(self._loader.base_dataloader) if self._loader is not None else None
        return [] if place is None else [place]


class _Progress:
    """An extra: the Trainer's counters, sums, control and callbacks, and the place in the data."""

    def __init__(self, owner: BackstayCallback) -> None:
        self._owner = owner
        self.sums: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        owner, trainer = self._owner, self._owner._trainer
        return {
            "state": dataclasses.asdict(trainer.state),
            "callbacks": [[type(thing).__name__, thing.state()["attributes"]] for thing in _exportable(trainer)],
            "sums": {name: getattr(trainer, name, 0.0) for name in _SUMS},  # a Trainer that restores has none yet
            "loss": trainer._tr_loss.clone() if hasattr(trainer, "_tr_loss") else torch.zeros((), device="cpu"),
            "epoch": owner._epoch,
            "windows": owner._windows,
            "left_out": owner._left_out,
            "iteration": int(getattr(owner._loader, "iteration", 0)),
            "loaders": owner._position.state(batches_ahead),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        owner, trainer = self._owner, self._owner._trainer
        trainer.state = TrainerState(**state["state"])
        for thing, (name, attributes) in zip(_exportable(trainer), state["callbacks"], strict=False):
            if type(thing).__name__ != name:
                raise UsageError(
                    f"the snapshot has the state of a {name} where this Trainer has a {type(thing).__name__}; give it the same "
                    "callbacks as before the restart",
                    reason="wrong_callbacks",
                )
            for attribute, value in attributes.items():
                setattr(thing, attribute, value)
        self.sums = {**state["sums"], "_tr_loss": state["loss"]}
        owner._epoch, owner._windows, owner._left_out = state["epoch"], state["windows"], state["left_out"]
        owner._loader.iteration = state["iteration"]
        owner._position.load(state["loaders"])

    def load_sums(self) -> None:
        """Put the sums of the loss back, once, after train() has set them to zero."""
        for name, value in self.sums.items():
            if name == "_tr_loss":
                value = value.to(self._owner._trainer._tr_loss.device)
            setattr(self._owner._trainer, name, value)
        self.sums = {}


def _exportable(trainer: Any) -> list[Any]:
    return [
        thing for thing in (*trainer.callback_handler.callbacks, trainer.control) if isinstance(thing, ExportableState)
    ]
