"""The node's memory: one locked tmpfs directory, adopted at start, and the index of what lies in it.

Everything is a file; nothing is known that a listing cannot show, but for who fills a slot right now. Used from one thread.
"""

from __future__ import annotations

import errno
import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path

from backstay.errors import (
    BackstayError,
    CapacityError,
    ConfigError,
    IntegrityError,
    InvariantError,
)
from backstay.format import json_records
from backstay.ids import Generation
from backstayd.store import limits
from backstayd.store.adopt import (
    FORGOTTEN_NAME,
    GENERATION_NAME,
    Finding,
    FindingKind,
    Forgotten,
    QuarantineRecord,
    scan,
)
from backstayd.store.directory import Directory, remove, remove_empty
from backstayd.store.index import UNKNOWN_UID, RunIndex
from backstayd.store.record_files import make_directory, read_small, write_atomically
from backstayd.store.slots import Slots

logger = logging.getLogger(__name__)

CAPACITY_AGE_S = 1.0  # limits change by an operator's hand; every report asks for them
MAX_QUARANTINE_RECORDS = 100  # per run; the oldest go


class Store(Directory):
    """One daemon's memory directory, with what may be taken of the machine's memory for it.

    Args:
        memory_dir: Made (mode 0700) if it does not exist.
        incarnation: Of this daemon; part of temporary names.
        quota_bytes: Most to hold; 0 is what tmpfs and cgroup allow.
        user_quota_bytes: Most that the runs of one user may hold of it; 0 is no limit of its own.
        must_be_tmpfs: Refuse another file system (else warn).
        reader_wait_s: How long a reader may keep a released slot from being used again.

    Raises:
        ConfigError: the directory is another daemon's, cannot be written, or is no tmpfs.
    """

    def __init__(
        self,
        memory_dir: Path,
        *,
        incarnation: str,
        quota_bytes: int = 0,
        user_quota_bytes: int = 0,
        must_be_tmpfs: bool = False,
        reader_wait_s: float = 3.0,
        cgroup_root: Path = Path("/sys/fs/cgroup"),
    ) -> None:
        super().__init__(memory_dir, incarnation=incarnation, must_be_tmpfs=must_be_tmpfs)
        self.quota_bytes = quota_bytes
        self.user_quota_bytes = user_quota_bytes
        self.foreign: list[Finding] = []
        self.corrupt_count = 0
        self.fetched_bytes = 0  # chunks in sparse staging, and
        self.fetching_bytes = 0  # those on their way there
        self._cgroup_root = cgroup_root
        self._capacity = (0, float("-inf"))  # (bytes, when it was read)
        self.slots = Slots(self, admit=self._admit, reader_wait_s=reader_wait_s)
        try:
            self.require_quota()
            self._adopt()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the directory; everything stays in it."""
        self.slots.close()
        super().close()

    def forget(self, run: str) -> None:
        """Delete everything of a run; mappings that trainers still have keep their pages until they go."""
        self.slots.end_run(run)
        self.runs.pop(run, None)
        self.parity_fraction.pop(run, None)
        root = self.paths(run).root
        shutil.rmtree(root, ignore_errors=True)
        try:
            root.parent.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                raise

    def drop_unused(self, run: str) -> None:
        """Forget a name under which nothing lies but whose it is; what a coder may be putting there is left alone."""
        index = self.runs.get(run)
        if index is None or replace(index, owner_uid=UNKNOWN_UID) != RunIndex(run=run):
            return
        self.runs.pop(run)
        self.parity_fraction.pop(run, None)
        paths = self.paths(run)
        paths.owner.unlink(missing_ok=True)
        for directory in (paths.root, paths.root.parent):
            remove_empty(directory)

    @property
    def used_bytes(self) -> int:
        held = sum(index.used_bytes for index in self.runs.values())
        return held + self.slots.pending_bytes + self.fetched_bytes + self.fetching_bytes

    def used_by(self) -> dict[str, int]:
        """``used_bytes`` by what they are: shards, slots (free or being filled), parity, staging."""
        runs = self.runs.values()
        return {
            "shards": sum(held.record.size_bytes for index in runs for held in index.shards.values()),
            "slots": sum(slot.size_bytes for index in runs for slot in index.slots.values()) + self.slots.pending_bytes,
            "parity": sum(size for index in runs for size in index.fragments.values()),
            "staging": sum(staged.size_bytes for index in runs for staged in index.staged.values())
            + self.fetched_bytes
            + self.fetching_bytes,
        }

    @property
    def free_bytes(self) -> int:
        """What the tightest of quota, tmpfs and cgroup limits still allows."""
        free = min(limit.free_bytes for limit in self._limits())
        return max(0, free - self.slots.pending_bytes - self.fetching_bytes)

    @property
    def capacity_bytes(self) -> int:
        """The smallest of quota, tmpfs and cgroup limits."""
        now = time.monotonic()
        if now - self._capacity[1] > CAPACITY_AGE_S:
            self._capacity = (min(limit.total_bytes for limit in self._limits()), now)
        return self._capacity[0]

    def set_quota(self, quota_bytes: int) -> None:
        """Another quota from now on; what is held already stays even if it is more. ConfigError as by require_quota."""
        before, self.quota_bytes = self.quota_bytes, quota_bytes
        try:
            self.require_quota()
        except ConfigError:
            self.quota_bytes = before
            raise
        self._capacity = (0, float("-inf"))

    def require_quota(self) -> None:
        """Raise ConfigError if the quota is more than tmpfs and cgroup can ever hold: nothing was taken yet."""
        limits.require_quota(self._limits(), self.quota_bytes)

    def _admit(self, index: RunIndex, wanted_bytes: int, purpose: str) -> None:
        self._require_share(index, wanted_bytes)
        self.require_room(wanted_bytes, purpose)

    def _require_share(self, index: RunIndex, wanted_bytes: int) -> None:
        """Raise CapacityError if the run's user would hold more than ``user_quota_bytes``."""
        uid = index.owner_uid
        if not self.user_quota_bytes or uid == UNKNOWN_UID:
            return
        own = [other for other in self.runs.values() if other.owner_uid == uid]
        held = sum(other.used_bytes + self.slots.pending_of(other.run) for other in own)
        if held + wanted_bytes > self.user_quota_bytes:
            raise CapacityError(
                f"run {index.run}: {wanted_bytes} bytes wanted, user {uid} holds {held} of {self.user_quota_bytes} "
                "(user_quota_bytes) on this node; forget a run, or ask the operator for more",
                reason="user_quota",
            )

    def require_room(self, wanted_bytes: int, purpose: str) -> None:
        """Check that ``wanted_bytes`` fit, giving up unused slots for them if need be.

        Raises:
            CapacityError: they do not; the message has the numbers.
        """
        for is_last_try in (False, True):
            tightest = min(self._limits(), key=lambda limit: limit.free_bytes)
            free = tightest.free_bytes - self.slots.pending_bytes - self.fetching_bytes
            if free >= wanted_bytes:
                return
            if is_last_try or self.slots.reclaim(wanted_bytes - free) == 0:
                raise CapacityError(
                    f"{purpose}: {wanted_bytes} bytes wanted, {max(0, free)} of {tightest.total_bytes} free under "
                    f"{tightest.name}; give the daemon more memory or the run fewer ranks per node",
                    reason="no_room",
                )

    def check_invariants(self) -> None:
        """Raise InvariantError if index and grants contradict each other."""
        for index in self.runs.values():
            index.check_invariants()
        for slot_id, grant in self.slots.grants.items():
            slot = self.index(grant.run).slots.get((grant.rank, grant.number))
            if slot is None or slot.slot_id != slot_id:
                raise InvariantError(f"grant {grant} is of a slot that is not there")

    def _limits(self) -> tuple[limits.Limit, ...]:
        used = self.used_bytes - self.slots.pending_bytes - self.fetching_bytes
        return limits.limits(
            self.memory_dir, quota_bytes=self.quota_bytes, used_bytes=used, cgroup_root=self._cgroup_root
        )

    def _adopt(self) -> None:
        path = self.memory_dir / GENERATION_NAME
        if path.exists():
            try:
                generation = json_records.loads(Generation, read_small(path))
                if not generation.is_possible:
                    raise IntegrityError(f"generation {generation.number} is out of range", reason="bad_record")
                self.generation = generation
            except BackstayError as error:
                logger.error("ignoring %s: %s; using the generation of the next coordinator that connects", path, error)
                remove(path)
        self._adopt_tombstones()
        for name in (GENERATION_NAME, FORGOTTEN_NAME):
            for leftover in self.memory_dir.glob(f"{name}.*.tmp"):
                remove(leftover)
        found = scan(self.memory_dir)
        self.runs = found.runs
        for finding in sorted(found.findings, key=lambda f: f.kind is not FindingKind.LEFTOVER):
            self._act_on(finding)  # what is in the way goes first
        for run, index in self.runs.items():
            self._tidy(run, index)
            logger.info(
                "adopted run %s: %d shards, %d plans, %d fragments, %d slots",
                run, len(index.shards), len(index.plans), len(index.fragments), len(index.slots),
            )  # fmt: skip
        self.check_invariants()

    def _adopt_tombstones(self) -> None:
        path = self.memory_dir / FORGOTTEN_NAME
        if path.exists():
            try:
                self.tombstones = {one.run: one for one in json_records.loads(Forgotten, read_small(path)).tombstones}
            except BackstayError as error:
                logger.error("ignoring %s: %s; other nodes keep the same record", path, error)
                remove(path)

    def _act_on(self, finding: Finding) -> None:
        if finding.kind is FindingKind.FOREIGN:
            logger.warning("%s: %s", finding.path, finding.reason)
            self.foreign.append(finding)
        elif finding.kind is FindingKind.LEFTOVER:
            logger.info("removed %s: %s", finding.path, finding.reason)
            finding.path.unlink(missing_ok=True)
        elif finding.kind is FindingKind.UNPUBLISHED:
            logger.info("%s is a slot again: %s", finding.path, finding.reason)
            rank = int(finding.path.name.split("-")[1])
            self.slots.shelve(self.runs[finding.run], finding.path, rank=rank)
        elif finding.quarantined is not None:
            self.quarantine_files(finding)

    def quarantine_files(self, finding: Finding) -> None:
        """Free the bytes of a bad file and its companions; keep its record and the reason in quarantine/."""
        assert finding.quarantined is not None
        index, paths = self.runs[finding.run], self.paths(finding.run)
        logger.error("quarantined %s: %s", finding.quarantined.what, finding.reason)
        kept = b""
        for companion in finding.companions:
            kept = companion.read_bytes() if companion.is_file() else kept
            remove(companion)
        remove(finding.path)
        make_directory(paths.quarantine)
        name = f"{len(index.quarantined):04d}-{finding.path.name}.json"
        bad = QuarantineRecord(quarantined=finding.quarantined, commit_record=kept.decode(errors="replace"))
        write_atomically(paths.quarantine / name, json_records.dumps(bad), incarnation=self.incarnation)
        index.quarantined[name] = finding.quarantined
        self.corrupt_count += 1
        while len(index.quarantined) > MAX_QUARANTINE_RECORDS:
            oldest = min(index.quarantined)
            (paths.quarantine / oldest).unlink(missing_ok=True)
            del index.quarantined[oldest]

    def _tidy(self, run: str, index: RunIndex) -> None:
        """Remove holder notes of inodes that are gone and directories that are empty."""
        paths = self.paths(run)
        inodes = {shard.slot_id for shard in index.shards.values()} | {slot.slot_id for slot in index.slots.values()}
        if paths.slots.is_dir():
            for note in paths.slots.glob("holder-*.json"):
                slot_id = note.name.removeprefix("holder-").removesuffix(".json")
                if slot_id not in inodes:
                    note.unlink(missing_ok=True)
                    index.holders.pop(slot_id, None)
        for parity in paths.root.glob("attempt-*/step-*/parity"):
            remove_empty(parity)
        for step in paths.root.glob("attempt-*/step-*"):
            remove_empty(step)
        for attempt in paths.root.glob("attempt-*"):
            remove_empty(attempt)
