"""A memory directory and the index of what lies in it: the lock, and the small records that survive the daemon.

Everything is a file; the index is what a listing shows. Knows nothing of grants and limits.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from backstay.errors import ConfigError, UnavailableError, UsageError
from backstay.format import json_records
from backstay.ids import Generation, RunKey
from backstayd.core.messages.decisions import Decision, Distrusted
from backstayd.core.messages.tombstone import Tombstone, trimmed
from backstayd.store import limits
from backstayd.store.adopt import FORGOTTEN_NAME, GENERATION_NAME, LOCK_NAME, Distrust, Forgotten, Owner
from backstayd.store.index import UNKNOWN_UID, RunIndex
from backstayd.store.paths import RunPaths
from backstayd.store.record_files import make_directory, write_atomically

logger = logging.getLogger(__name__)


class Directory:
    """One daemon's memory directory, locked; made (mode 0700) if it does not exist.

    Raises:
        ConfigError: it is another daemon's, cannot be written, or is no tmpfs.
    """

    def __init__(self, memory_dir: Path, *, incarnation: str, must_be_tmpfs: bool) -> None:
        self.memory_dir = memory_dir
        self.incarnation = incarnation
        self.runs: dict[str, RunIndex] = {}
        self.generation = Generation()
        self.tombstones: dict[str, Tombstone] = {}  # of runs that are over, by run; as they lie in the directory
        self.parity_fraction: dict[str, float] = {}  # m / k by run, for admission
        self._lock_fd = _lock(memory_dir, must_be_tmpfs)

    def close(self) -> None:
        """Let go of the directory; everything stays in it."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def why_lost(self) -> UnavailableError | None:
        """What happened to the directory if it is not the one that was opened: unmounted, or another one mounted over it.

        What was held there cannot be reached by any name then; a daemon that went on would fill whatever lies below.
        """
        try:
            is_there = os.stat(self.memory_dir).st_dev == os.fstat(self._lock_fd).st_dev
        except FileNotFoundError:  # deleted on its file system: that is made again
            is_there = os.stat(limits.existing_parent(self.memory_dir)).st_dev == os.fstat(self._lock_fd).st_dev
        except OSError:
            is_there = False
        if is_there:
            return None
        return UnavailableError(
            f"memory directory {self.memory_dir} was unmounted, or something was mounted over it: what this node held is "
            "lost to it, and the daemon ends; mount a tmpfs there and start it again",
            reason="memory_gone",
        )

    def paths(self, run: str) -> RunPaths:
        return RunPaths(self.memory_dir, run)

    def index(self, run: str) -> RunIndex:
        """The index of a run, made empty if it is not known yet."""
        if run not in self.runs:
            RunKey.parse(run)
            self.runs[run] = RunIndex(run=run)
        return self.runs[run]

    def open_run(self, run: str, *, uid: int) -> RunIndex:
        """The index of a run for a trainer of user ``uid``; the first one to come owns the run.

        Raises:
            UsageError: the run is another user's (``not_owner``).
        """
        index = self.index(run)
        if index.owner_uid not in (UNKNOWN_UID, uid):
            raise UsageError(f"run {run} belongs to user {index.owner_uid}, not to user {uid}", reason="not_owner")
        if index.owner_uid == UNKNOWN_UID:
            self.write_owner(run, uid)
            index.owner_uid = uid
        return index

    def write_owner(self, run: str, uid: int) -> None:
        """Keep whose run it is; survives this daemon."""
        make_directory(self.paths(run).root)
        write_atomically(self.paths(run).owner, json_records.dumps(Owner(uid=uid)), incarnation=self.incarnation)

    def admit_generation(self, generation: Generation) -> bool:
        """Whether ``generation`` may be obeyed; a higher one is remembered across restarts."""
        if not self.generation.admits(generation) or not generation.is_possible:
            return False
        if generation != self.generation:
            write_atomically(
                self.memory_dir / GENERATION_NAME, json_records.dumps(generation), incarnation=self.incarnation
            )
            self.generation = generation
        return True

    def record_decision(self, decision: Decision) -> None:
        """Keep ``decision`` on tmpfs; survives this daemon."""
        index = self.index(decision.run)
        make_directory(self.paths(decision.run).root)
        path = self.paths(decision.run).decision
        write_atomically(path, json_records.dumps(decision), incarnation=self.incarnation)
        index.decision, index.recorded_unix_s = decision, path.stat().st_mtime

    def record_distrust(self, run: str, distrusted: tuple[Distrusted, ...]) -> bool:
        """Keep which snapshots of ``run`` must not be restored; survives this daemon. False if that was known."""
        index = self.index(run)
        if index.distrusted == distrusted:
            return False
        make_directory(self.paths(run).root)
        raw = json_records.dumps(Distrust(snapshots=distrusted))
        write_atomically(self.paths(run).distrusted, raw, incarnation=self.incarnation)
        index.distrusted = distrusted
        return True

    def bury(self, tombstones: Iterable[Tombstone]) -> bool:
        """Keep ``tombstones`` from now on, each in the place of an older one of its run; False if nothing changed."""
        found = dict(self.tombstones)
        for one in tombstones:
            if one.run not in found or found[one.run].order <= one.order:
                found[one.run] = one
        return self._keep_tombstones(found)

    def lift(self, tombstones: Iterable[Tombstone]) -> bool:
        """Keep these no longer; False if none of them was here."""
        wrong = {one.run: one.order for one in tombstones}
        found = {run: one for run, one in self.tombstones.items() if run not in wrong or one.order > wrong[run]}
        return self._keep_tombstones(found)

    def _keep_tombstones(self, tombstones: Mapping[str, Tombstone]) -> bool:
        kept = trimmed(tombstones.values(), now_unix_s=time.time())
        if kept == tuple(self.tombstones.values()):
            return False
        raw = json_records.dumps(Forgotten(tombstones=kept))
        write_atomically(self.memory_dir / FORGOTTEN_NAME, raw, incarnation=self.incarnation)
        self.tombstones = {one.run: one for one in kept}
        return True


def remove(path: Path) -> None:
    """Remove what lies in the place of one of our files, whatever it is; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_empty(directory: Path) -> None:
    """Remove ``directory`` if nothing is in it."""
    try:
        directory.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.ENOENT, errno.ENOTDIR):
            raise


def _lock(memory_dir: Path, must_be_tmpfs: bool) -> int:
    if must_be_tmpfs:
        limits.require_tmpfs(memory_dir, limits.existing_parent(memory_dir))
    try:
        make_directory(memory_dir)
        limits.require_usable(memory_dir, memory_dir.absolute())
        os.chmod(memory_dir, 0o700)
        fd = os.open(memory_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise limits.unusable(memory_dir, error.strerror or str(error)) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise ConfigError(
            f"memory directory {memory_dir} belongs to another running daemon; one daemon per directory",
            reason="directory_in_use",
        ) from None
    if not must_be_tmpfs and not limits.is_tmpfs(memory_dir):
        logger.warning("memory directory %s is not on a tmpfs: snapshots would be written to a disk", memory_dir)
    return fd
