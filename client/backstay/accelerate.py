"""Accelerate: the state that an Accelerator has prepared, kept by a Snapshotter.

    accelerator = Accelerator()
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    keeper = backstay.accelerate.attach(accelerator, run_id="mine")
    step = keeper.restore().step
    for epoch in range(keeper.epoch, epochs):
        for batch in loader:                     # continues in mid-epoch by itself
            ...
            if accelerator.sync_gradients:
                step += 1
                keeper.snapshot(step)
    keeper.finish()

Must not change what the accelerator does. Imported by those who use it, never by ``import backstay``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, Self

import torch

from backstay.errors import UsageError
from backstay.snapshotter import RestoreResult, Snapshotter
from backstay.stats import NOT_SCHEDULED, SnapshotStatus
from backstay.trainer.data import followed_loaders
from backstay.trainer.data.data_position import Place, Position, follow, place_of

try:
    import accelerate
except ImportError as error:
    raise ImportError("backstay.accelerate needs Accelerate: pip install 'backstay[accelerate]'") from error

__all__ = ["AcceleratedSnapshotter", "attach", "refuse_unsupported"]

_ATTRIBUTE: Final = "_backstay_keeper"
_UNSUPPORTED: Final = {
    "DEEPSPEED": "DeepSpeed, which keeps its own optimizer state: use backstay.deepspeed",
    "MEGATRON_LM": "Megatron-LM",
    "XLA": "XLA",
}


def attach(accelerator: accelerate.Accelerator, *, run_id: str, **options: Any) -> AcceleratedSnapshotter:
    """Keep what ``accelerator`` has prepared; call it after the last ``prepare()`` and ``register_for_checkpointing()``.

    Args:
        accelerator: Its models, optimizers, schedulers, loaders, gradient scaler and registered objects are kept.
        run_id: The training run whose state this is; a new one for a run that starts from scratch.
        **options: As of :class:`backstay.Snapshotter`: ``job``, ``extra``, ``socket``, ``max_wait_s``, ``strict``...

    Raises:
        UsageError: attached already, nothing prepared, or FSDP1, DeepSpeed, Megatron-LM or XLA.
    """
    if not isinstance(accelerator, accelerate.Accelerator):
        raise UsageError(f"attach() was given a {type(accelerator).__name__}: give the accelerate.Accelerator")
    return AcceleratedSnapshotter(accelerator, run_id=run_id, **options)


class AcceleratedSnapshotter:
    """A Snapshotter of everything that an accelerator prepared, the place in the data with it."""

    def __init__(
        self,
        accelerator: accelerate.Accelerator,
        *,
        run_id: str,
        extra: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        refuse_unsupported(accelerator)
        followed_loaders.refuse(extra or {}, "backstay.accelerate")
        if getattr(accelerator, _ATTRIBUTE, None) is not None:
            raise UsageError(
                "this accelerator has a keeper already: call attach() once, and close() or finish() before another",
                reason="attached_twice",
            )
        models, optimizers = list(accelerator._models), [wrapped.optimizer for wrapped in accelerator._optimizers]
        if not models or not optimizers:
            raise UsageError(
                f"the accelerator has prepared {len(models)} models and {len(optimizers)} optimizers: call "
                "accelerator.prepare(model, optimizer, loader, ...) before attach()",
                reason="not_prepared",
            )
        self.epoch = 0
        self._accelerator = accelerator
        self._loaders = list(accelerator._dataloaders)
        self._position = Position(lambda: [place for loader in self._loaders if (place := _place(loader)) is not None])
        for loader in self._loaders:
            follow_prepared(loader, self._position)
        self._keeper = Snapshotter(
            models[0] if len(models) == 1 else torch.nn.ModuleList(models),
            optimizers,
            run_id=run_id,
            extra={**_stateful_parts(accelerator), "accelerate": _Progress(self), **(extra or {})},
            **options,
        )
        setattr(accelerator, _ATTRIBUTE, self)

    def restore(
        self, *, allow_fresh: bool = False, deadline_s: float = 600.0, missing_ok: Iterable[str] = ()
    ) -> RestoreResult:
        """As :meth:`backstay.Snapshotter.restore`; loaders continue where they were, at their next ``for``.

        :attr:`epoch` is then the epoch to continue with. After a snapshot of an epoch's last batch, that epoch has no batches
        left, so that what follows the batches runs once.
        """
        result = self._keeper.restore(allow_fresh=allow_fresh, deadline_s=deadline_s, missing_ok=missing_ok)
        if result.outcome != "NONE":
            self._position.arm()
        return result

    def snapshot(self, step: int) -> SnapshotStatus:
        """Capture the state after ``step`` optimizer steps; nothing happens while gradients are being accumulated."""
        if not self._accelerator.sync_gradients:
            return SnapshotStatus(step=step, state=NOT_SCHEDULED, reason="gradients are being accumulated")
        return self._keeper.snapshot(step)

    def finish(self, *, keep: bool = False, timeout_s: float = 60.0) -> None:
        """As :meth:`backstay.Snapshotter.finish`."""
        self._keeper.finish(keep=keep, timeout_s=timeout_s)
        setattr(self._accelerator, _ATTRIBUTE, None)

    def close(self) -> None:
        """As :meth:`backstay.Snapshotter.close`."""
        self._keeper.close()
        setattr(self._accelerator, _ATTRIBUTE, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        if name == "_keeper":
            raise AttributeError(name)
        return getattr(self._keeper, name)


class _Progress:
    """The accelerator's counters, and the positions of its loaders."""

    def __init__(self, owner: AcceleratedSnapshotter) -> None:
        self._owner = owner

    def state_dict(self) -> dict[str, Any]:
        owner = self._owner
        places = owner._position.state(batches_ahead)
        iterations = [int(getattr(loader, "iteration", 0)) for loader in owner._loaders]
        current = next((i for i, place in zip(iterations, places, strict=True) if place["open"]), None)
        epoch = current if current is not None else (iterations[0] if iterations else 0)
        return {"step": owner._accelerator.step, "epoch": epoch, "iterations": iterations, "loaders": places}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        owner = self._owner
        if len(state["loaders"]) != len(owner._loaders):
            raise UsageError(
                f"the snapshot has {len(state['loaders'])} prepared loaders, this accelerator {len(owner._loaders)}; prepare "
                "the same ones as before the restart",
                reason="wrong_loader",
            )
        owner._accelerator.step = state["step"]
        owner.epoch = state["epoch"]
        owner._position.load(state["loaders"])
        for loader, iteration, place in zip(owner._loaders, state["iterations"], state["loaders"], strict=True):
            if hasattr(loader, "iteration"):
                # a pass without batches does not count in Accelerate
                loader.iteration = iteration + (place["open"] and place["done"])


def refuse_unsupported(accelerator: accelerate.Accelerator) -> None:
    """Raise UsageError for a way of distributing whose state backstay cannot read."""
    kind = accelerator.distributed_type.name
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if kind == "FSDP" and getattr(plugin, "fsdp_version", 1) != 2:
        problem = "FSDP1, which is not supported: set fsdp_version=2 (torch.distributed.fsdp.fully_shard)"
    elif kind in _UNSUPPORTED:
        problem = f"{_UNSUPPORTED[kind]}, which this adapter does not support"
    else:
        return
    raise UsageError(f"this accelerator distributes by {problem}", reason="unsupported_strategy")


def follow_prepared(loader: Any, position: Position) -> None:
    """Follow the loader inside a prepared one."""
    count = _dispatched(loader)
    base = follow(loader.base_dataloader, position, depth=max(1, count))
    place = place_of(base)
    assert place is not None
    place.prepared = loader
    if place.source is not None:
        place.source = loader  # its state counts the batches that it has yielded
    loader.base_dataloader = base


def batches_ahead(place: Place) -> int:
    """How many batches a prepared loader has taken from its inner one and not yielded yet."""
    loader = place.prepared
    if place.fetched == 0 or loader.end_of_dataloader:
        return 0
    count = _dispatched(loader)
    return (place.fetched % count or count) if count else 1


def _dispatched(loader: Any) -> int:
    """Batches that a DataLoaderDispatcher takes at once; 0 for other loaders."""
    if type(loader).__name__ != "DataLoaderDispatcher":
        return 0
    return 1 if loader.split_batches else int(loader.state.num_processes)


def _place(loader: Any) -> Place | None:
    return place_of(loader.base_dataloader)


def _stateful_parts(accelerator: accelerate.Accelerator) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for index, scheduler in enumerate(accelerator._schedulers):
        parts[f"scheduler-{index}"] = scheduler
    for index, thing in enumerate(accelerator._custom_objects):
        parts[f"custom-{index}"] = thing
    if accelerator.scaler is not None:
        parts["scaler"] = accelerator.scaler
    return parts
