"""The alternatives to backstay: torch.distributed.checkpoint, saving the same tensors to the same tmpfs.

Used as documented, each step in its own directory, the older one removed once the newer is complete.
"""

from __future__ import annotations

import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from bench import state as states


class Saver(Protocol):
    """How a training loop saves: called after each step; returns when training may continue."""

    def save(self, step: int) -> None: ...

    def wait(self) -> None:
        """Return when the newest save is complete."""

    def held_bytes(self) -> int:
        """Bytes of tmpfs in use for this rank's share now."""


class DcpSave:
    """``dcp.save`` at every step."""

    def __init__(self, state: states.TrainingState, directory: Path, rank: int) -> None:
        self._state = state
        self._directory = directory
        self._rank = rank
        self._newest: Path | None = None
        self.peak_bytes = 0

    def save(self, step: int) -> None:
        path = self._directory / f"step-{step}"
        save(self._tensors(), checkpoint_id=path)
        self._keep(path)

    def wait(self) -> None:
        pass

    def load(self) -> None:
        """Load the newest checkpoint in place, also one of an earlier process."""
        newest = self._newest or max(self._directory.glob("step-*"), key=lambda path: path.stat().st_mtime)
        load(self._tensors(), checkpoint_id=newest)

    def held_bytes(self) -> int:
        return self.peak_bytes

    def remove(self) -> None:
        self._newest = None
        if self._rank == 0:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _tensors(self) -> dict[str, Any]:
        tensors: dict[str, torch.Tensor] = states.tensors(self._state, prefix=f"rank{self._rank}.")
        return dict(tensors)

    def _keep(self, path: Path) -> None:
        own = f"__{self._rank}_"
        files = [file for file in self._directory.glob("*/*") if file.name.startswith(own)]
        self.peak_bytes = max(self.peak_bytes, sum(file.stat().st_size for file in files))
        if self._newest is not None and self._newest != path:
            for file in self._newest.glob(f"{own}*"):
                file.unlink(missing_ok=True)
        self._newest = path


class DcpAsyncSave(DcpSave):
    """``dcp.async_save`` at every step: the next save waits for the one before, as it must.

    Its collectives run in a thread beside the training's, so it has a process group of its own.
    """

    def __init__(self, state: states.TrainingState, directory: Path, rank: int) -> None:
        super().__init__(state, directory, rank)
        self._group = dist.new_group(backend="gloo")
        self._pending: tuple[Future[Any], Path] | None = None

    def remove(self) -> None:
        super().remove()
        dist.destroy_process_group(self._group)

    def save(self, step: int) -> None:
        self.wait()
        path = self._directory / f"step-{step}"
        future = async_save(self._tensors(), checkpoint_id=path, process_group=self._group)
        assert isinstance(future, Future)
        self._pending = (future, path)

    def wait(self) -> None:
        if self._pending is not None:
            future, path = self._pending
            self._pending = None
            future.result()
            self._keep(path)
