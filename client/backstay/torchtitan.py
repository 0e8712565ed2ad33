"""A torchtitan checkpoint manager: the state of every step in the nodes' memory, torchtitan's own files at their interval.

Must not change what torchtitan writes to files (its own manager does that), and never lets a file be loaded over what memory
has. Imports torchtitan, so it is imported by its users only.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from backstay.adapters.pipeline_parts import merge_parts
from backstay.errors import IntegrityError, UsageError
from backstay.ids import DEFAULT_JOB
from backstay.snapshotter import DEFAULT_MAX_WAIT_S, Snapshotter
from backstay.stats import STARTED
from backstay.trainer import rng

try:
    from torchdata.stateful_dataloader import StatefulDataLoader
    from torchtitan.components.checkpointer import DATALOADER, LR_SCHEDULER, BaseCheckpointManager, CheckpointManager
    from torchtitan.components.dataloader import ParallelAwareDataloader
except ImportError as error:
    raise ImportError(
        f"backstay.torchtitan needs torchtitan 0.3 or later ({error}): pip install 'backstay[torchtitan]'"
    ) from error

_log = logging.getLogger("backstay")

__all__ = ["BackstayCheckpointManager"]

MAY_BE_EXCLUDED: Final = frozenset({DATALOADER, LR_SCHEDULER})


class BackstayCheckpointManager(BaseCheckpointManager):
    """Set as ``config.checkpoint = BackstayCheckpointManager.Config(enable=True, run_id="...")`` in a torchtitan config.

    ``load`` looks in memory first; only a run that is provably new there is looked for in files, as torchtitan's own manager
    would (``folder``, ``initial_load_*``). ``save``, which the trainer calls after every step, snapshots into memory every
    ``snapshot_every`` steps and writes files every ``interval`` steps, unless ``files`` is False.

    Invariant: with ``load_only`` or ``create_seed_checkpoint`` memory is not touched: such a process is not the run.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        run_id: str = ""
        """The training run whose state this is; required. A new one for a run that starts from scratch."""

        job: str = DEFAULT_JOB
        """Name of the job the run belongs to."""

        socket: str = ""
        """Path of the daemon's socket; empty: $BACKSTAY_SOCKET, then backstay's default."""

        snapshot_every: int = 1
        """Steps between two snapshots in memory."""

        files: bool = True
        """Whether torchtitan's own checkpoint files are written too, every `interval` steps and at the last step."""

        allow_fresh: bool = False
        """Continue from files, or start over, if memory knows the run but has lost it; otherwise loading raises then."""

        restore_deadline_s: float = 600.0
        """How long loading may wait for the daemons' decision."""

        max_wait_s: float = DEFAULT_MAX_WAIT_S
        """How long a step may wait for a free slot."""

        strict: bool = False
        """Raise where a snapshot fails, instead of a warning."""

    def __init__(
        self,
        config: Config,
        *,
        dataloader: Any,
        model_parts: Sequence[nn.Module],
        optimizers: Any,
        lr_schedulers: Any,
        states: dict[str, Any],
        sd_adapter: Any,
        base_folder: str = "",
    ) -> None:
        self.enable = config.enable
        if not self.enable:
            return
        self._config = config
        self._is_ended = False
        self._loader = dataloader
        self._keeper: Snapshotter | None = None
        if not (config.load_only or config.create_seed_checkpoint):
            _check(config)
            extra = {**states, LR_SCHEDULER: lr_schedulers}
            if dataloader is not None:
                extra[DATALOADER] = (
                    _LoaderPosition(dataloader) if isinstance(dataloader, ParallelAwareDataloader) else dataloader
                )
            for name in config.exclude_from_loading:
                extra[name] = _NotLoaded(extra[name])
            self._keeper = Snapshotter(
                merge_parts(model_parts), list(optimizers), run_id=config.run_id, job=config.job, extra=extra,
                socket=config.socket or None, max_wait_s=config.max_wait_s, strict=config.strict,
            )  # fmt: skip
        self._files = CheckpointManager(
            _files_config(config), dataloader=dataloader, model_parts=list(model_parts), optimizers=optimizers,
            lr_schedulers=lr_schedulers, states=states, sd_adapter=sd_adapter, base_folder=base_folder,
        )  # fmt: skip

    @property
    def keeper(self) -> Snapshotter:
        """The Snapshotter, for ``stats()`` and ``fence()``; raises UsageError if memory is not used."""
        if getattr(self, "_keeper", None) is None:
            raise UsageError(
                "this checkpoint manager does not use memory (enable, load_only or create_seed_checkpoint)",
                reason="memory_unused",
            )
        assert self._keeper is not None
        return self._keeper

    @property
    def save_future(self) -> Future[Any] | None:
        """That of the files' asynchronous save; snapshots in memory never have to be waited for."""
        return self._files.save_future

    def _load(self, step: int = -1) -> bool:
        if self._keeper is not None:
            result = self._keeper.restore(
                allow_fresh=self._config.allow_fresh, deadline_s=self._config.restore_deadline_s
            )
            if result.outcome != "NONE":
                self._check_step(step, result.step)
                _begin_pass(self._loader)
                _log.info("backstay: step %d restored from memory (%s)", result.step, result.outcome)
                return True
        return bool(self._files.load(step))

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        is_started = False
        if self._keeper is not None and (curr_step % self._config.snapshot_every == 0 or last_step):
            is_started = self._keeper.snapshot(curr_step).state == STARTED
        self._is_ended = last_step
        return bool(self._files.save(curr_step, last_step)) or is_started

    def _maybe_wait_for_staging(self) -> None:
        self._files.maybe_wait_for_staging()
        if self._keeper is not None:
            self._keeper.fence()

    def _wait_for_saving(self) -> None:
        self._files.maybe_wait_for_saving()

    def _close(self) -> None:
        """Detach. After the last step the run's memory is freed, unless nothing was written to files."""
        keeper, self._keeper = getattr(self, "_keeper", None), None
        if keeper is not None and self._is_ended:
            keeper.finish(keep=not self._config.files)
        elif keeper is not None:
            keeper.close()
        if hasattr(self, "_files"):
            self._files.close()

    def _check_step(self, wanted: int, found: int) -> None:
        if wanted not in (-1, found):
            raise UsageError(
                f"load_step is {wanted}, memory holds step {found} of {self._config.job}/{self._config.run_id}: a run has one "
                "history. Set load_step=-1 to continue from memory, or a new run_id to continue from the files of that step",
                reason="wrong_step",
            )


class _LoaderPosition:
    """The position of torchtitan's data loader without the pickle that its own ``state_dict`` wraps around it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def state_dict(self) -> dict[str, Any]:
        loader = self._loader
        place = {"dp_rank": loader.dp_rank, "dp_world_size": loader.dp_world_size}
        return {**place, "position": StatefulDataLoader.state_dict(loader)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        loader = self._loader
        found, expected = (state["dp_rank"], state["dp_world_size"]), (loader.dp_rank, loader.dp_world_size)
        if found != expected:
            raise IntegrityError(
                f"the data position in memory is that of data-parallel rank {found[0]} of {found[1]}, this loader is rank "
                f"{expected[0]} of {expected[1]}, and torchtitan's loader cannot be cut differently; set "
                'exclude_from_loading=["dataloader"] to start the data over',
                reason="wrong_extras",
            )
        StatefulDataLoader.load_state_dict(loader, state["position"])


def _begin_pass(loader: Any) -> None:
    """Make the loader's iterator now: it draws a seed, which must not move the generators that were just restored."""
    if isinstance(loader, ParallelAwareDataloader):
        plain, generators = rng.read()
        StatefulDataLoader.state_dict(loader)
        rng.write(plain, generators)


class _NotLoaded:
    """An extra that is kept, and not loaded, because ``exclude_from_loading`` names it."""

    def __init__(self, stateful: Any) -> None:
        self.state_dict = stateful.state_dict

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        del state


def _check(config: BackstayCheckpointManager.Config) -> None:
    if not config.run_id:
        raise UsageError(
            "checkpoint.run_id is empty: name the training run whose state may be restored (a new name for a run that starts "
            "from scratch)",
            reason="bad_name",
        )
    if config.snapshot_every < 1:
        raise UsageError(f"checkpoint.snapshot_every is {config.snapshot_every}; at least 1", reason="bad_value")
    refused = sorted(set(config.exclude_from_loading) - MAY_BE_EXCLUDED)
    if refused:
        raise UsageError(
            f"exclude_from_loading names {', '.join(refused)}: a snapshot in memory is model, optimizers and step of one "
            f"moment and is loaded whole; only {' and '.join(sorted(MAY_BE_EXCLUDED))} can be left out",
            reason="unsupported_option",
        )


def _files_config(config: BackstayCheckpointManager.Config) -> Any:
    """The part of the configuration that torchtitan's own manager acts on."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(CheckpointManager.Config)}
    fields["load_only"] = config.load_only or not config.files
    fields["enable_first_step_checkpoint"] = config.enable_first_step_checkpoint and config.files
    return CheckpointManager.Config(**fields)
