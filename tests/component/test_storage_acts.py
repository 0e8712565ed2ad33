"""What a coder does to a run's directory: surveys, uploads, completion records, pruning, against real files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from backstay import record
from backstay.ids import SnapshotKey, snapshot_id
from backstayd.coder import persist
from backstayd.coder.context import JobContext
from backstayd.coder.storage_jobs import SurveyStorage
from backstayd.core.records import Lineage, PersistedSnapshot, Survey, VolumeShard
from backstayd.core.storage_names import RECORD_NAME, snapshot_name

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
    (directory / RECORD_NAME).write_bytes(record.dumps(item))
    return directory


def survey(context: JobContext, tmp_path: Path) -> Survey:
    return persist.run_survey(context, SurveyStorage(run=RUN, url=url_of(tmp_path), survey_id="s", deadline_s=60.0))


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
