"""A DeepSpeed checkpoint engine: save_checkpoint() into the nodes' memory, load_checkpoint() from it after a restart.

Must not unpickle, and never writes what would have to be. The folder keeps a line of text in place of each file, because
DeepSpeed looks for files by name; their bytes lie in memory only. Imports DeepSpeed, so it is imported by its users only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from pathlib import Path
from typing import Any, Final

import torch

from backstay.errors import BackstayError, IntegrityError, SnapshotNotFoundError, UsageError
from backstay.ids import DEFAULT_JOB
from backstay.stores.file_store import FileStore
from backstay.trainer.state import packing

try:
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address
except ImportError as error:
    raise ImportError(
        f"backstay.deepspeed needs DeepSpeed 0.16 or later ({error}): pip install 'backstay[deepspeed]'"
    ) from error

_log = logging.getLogger("backstay")

__all__ = ["BackstayCheckpointEngine"]

DEFAULT_MAX_WAIT_S: Final = 10.0
COMPLETE_S: Final = 30.0
PAUSE_S: Final = 0.05
LATEST: Final = "latest"  # the file in which DeepSpeed keeps the newest tag
_NUMBERED: Final = re.compile(r".*?(\d+)\Z")
_PLACE: Final = "backstay: the bytes of this file are kept in memory, as {name} of run {run}\n"
# What DeepSpeed puts into its checkpoints besides tensors and plain values, by name: rebuilt from plain attributes.
_OBJECTS: Final[dict[str, type[Any]]] = {cls.__name__: cls for cls in (DynamicLossScaler, LossScaler, fragment_address)}
_ENUMS: Final[dict[str, Any]] = {cls.__name__: cls for cls in (ZeroStageEnum,)}


class BackstayCheckpointEngine(CheckpointEngine):
    """Set it on an engine that ``deepspeed.initialize`` returned, on all ranks, before the first save or load:

        engine.checkpoint_engine = BackstayCheckpointEngine(run_id="bert-1", save_dir="checkpoints")
        if engine.checkpoint_engine.tag:
            engine.load_checkpoint("checkpoints")

    Making it joins the world of the run: a collective. ``tag`` is what memory holds then; empty for a run that is provably
    new. One checkpoint is kept, the newest that every rank saved.

    Args:
        run_id: The training run whose state this is; a new one for a run that starts from scratch.
        save_dir: The folder that is given to ``save_checkpoint`` and ``load_checkpoint``.
        job: Name of the job the run belongs to.
        socket: Path of the daemon's socket; default ``$BACKSTAY_SOCKET``, then ``/run/backstay/backstayd.sock``.
        allow_fresh: Start over if memory knows the run but has lost it.
        restore_deadline_s: How long to wait for the daemons' decision.
        max_wait_s: How long a save may wait for a free slot.
        strict: Raise where memory cannot take a checkpoint, instead of a warning.

    Raises:
        UnavailableError: no daemon, or not all ranks in time. UnrecoverableError: a known run without a restorable snapshot.
    """

    def __init__(
        self,
        *,
        run_id: str,
        save_dir: str | os.PathLike[str],
        job: str = DEFAULT_JOB,
        socket: str | os.PathLike[str] | None = None,
        allow_fresh: bool = False,
        restore_deadline_s: float = 600.0,
        max_wait_s: float = DEFAULT_MAX_WAIT_S,
        strict: bool = False,
    ) -> None:
        super().__init__()
        self.name = type(self).__name__
        self.tag = ""
        self._folder = Path(os.path.abspath(save_dir))
        self._strict = strict
        self._saving: tuple[str, int] | None = None  # between create() and commit()
        self._places: dict[str, list[Path]] = {}  # tag -> what this rank put into the folder
        self._store = FileStore(run_id=run_id, job=job, socket=socket, max_wait_s=max_wait_s)
        step = self._store.begin(allow_fresh=allow_fresh, deadline_s=restore_deadline_s)
        if step is not None:
            self._show(sorted(self._store.names()))
        self._begun = self.tag  # what this world began from
        _log.info("backstay: DeepSpeed checkpoints of %s in memory: %s", self._store.run, self.tag or "none yet")

    # ---- what DeepSpeed calls

    def create(self, info: CheckpointCommitInfo) -> None:
        """A checkpoint begins; raises UsageError for a tag that cannot be ordered or another folder."""
        if Path(os.path.abspath(info.save_dir)) != self._folder:
            raise UsageError(
                f"a checkpoint for folder {info.save_dir}, this checkpoint engine was made for {self._folder}: one engine has "
                "one save_dir",
                reason="wrong_folder",
            )
        step = self._step_of(info.tag)
        self._give_up("it was never committed")
        self._store.hold(step, info.tag)
        self._saving = (info.tag, step)

    def save(self, state_dict: Any, path: str) -> None:
        """Take a copy of ``state_dict``, to be kept as the file ``path``; raises UsageError naming what would need pickle."""
        name = self._name(path)
        if self._saving is None or name.partition("/")[0] != self._saving[0]:
            self._give_up(f"{path} is not a file of it")
            raise UsageError(
                f"{path} is not a file of the checkpoint that is being saved: only save_checkpoint() goes to memory. For "
                "save_16bit_model() and the like set engine.checkpoint_engine back to DeepSpeed's own",
                reason="unsupported_call",
            )
        try:
            self._store.write(self._saving[1], name, packing.as_file(packing.pack(state_dict, _take)))
        except BaseException as error:
            self._give_up(str(error))
            raise
        self._places.setdefault(self._saving[0], []).append(self._put_place(name))

    def load(self, path: str, map_location: Any = None) -> Any:
        """The state that was saved as ``path``, verified; tensors on the CPU unless ``map_location`` is a device.

        Raises:
            SnapshotNotFoundError: memory does not hold that checkpoint. IntegrityError: a byte is wrong.
        """
        name = self._name(path)
        try:
            data = self._read(name)
        except (FileNotFoundError, SnapshotNotFoundError) as error:
            raise SnapshotNotFoundError(
                f"{path} is not in memory, which holds {self.tag or 'no checkpoint'} of {self._store.run}. To start from files "
                "on disk, call engine.load_checkpoint() before you set this checkpoint engine",
                reason="no_checkpoint",
            ) from error
        device = str(map_location) if isinstance(map_location, (str, torch.device)) else "cpu"
        return packing.unpack(packing.from_file(memoryview(data)), _give, device=device)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Commit this rank's files; False (and a warning) if memory could not take them: the checkpoint before stays."""
        if self._saving is None or self._saving[0] != info.tag:
            return False
        step = self._saving[1]
        self._saving = None
        self._store.release()
        try:
            self._store.commit(step)
        except BackstayError as error:
            if self._strict:
                raise
            _log.warning("backstay: checkpoint %s is not kept in memory: %s", info.tag, error)
            return False
        self.tag = info.tag
        for tag in [tag for tag in self._places if tag != info.tag]:
            _remove(self._places.pop(tag))
        return True

    def preserves_storage_sharing(self) -> bool:
        """False: DeepSpeed need not clone tensors that share memory before it saves them."""
        return False

    # ---- the end

    def finish(self, *, keep: bool = False) -> None:
        """The run ended well: free its memory everywhere (``keep=True``: it stays until ``job_ttl_s``), and detach."""
        self._store.finish(keep=keep)
        if not keep:
            self._clear()

    def close(self) -> None:
        """Detach; what was saved stays in memory."""
        self._store.close()

    # ---- inside

    def _read(self, name: str) -> memoryview:
        """The bytes of a file; waits a while for what this process saved last: other ranks may be committing theirs."""
        deadline = time.monotonic() + COMPLETE_S
        while True:
            try:
                return self._store.read(name)
            except (FileNotFoundError, SnapshotNotFoundError):
                is_new = name.partition("/")[0] == self.tag and self.tag != self._begun
                if not is_new or time.monotonic() >= deadline:
                    raise
            threading.Event().wait(PAUSE_S)

    def _give_up(self, reason: str) -> None:
        """Abandon the checkpoint that is being saved, if one is."""
        if self._saving is not None:
            step = self._saving[1]
            self._saving = None
            self._store.release()
            self._store.abandon(step, reason)

    def _step_of(self, tag: str) -> int:
        found = _NUMBERED.fullmatch(tag)
        if found is None or "/" in tag:
            raise UsageError(
                f"checkpoint tag {tag!r} does not end with a number; snapshots in memory are ordered by it: use "
                "tag=f'global_step{n}' or leave the tag out",
                reason="bad_tag",
            )
        step = int(found.group(1))
        if step <= self._store.newest_step:
            raise UsageError(
                f"checkpoint {tag} comes after step {self._store.newest_step} of {self._store.run}: numbers of tags must "
                "increase; a checkpoint in memory is not written over",
                reason="step_not_increasing",
            )
        return step

    def _name(self, path: str) -> str:
        """``<tag>/<file>`` for a path in the folder."""
        try:
            return Path(os.path.abspath(path)).relative_to(self._folder).as_posix()
        except ValueError:
            raise UsageError(
                f"{path} is not in {self._folder}, the folder this checkpoint engine was made for",
                reason="wrong_folder",
            ) from None

    def _show(self, names: list[str]) -> None:
        """Have the folder look as DeepSpeed left it, on whatever machine this is; real files are left as they are."""
        for name in names:
            tag = name.partition("/")[0]
            self._places.setdefault(tag, []).append(self._put_place(name))
            self.tag = tag
        scratch = self._folder / f".{LATEST}-{os.getpid()}"
        scratch.write_text(self.tag, encoding="utf-8")
        scratch.replace(self._folder / LATEST)

    def _put_place(self, name: str) -> Path:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
            file.write(_PLACE.format(name=name, run=self._store.run))
        return path

    def _clear(self) -> None:
        for tag in list(self._places):
            _remove(self._places.pop(tag))


def _remove(paths: list[Path]) -> None:
    """Delete the placeholder files, and the folders that are empty then."""
    for path in paths:
        with contextlib.suppress(OSError):  # another rank of this node may have deleted it
            with path.open("rb") as file:
                is_ours = file.read(9) == b"backstay:"
            if is_ours:
                path.unlink()
            path.parent.rmdir()


def _take(value: Any) -> tuple[str, Any] | None:
    kind = type(value).__name__
    if type(value) is _OBJECTS.get(kind):
        return kind, dict(vars(value))
    if type(value) is _ENUMS.get(kind):
        return kind, value.value
    return None


def _give(kind: str, body: Any) -> Any:
    if kind in _ENUMS:
        return _ENUMS[kind](body)
    if kind not in _OBJECTS:
        raise IntegrityError(f"the checkpoint holds a {kind}, which this version does not make", reason="bad_state")
    made: Any = object.__new__(_OBJECTS[kind])
    made.__dict__.update(body)
    return made
