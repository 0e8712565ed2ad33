"""What a coder does to a run's directory: surveys, uploads, completion records, pruning, against real files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backstay.errors import BackstayError
from backstay.format import json_records
from backstay.ids import SnapshotKey, snapshot_id
from backstayd.clock import boot_s
from backstayd.coder.context import JobContext
from backstayd.coder.durable import shared_changes, upload
from backstayd.coder.jobs import MarkSnapshot, PruneSnapshot, SurveyStorage, WriteRecord
from backstayd.core.inventory.durable_names import MARKS_NAME, RECORD_NAME, snapshot_name
from backstayd.core.messages.decisions import Distrusted, Lineage
from backstayd.core.messages.durable import PersistedSnapshot, Stored, Survey
from backstayd.core.messages.plans import VolumeShard
from backstayd.core.protect.durable_upkeep import stored

RUN = "job/run"


@pytest.fixture
def context(tmp_path: Path) -> JobContext:
    memory = tmp_path / "memory"
    memory.mkdir()
    return JobContext(memory_dir=memory, incarnation="i", deadline_s=60.0, emit=lambda event: None)


def root_of(tmp_path: Path) -> Path:
    (tmp_path / "storage").mkdir(exist_ok=True)
    return tmp_path / "storage" / RUN


def url_of(tmp_path: Path) -> str:
    return f"file://{root_of(tmp_path)}"


def snapshot(step: int, *, attempt: int = 1, world: str = "w") -> PersistedSnapshot:
    """A snapshot of one rank; ``world`` tells histories apart."""
    key, digest = SnapshotKey(attempt, step), f"{attempt:02x}{step:02x}".ljust(64, world[-1])
    return PersistedSnapshot(
        run=RUN, attempt=attempt, step=step, world_size=1,
        snapshot_id=snapshot_id(key=key, world_size=1, shard_digests=[digest]),
        shards=(VolumeShard(rank=0, size_bytes=4, digest=digest),),
        lineage=(Lineage(attempt=attempt, base_attempt=0, base_step=0, world_id=world),), serial=step,
    )  # fmt: skip


def put(tmp_path: Path, item: PersistedSnapshot) -> Path:
    """Its completion record, as a writer left it."""
    directory = root_of(tmp_path) / snapshot_name(item.key)
    directory.mkdir(parents=True)
    (directory / RECORD_NAME).write_bytes(json_records.dumps(item))
    return directory


def survey(context: JobContext, tmp_path: Path) -> Survey:
    upload.run_survey(context, SurveyStorage(run=RUN, url=url_of(tmp_path), survey_id="s", deadline_s=60.0))
    assert context.survey is not None
    return context.survey


def flip(path: Path, index: int) -> None:
    data = bytearray(path.read_bytes())
    data[index] ^= 0x80
    path.write_bytes(bytes(data))


def test_a_record_with_a_flipped_byte_a_dangling_link_and_an_absurd_world_are_unreadable_and_not_absent(
    context: JobContext, tmp_path: Path
) -> None:
    whole = snapshot(1)
    put(tmp_path, whole)
    flip(put(tmp_path, snapshot(2)) / RECORD_NAME, 7)
    archived = put(tmp_path, snapshot(3)) / RECORD_NAME
    archived.unlink()
    archived.symlink_to(tmp_path / "archive-that-is-not-mounted" / RECORD_NAME)
    put(tmp_path, replace(snapshot(4), world_size=1 << 62))
    put(tmp_path, replace(snapshot(5), run="job/other"))
    put(tmp_path, snapshot(6)).joinpath(RECORD_NAME).unlink()
    (put(tmp_path, snapshot(7)) / RECORD_NAME).write_text("[" * 200_000)
    found = survey(context, tmp_path)
    assert found.snapshots == (whole,)
    assert found.partial == (SnapshotKey(1, 6),)
    assert [item.step for item in found.unreadable] == [2, 3, 4, 5, 7]
    reasons = {item.step: item.reason for item in found.unreadable}
    assert "link to a file that is not there" in reasons[3]
    assert "1 shards of 4611686018427387904 ranks" in reasons[4]
    assert "of run job/other" in reasons[5]


SOON_S = 30.0


def fence(tmp_path: Path, *, newest_attempt: int = 1, act_before_s: float | None = None) -> dict[str, Any]:
    until_s = boot_s() + SOON_S if act_before_s is None else act_before_s
    return {
        "url": url_of(tmp_path), "newest_attempt": newest_attempt, "act_before_s": until_s, "deadline_s": SOON_S,
    }  # fmt: skip


def prune(context: JobContext, tmp_path: Path, target: Stored, *grounds: PersistedSnapshot, **more: Any) -> None:
    named = tuple(map(stored, grounds))
    job = PruneSnapshot(run=RUN, target=target, grounds=named, **fence(tmp_path, **more))
    shared_changes.run_prune(context, job)


def distrust(context: JobContext, tmp_path: Path, item: PersistedSnapshot, **more: Any) -> None:
    mark = Distrusted(snapshot_id=item.snapshot_id, attempt=item.attempt, step=item.step, reason="nan")
    shared_changes.run_mark(context, MarkSnapshot(run=RUN, item=mark, **more, **fence(tmp_path)))


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(BackstayError) as caught:
        act()
    return caught.value.reason


def test_a_copy_is_removed_only_in_time_and_while_what_it_was_given_up_for_lies_there_and_may_be_restored(
    context: JobContext, tmp_path: Path
) -> None:
    old, new, other = snapshot(1), snapshot(2), snapshot(1, world="x")
    directory = put(tmp_path, old)
    put(tmp_path, new)
    target = stored(old)
    assert refusal(lambda: prune(context, tmp_path, target, new, act_before_s=boot_s())) == "fenced"
    assert refusal(lambda: prune(context, tmp_path, target)) == "changed", "no grounds"
    assert refusal(lambda: prune(context, tmp_path, target, snapshot(3))) == "changed", "they are not there"
    assert refusal(lambda: prune(context, tmp_path, target, snapshot(2, world="x"))) == "changed", "others are"
    assert refusal(lambda: prune(context, tmp_path, stored(other), new)) == "changed", "another history's copy"
    assert refusal(lambda: prune(context, tmp_path, replace(target, snapshot_id=""), new)) == "changed", "it is whole"
    assert refusal(lambda: prune(context, tmp_path, target, new, newest_attempt=0)) == "superseded"
    distrust(context, tmp_path, new)
    assert refusal(lambda: prune(context, tmp_path, target, new)) == "changed", "what stays leads to NaN"
    assert json_records.loads(PersistedSnapshot, (directory / RECORD_NAME).read_bytes()) == old
    distrust(context, tmp_path, new, is_trusted=True)
    prune(context, tmp_path, target, new)
    assert not directory.exists()
    prune(context, tmp_path, target, new)  # fine if nothing is there
    assert survey(context, tmp_path).snapshots == (new,)


def test_a_copy_whose_record_cannot_be_read_is_not_removed_under_any_name(context: JobContext, tmp_path: Path) -> None:
    old, new = snapshot(1), snapshot(2)
    flip(put(tmp_path, old) / RECORD_NAME, 3)
    put(tmp_path, new)
    for target in (stored(old), replace(stored(old), snapshot_id="")):
        assert refusal(lambda target=target: prune(context, tmp_path, target, new)) == "bad_record"
    assert [item.key for item in survey(context, tmp_path).unreadable] == [old.key]


def test_what_is_written_while_a_copy_is_removed_is_not_removed_with_it(context: JobContext, tmp_path: Path) -> None:
    """The rest of a removal that a daemon's death cut short is cleared by the next one, and only that."""
    old, new = snapshot(1), snapshot(2)
    directory = put(tmp_path, old)
    put(tmp_path, new)
    left = directory.with_name(f".{directory.name}.0123.removed")
    directory.rename(left)
    again = put(tmp_path, snapshot(1, world="x"))
    assert refusal(lambda: prune(context, tmp_path, stored(old), new)) == "changed"
    assert again.exists()
    prune(context, tmp_path, stored(snapshot(1, world="x")), new)
    assert not again.exists()
    assert not left.exists()


def test_a_record_is_written_only_in_time_and_not_for_what_is_distrusted_or_overtaken(
    context: JobContext, tmp_path: Path
) -> None:
    new = snapshot(2)
    directory = root_of(tmp_path) / snapshot_name(new.key)
    directory.mkdir(parents=True)

    def write(item: PersistedSnapshot = new, **more: Any) -> PersistedSnapshot:
        shared_changes.run_record(context, WriteRecord(snapshot=item, **fence(tmp_path, **more)))
        return context.persisted

    assert refusal(lambda: write(act_before_s=boot_s())) == "fenced"
    distrust(context, tmp_path, snapshot(1))  # not there itself
    assert refusal(write) == "distrusted", "it was trained from what is"
    distrust(context, tmp_path, snapshot(1), is_trusted=True)
    later = root_of(tmp_path) / "attempt-1001" / "step-00000003"
    later.mkdir(parents=True)
    assert refusal(write) == "superseded", "another cluster has begun above it"
    assert not (directory / RECORD_NAME).exists()
    assert write(newest_attempt=1001).snapshot_id == new.snapshot_id
    assert write(newest_attempt=1001).snapshot_id == new.snapshot_id, "twice is once"
    assert refusal(lambda: write(snapshot(2, world="x"), newest_attempt=1001)) == "occupied"


def test_marks_are_found_by_a_survey_and_one_that_cannot_be_read_counts_all_the_same(
    context: JobContext, tmp_path: Path
) -> None:
    bad, worse = snapshot(1), snapshot(2)
    for item in (bad, worse):
        put(tmp_path, item)
        distrust(context, tmp_path, item)
    (mark,) = (root_of(tmp_path) / MARKS_NAME).glob(f"*{worse.snapshot_id}*")
    mark.write_bytes(b"\xff")
    found = {item.step: item for item in survey(context, tmp_path).distrusted}
    assert {step: item.reason for step, item in found.items()} == {1: "nan", 2: "its mark cannot be read"}
    assert found[2].snapshot_id == worse.snapshot_id
    wrong = replace(bad, snapshot_id="../../../etc/passwd")
    assert refusal(lambda: distrust(context, tmp_path, wrong)) == "bad_record"
