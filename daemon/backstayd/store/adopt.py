"""Reading a memory directory: what is whole goes into the index, everything else becomes a finding with a reason.

Changes nothing; the store acts on the findings. Bytes are not verified here but at their next read.
"""

from __future__ import annotations

import enum
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from backstay.errors import BackstayError, IntegrityError
from backstay.format import json_records, versions
from backstay.format.manifest import Manifest
from backstay.ids import RunKey, SnapshotKey
from backstayd.core.inventory import geometry
from backstayd.core.messages.decisions import Decision, Distrusted
from backstayd.core.messages.plans import FragmentRecord, Plan, Quarantined, ShardRecord
from backstayd.core.messages.tombstone import Tombstone
from backstayd.store import paths as names
from backstayd.store.index import HeldShard, RunIndex, Slot, StagedFile
from backstayd.store.paths import RunPaths
from backstayd.store.record_files import StoredFragment, StoredPlan, read_small
from backstayd.store.slot_holder import HolderRecord

LOCK_NAME = ".lock"
GENERATION_NAME = ".generation.json"  # no job can have such a name
DRAINING_NAME = ".draining.json"
FORGOTTEN_NAME = ".forgotten.json"
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Contents of owner.json."""

    uid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """Contents of .forgotten.json: what is kept of runs that are over."""

    tombstones: tuple[Tombstone, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Distrust:
    """Contents of distrusted.json."""

    snapshots: tuple[Distrusted, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantineRecord:
    """Contents of a file in quarantine/: what was found bad, and its commit record as it was."""

    quarantined: Quarantined
    commit_record: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Formatted:
    """The one field that every format of a commit record has."""

    format: int = versions.FILE_FORMAT


class FindingKind(enum.StrEnum):
    FOREIGN = "foreign"  # not ours: left alone, never used
    LEFTOVER = "leftover"  # of a write that never ended: removed
    UNPUBLISHED = "unpublished"  # a shard's bytes without a commit record: a slot again
    DAMAGED = "damaged"  # contradicts its record: quarantined


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    kind: FindingKind
    path: Path
    reason: str
    run: str = ""
    quarantined: Quarantined | None = None
    companions: tuple[Path, ...] = ()  # withdrawn together with ``path``


@dataclass(slots=True)
class Scan:
    runs: dict[str, RunIndex] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def slot_id_of(status: os.stat_result) -> str:
    """Names the inode; the same across restarts of the daemon."""
    return f"{status.st_dev:x}-{status.st_ino:x}"


def scan(memory_dir: Path) -> Scan:
    """Everything in ``memory_dir``."""
    result = Scan()
    for job in _children(memory_dir):
        if job.name in (LOCK_NAME, GENERATION_NAME, DRAINING_NAME, FORGOTTEN_NAME):
            continue
        if not _is_directory(job):
            result.findings.append(_stray(job, ""))
            continue
        for directory in _children(job):
            run = f"{job.name}/{directory.name}"
            try:
                RunKey.parse(run)
            except BackstayError:
                result.findings.append(_stray(directory, ""))
                continue
            if _is_directory(directory):
                result.runs[run] = _scan_run(RunPaths(memory_dir, run), result.findings)
            else:
                result.findings.append(_stray(directory, run))
    return result


def _scan_run(paths: RunPaths, findings: list[Finding]) -> RunIndex:
    index = RunIndex(run=paths.run)
    for path in _children(paths.root):
        if path == paths.owner:
            owner = _load(path, Owner, paths.run, findings)
            index.owner_uid = owner.uid if owner else index.owner_uid
        elif path == paths.decision:
            index.decision = _load_decision(path, paths.run, findings)
            index.recorded_unix_s = path.stat().st_mtime if index.decision is not None else 0.0
        elif path == paths.distrusted:
            distrust = _load(path, Distrust, paths.run, findings)
            index.distrusted = distrust.snapshots if distrust else ()
        elif path == paths.slots and _is_directory(path):
            _scan_slots(path, index, findings)
        elif path == paths.staging and _is_directory(path):
            _scan_staging(path, index, findings)
        elif path == paths.quarantine and _is_directory(path):
            _scan_quarantine(path, index, findings)
        elif path.name.startswith("attempt-") and _is_directory(path):
            for step in _children(path):
                key = names.parse_snapshot(step)
                if key is not None and step == paths.snapshot(key) and _is_directory(step):
                    _scan_snapshot(paths, key, index, findings)
                else:
                    findings.append(_stray(step, paths.run))
        else:
            findings.append(_stray(path, paths.run))
    inodes = {shard.slot_id for shard in index.shards.values()} | {slot.slot_id for slot in index.slots.values()}
    index.holders = {slot_id: holder for slot_id, holder in index.holders.items() if slot_id in inodes}
    return index


def _scan_slots(directory: Path, index: RunIndex, findings: list[Finding]) -> None:
    for path in _children(directory):
        place = names.parse_slot(path)
        slot_id = names.parse_holder(path)
        if place is not None and _is_file(path):
            status = path.lstat()
            slot = Slot(rank=place[0], number=place[1], size_bytes=status.st_size, slot_id=slot_id_of(status))
            index.slots[place] = slot
        elif slot_id is not None:
            holder = _load(path, HolderRecord, index.run, findings)
            if holder is not None:
                index.holders[slot_id] = holder
        else:
            findings.append(_stray(path, index.run))


def _scan_staging(directory: Path, index: RunIndex, findings: list[Finding]) -> None:
    parts = {}
    children = list(_children(directory))
    manifests = {path.stem for path in children if path.suffix == ".json" and ".sparse" not in path.name}
    for path in children:
        place = names.parse_staged(path)
        if place is None or not _is_file(path):
            findings.append(_stray(path, index.run))
        elif ".sparse" in path.name:
            findings.append(_leftover(path, index.run, "chunks for a restore that ended with its daemon"))
        elif path.name.rpartition(".")[0] not in manifests:
            findings.append(_leftover(path, index.run, "staging without its manifest"))
        elif path.suffix == ".part":
            parts[place[0], place[2]] = StagedFile(
                rank=place[0], world_size=place[1], digest16=place[2], size_bytes=path.lstat().st_size
            )
    index.staged = parts


def _scan_quarantine(directory: Path, index: RunIndex, findings: list[Finding]) -> None:
    for path in _children(directory):
        found = _load(path, QuarantineRecord, index.run, findings) if path.suffix == ".json" else None
        if found is not None:
            index.quarantined[path.name] = found.quarantined
        elif path.suffix != ".json":
            findings.append(_stray(path, index.run))


def _scan_snapshot(paths: RunPaths, key: SnapshotKey, index: RunIndex, findings: list[Finding]) -> None:
    for path in _children(paths.snapshot(key)):
        place = names.parse_shard(path)
        if path == paths.parity(key) and _is_directory(path):
            scan_parity(paths, key, index, findings)
        elif path.name.endswith(".manifest.json") and _is_file(path):
            data = path.with_name(path.name.removesuffix(".manifest.json") + ".safetensors")
            if names.parse_shard(data) is None:
                findings.append(_stray(path, index.run))
            elif not _is_file(data):
                findings.append(_leftover(path, index.run, "a manifest without its shard"))
        elif place is not None and _is_file(path):
            _scan_shard(paths, key, place, index, findings)
        else:
            findings.append(_stray(path, index.run))


def _scan_shard(
    paths: RunPaths, key: SnapshotKey, place: tuple[int, int], index: RunIndex, findings: list[Finding]
) -> None:
    rank, world_size = place
    path, manifest_path = paths.shard(key, rank, world_size), paths.manifest(key, rank, world_size)
    if not manifest_path.exists():
        findings.append(
            Finding(kind=FindingKind.UNPUBLISHED, path=path, reason="its manifest was never published", run=index.run)
        )
        return
    try:
        index.shards[key, rank] = read_shard(paths, key, rank=rank, world_size=world_size)
    except BackstayError as error:
        what = Quarantined(
            what=f"shard rank {rank} of step {key.step}",
            attempt=key.attempt,
            step=key.step,
            reason=str(error),
            rank=rank,
        )
        findings.append(_of_other_format(manifest_path, index.run) or _damaged(path, index.run, what, (manifest_path,)))


def read_shard(paths: RunPaths, key: SnapshotKey, *, rank: int, world_size: int) -> HeldShard:
    """The published shard at that place, if file and manifest agree on who it is and how long.

    Raises:
        SnapshotNotFoundError: nothing is published there. IntegrityError: they contradict each other.
    """
    path, manifest_path = paths.shard(key, rank, world_size), paths.manifest(key, rank, world_size)
    raw = read_small(manifest_path)
    manifest = json_records.loads(Manifest, raw)
    manifest.check()
    found = (manifest.run, manifest.attempt, manifest.step, manifest.rank, manifest.world_size)
    expected = (paths.run, key.attempt, key.step, rank, world_size)
    if found != expected:
        raise IntegrityError(
            f"{manifest_path.name} is of run {found[0]}, attempt {found[1]}, step {found[2]}, rank {found[3]} of {found[4]}"
            f", but lies in the place of run {expected[0]}, attempt {key.attempt}, step {key.step}, rank {rank} of "
            f"{world_size}; it is not used",
            reason="wrong_identity",
        )
    status = path.lstat()
    check_size(path.name, status, manifest.size_bytes)
    digest = hashlib.sha256(raw).hexdigest()
    shard = ShardRecord(
        attempt=key.attempt,
        step=key.step,
        rank=rank,
        world_size=world_size,
        size_bytes=manifest.size_bytes,
        digest=digest,
        world_id=manifest.world_id,
        layout=manifest.layout,
    )
    return HeldShard(record=shard, slot_id=slot_id_of(status))


def check_size(name: str, status: os.stat_result, size_bytes: int) -> None:
    """Raise IntegrityError unless the file has exactly that size, all of it allocated."""
    if status.st_size != size_bytes:
        raise IntegrityError(
            f"{name} has {status.st_size} bytes, its manifest says {size_bytes}; it is not used", reason="truncated"
        )
    if status.st_blocks * 512 < size_bytes:
        raise IntegrityError(
            f"{name} of {size_bytes} bytes has only {status.st_blocks * 512} allocated: it has holes", reason="holes"
        )


def scan_parity(paths: RunPaths, key: SnapshotKey, index: RunIndex, findings: list[Finding]) -> None:
    """Add the plans and fragments of one snapshot to the index."""
    children = list(_children(paths.parity(key)))
    for path in children:
        plan_id = path.name.removeprefix("plan-").removesuffix(".json")
        if path == paths.plan(key, plan_id) and len(plan_id) == 32:
            try:
                index.plans[plan_id] = read_stored_plan(paths, key, plan_id)
            except BackstayError as error:
                what = Quarantined(
                    what=f"plan {plan_id[:8]} of step {key.step}",
                    attempt=key.attempt,
                    step=key.step,
                    reason=str(error),
                    plan_id=plan_id,
                )
                findings.append(_of_other_format(path, index.run) or _damaged(path, index.run, what, ()))
    for path in children:
        place = names.parse_fragment(path)
        record_of = names.parse_fragment(path.with_suffix("")) if path.suffix == ".json" else None
        if place is not None:
            _scan_fragment(paths, key, place, index, findings)
        elif record_of is not None:
            if not path.with_suffix("").exists():
                findings.append(_leftover(path, index.run, "a fragment record without its fragment"))
        elif not path.name.startswith("plan-") or path.suffix != ".json":
            findings.append(_stray(path, index.run))


def _scan_fragment(
    paths: RunPaths, key: SnapshotKey, place: tuple[str, int, int], index: RunIndex, findings: list[Finding]
) -> None:
    plan_id, stripe, number = place
    path = paths.fragment(key, plan_id, stripe=stripe, index=number)
    record_path = paths.fragment_record(key, plan_id, stripe=stripe, index=number)
    plan = index.plans.get(plan_id)
    other = _of_other_format(paths.plan(key, plan_id), index.run) if plan is None else None
    if other is not None:
        findings.append(Finding(kind=FindingKind.FOREIGN, path=path, reason=other.reason, run=index.run))
        return
    if plan is None or not record_path.exists():
        findings.append(_leftover(path, index.run, "parity without its plan or record"))
        if record_path.exists():
            findings.append(_leftover(record_path, index.run, "parity without its plan"))
        return
    fragment = FragmentRecord(plan_id=plan_id, stripe=stripe, index=number)
    try:
        index.fragments[fragment] = read_fragment(paths, plan, fragment)
    except BackstayError as error:
        what = quarantined_fragment(plan, fragment, str(error))
        findings.append(_of_other_format(record_path, index.run) or _damaged(path, index.run, what, (record_path,)))


def quarantined_fragment(plan: Plan, fragment: FragmentRecord, reason: str) -> Quarantined:
    """The entry for a parity fragment that failed verification."""
    return Quarantined(
        what=f"parity stripe {fragment.stripe} index {fragment.index} of plan {plan.plan_id[:8]}, step {plan.step}",
        attempt=plan.attempt,
        step=plan.step,
        reason=reason,
        plan_id=plan.plan_id,
        stripe=fragment.stripe,
        index=fragment.index,
    )


def read_stored_plan(paths: RunPaths, key: SnapshotKey, plan_id: str) -> Plan:
    """The plan stored here, if it is sound and in its place."""
    stored = json_records.loads(StoredPlan, read_small(paths.plan(key, plan_id)))
    plan = stored.plan
    if not versions.is_readable(stored.format):
        raise IntegrityError(versions.unreadable("a stored plan", stored.format), reason="bad_format")
    if not plan.is_sealed() or (plan.plan_id, plan.run, plan.key) != (plan_id, paths.run, key):
        raise IntegrityError(
            f"plan-{plan_id}.json holds plan {plan.plan_id} of {plan.run}, step {plan.step}; it is not used",
            reason="wrong_identity",
        )
    return plan


def read_fragment(paths: RunPaths, plan: Plan, fragment: FragmentRecord) -> int:
    """Size of a fragment published here, in bytes; raises IntegrityError if it contradicts plan or record."""
    path = paths.fragment(plan.key, plan.plan_id, stripe=fragment.stripe, index=fragment.index)
    raw = read_small(paths.fragment_record(plan.key, plan.plan_id, stripe=fragment.stripe, index=fragment.index))
    stored = json_records.loads(StoredFragment, raw)
    if not versions.is_readable(stored.format):
        raise IntegrityError(versions.unreadable("a fragment record", stored.format), reason="bad_format")
    stored.check(plan, fragment.stripe, fragment.index)
    size = path.lstat().st_size
    if size != stored.size_bytes or size != geometry.fragment_bytes(plan, fragment.stripe):
        raise IntegrityError(f"{path.name} has {size} bytes, its record says {stored.size_bytes}", reason="truncated")
    return size


def _load(path: Path, cls: type[T], run: str, findings: list[Finding]) -> T | None:
    try:
        return json_records.loads(cls, read_small(path))
    except BackstayError as error:
        what = Quarantined(what=path.name, attempt=0, step=0, reason=str(error))
        findings.append(_damaged(path, run, what, ()))
        return None


def _load_decision(path: Path, run: str, findings: list[Finding]) -> Decision | None:
    decision = _load(path, Decision, run, findings)
    if decision is None or decision.run == run:
        return decision
    reason = f"it is a decision of run {decision.run}; it is not used"
    findings.append(_damaged(path, run, Quarantined(what=path.name, attempt=0, step=0, reason=reason), ()))
    return None


def _stray(path: Path, run: str) -> Finding:
    if path.name.endswith(".tmp") and _is_file(path):
        return _leftover(path, run, "a write that never ended")
    if path.is_symlink() and path.is_dir():  # left in place, what is written later would go where it leads
        return _leftover(path, run, "a link to another directory; backstay makes none")
    reason = "not a file of backstay; it is left alone and never used"
    return Finding(kind=FindingKind.FOREIGN, path=path, reason=reason, run=run)


def _leftover(path: Path, run: str, reason: str) -> Finding:
    return Finding(kind=FindingKind.LEFTOVER, path=path, reason=reason, run=run)


def _of_other_format(path: Path, run: str) -> Finding | None:
    """What another release wrote, if that is why it cannot be used: left for that release, not put aside as damaged."""
    try:
        found = json_records.loads(Formatted, read_small(path)).format
    except (BackstayError, OSError):
        return None
    if versions.is_readable(found):
        return None
    return Finding(kind=FindingKind.FOREIGN, path=path, reason=versions.unreadable(path.name, found), run=run)


def _damaged(path: Path, run: str, what: Quarantined, companions: tuple[Path, ...]) -> Finding:
    return Finding(
        kind=FindingKind.DAMAGED, path=path, reason=what.reason, run=run, quarantined=what, companions=companions
    )


def _children(directory: Path) -> Iterator[Path]:
    return iter(sorted(directory.iterdir()))


def _is_directory(path: Path) -> bool:
    return stat.S_ISDIR(path.lstat().st_mode)


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False
