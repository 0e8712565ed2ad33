"""Sparse staging: which chunks are missing, how many bytes they are, and that only what was written is there."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backstay.errors import BackstayError, IntegrityError, SnapshotNotFoundError
from backstay.format import json_records
from backstay.format.manifest import CHUNK_BYTES
from backstayd.store.paths import RunPaths
from backstayd.store.record_files import parse_manifest
from backstayd.store.staging import SparseShard, missing_runs, prepare_sparse, read_marks, remove_sparse, run_bytes
from tests.kit.shards import RUN, make_shard


@st.composite
def marks_and_wishes(draw: st.DrawFn) -> tuple[bytes, list[range]]:
    marks = bytes(draw(st.lists(st.integers(0, 1), min_size=1, max_size=40)))
    cuts = sorted(draw(st.sets(st.integers(0, len(marks)), max_size=10)))
    return marks, [range(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]


@given(marks_and_wishes())
def test_missing_runs_are_the_wanted_chunks_without_a_mark_as_long_as_can_be(case: tuple[bytes, list[range]]) -> None:
    marks, wanted = case
    runs = missing_runs(marks, wanted)
    assert [c for run in runs for c in run] == [c for run in wanted for c in run if not marks[c]]
    assert all(later.start > earlier.stop for earlier, later in itertools.pairwise(runs))


def test_only_chunks_that_were_written_are_there_and_the_file_is_as_long_as_the_shard(tmp_path: Path) -> None:
    made = make_shard(payload_bytes=3 * CHUNK_BYTES + 5)
    raw, digest = json_records.dumps(made.manifest), made.manifest.digest
    paths = RunPaths(tmp_path, RUN)
    for _ in range(2):  # again: what is there is kept
        chunks = prepare_sparse(paths, raw, digest=digest, incarnation="i")
        sparse = SparseShard(paths, chunks.ref)
        for chunk in (1, 3):
            length = chunks.chunk_length(chunk)
            sparse.write_verified(chunk, memoryview(made.data)[chunk * CHUNK_BYTES :][:length])
        assert sparse.missing([range(4)]) == [range(1), range(2, 3)]
        sparse.close()
    content = paths.sparse(0, 1, digest).read_bytes()
    assert len(content) == len(made.data)
    assert content[:CHUNK_BYTES] == bytes(CHUNK_BYTES), "a hole"
    assert content[3 * CHUNK_BYTES :] == made.data[3 * CHUNK_BYTES :]
    assert read_marks(paths, chunks) == b"\x00\x01\x00\x01"
    assert run_bytes(chunks, [range(1, 2), range(3, 4)]) == CHUNK_BYTES + chunks.chunk_length(3)
    assert run_bytes(chunks, [range(4)]) == len(made.data)
    with pytest.raises(IntegrityError, match="only"):
        SparseShard(paths, chunks.ref).write_verified(0, memoryview(b"short"))
    remove_sparse(paths, chunks.ref)
    remove_sparse(paths, chunks.ref)
    assert os.listdir(paths.staging) == []
    with pytest.raises(SnapshotNotFoundError):
        SparseShard(paths, chunks.ref)


def test_a_manifest_of_another_shard_prepares_nothing(tmp_path: Path) -> None:
    made, other = make_shard(), make_shard(seed=1)
    paths = RunPaths(tmp_path, RUN)
    with pytest.raises(BackstayError):
        prepare_sparse(paths, json_records.dumps(other.manifest), digest=made.manifest.digest, incarnation="i")
    assert parse_manifest(json_records.dumps(made.manifest), digest=made.manifest.digest).rank == 0
    assert not paths.staging.exists()
