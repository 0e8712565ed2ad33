"""A store of one process against one real daemon: what is refused, what is bounded, what other readers find."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict, _load_state_dict_from_keys

import backstay.dcp
from backstay.errors import BackstayError, IntegrityError, SnapshotNotFoundError, UnavailableError, UsageError
from backstay.testing import LocalCluster
from backstay.trainer.state.json_codec import is_same
from tests.kit.files import files_in, flip_byte
from tests.kit.wording import refuses

CLUSTER = {"nodes": 1, "parity": 0, "lease_s": 1.0}
MIB = 1 << 20


class Life:
    """A run of its own for a test: its store, begun, and the stores of its next lives."""

    def __init__(self, cluster: LocalCluster, name: str) -> None:
        self.cluster, self._run_id = cluster, name.removeprefix("test_")[:90]
        self.store = self._open()
        assert self.store.begin() is None

    def _open(self) -> backstay.dcp.Store:
        return backstay.dcp.Store(run_id=self._run_id, socket=str(self.cluster.nodes[0].socket), strict=True)

    def again(self, step: int) -> backstay.dcp.Store:
        """The next life of the run, which begins from ``step``."""
        self.store.close()
        self.store = self._open()
        assert self.store.begin() == step
        return self.store

    def shards(self) -> dict[Path, os.stat_result]:
        place = self.cluster.nodes[0].memory_dir / "default" / self._run_id
        return files_in(place, "attempt-*/step-*/*.safetensors")


@pytest.fixture
def life(cluster: LocalCluster, request: pytest.FixtureRequest) -> Iterator[Life]:
    warnings.simplefilter("ignore", UserWarning)  # DCP's, about a single process
    made = Life(cluster, request.node.name)
    yield made
    made.store.close()


@pytest.fixture
def store(life: Life) -> backstay.dcp.Store:
    return life.store


@contextlib.contextmanager
def refuses_the_checkpoint(error_class: type[BackstayError], reason: str, *facts: object) -> Iterator[None]:
    """DCP's own exception, for an error of ours on the only rank."""
    with refuses(error_class, reason, *facts):
        try:
            yield
        except CheckpointException as error:
            ((ours, _),) = error.failures.values()
            raise ours from None


def state(value: float, count: int = 1000) -> dict[str, Any]:
    return {"w": torch.full((count,), value), "nested": {"b": torch.full((3, 5), value).t()}, "n": int(value)}


def test_a_new_run_has_nothing_to_load_and_says_so(store: backstay.dcp.Store) -> None:
    with refuses(SnapshotNotFoundError, "nothing_to_load"):
        store.reader().read_metadata()
    with pytest.raises(CheckpointException):
        dcp.load(state(0), storage_reader=store.reader())


def test_a_truncated_shard_is_refused_and_nothing_is_loaded(life: Life, store: backstay.dcp.Store) -> None:
    """Complaint 5: a checkpoint is accepted although a shard file is truncated, because ``.metadata`` exists."""
    dcp.save(state(1, 1 << 20), storage_writer=store.writer(1))
    assert store.wait_complete(1)
    second = life.again(1)
    target = state(7, 1 << 20)
    (path,) = life.shards()
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises((CheckpointException, UnavailableError)):
        dcp.load(target, storage_reader=second.reader())
    assert torch.equal(target["w"], torch.full((1 << 20,), 7.0))


def test_a_flipped_byte_is_refused(life: Life, store: backstay.dcp.Store) -> None:
    dcp.save(state(1), storage_writer=store.writer(1))
    assert store.wait_complete(1)
    second = life.again(1)
    (path,) = life.shards()
    flip_byte(path, path.stat().st_size - 100)
    with pytest.raises(CheckpointException):
        dcp.load(state(7), storage_reader=second.reader())


def test_memory_does_not_grow_with_the_number_of_saves(life: Life, store: backstay.dcp.Store) -> None:
    """Complaint 6: memory grows at every save. Slots are fixed files, and staging goes into them."""
    size = 16 * MIB
    full, stager = state(0, size // 4), store.stager()
    process, rss, used, inodes = psutil.Process(), [], [], set[int]()
    for step in range(1, 31):
        full["w"].fill_(step)
        dcp.async_save(full, storage_writer=store.writer(step), async_stager=stager).result()
        assert store.wait_complete(step)
        inodes |= {found.st_ino for found in life.shards().values()}
        rss.append(process.memory_info().rss)
        used.append(sum(life.cluster.files(0).values()))
    assert len(inodes) <= 2, "a slot keeps its inode"
    assert max(used[5:]) <= 2.5 * size + min(used[5:])
    assert max(rss[10:]) - rss[10] < size // 2, [value // MIB for value in rss]


def test_what_was_saved_is_read_by_plain_dcp_without_backstay(
    life: Life, store: backstay.dcp.Store, tmp_path: Path
) -> None:
    dcp.save(state(3), storage_writer=store.writer(1))
    assert store.wait_complete(1)
    for path in life.shards():
        shutil.copy(path, tmp_path)
    target = {"w": torch.zeros(1000), "nested": {"b": torch.zeros(5, 3)}}
    dcp.load(target, storage_reader=HuggingFaceStorageReader(str(tmp_path)))
    assert torch.equal(target["w"], state(3)["w"])
    assert torch.equal(target["nested"]["b"], state(3)["nested"]["b"])


class Own:
    """A type that nobody allowed."""


def test_what_could_only_be_unpickled_is_refused_when_it_is_saved(store: backstay.dcp.Store) -> None:
    with refuses_the_checkpoint(UsageError, "unsafe_object", "nested.thing"):
        dcp.save({"nested": {"thing": Own()}}, storage_writer=store.writer(1))
    dcp.save(state(2), storage_writer=store.writer(2))
    assert store.wait_complete(2)


def test_what_is_refused_is_named_with_its_type_and_what_to_do(store: backstay.dcp.Store) -> None:
    cases: list[tuple[Any, str, str]] = [
        (np.float32(2), "numpy.float32", ".item()"),
        (np.ones(3), "numpy.ndarray", "from_numpy"),
        (io.BytesIO(b"x"), "_io.BytesIO", "getvalue"),
        (Own(), ".Own", "add_safe_globals"),
    ]
    for step, (value, kind, call) in enumerate(cases, start=1):
        with refuses_the_checkpoint(UsageError, "unsafe_object", "a.list.1", kind, call):
            dcp.save({"a": {"list": [1, value], "b": 2}}, storage_writer=store.writer(step))


def test_a_load_without_a_template_is_nested_as_it_was_saved(life: Life, store: backstay.dcp.Store) -> None:
    saved = {"w": torch.ones(8), "opt": {"state": [{"m": torch.ones(2)}, {"m": torch.zeros(3)}], "lr": 0.5}, "a.b": 1}
    stager = store.stager()
    dcp.save(saved, storage_writer=store.writer(1))
    for step in (2, 3):  # the second one is staged into the slot
        dcp.async_save(saved, storage_writer=store.writer(step), async_stager=stager).result()
    assert store.wait_complete(3)
    second = life.again(3)
    found: dict[str, Any] = {}
    _load_state_dict(found, second.reader(), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    assert is_same(found, saved)
    part = _load_state_dict_from_keys({"opt"}, storage_reader=second.reader())
    assert is_same(part, {"opt": saved["opt"]})
    flat = DefaultSavePlanner(flatten_state_dict=False)
    dcp.save({"w": torch.ones(8)}, storage_writer=second.writer(4), planner=flat)
    assert second.wait_complete(4)
    third = life.again(4)
    assert third.reader().read_metadata().planner_data is None


def test_a_missing_tensor_and_one_of_another_dtype_are_named(life: Life, store: backstay.dcp.Store) -> None:
    dcp.save({"w": torch.ones(8)}, storage_writer=store.writer(1))
    assert store.wait_complete(1)
    second = life.again(1)
    with pytest.raises(CheckpointException, match="other"):
        dcp.load({"other": torch.ones(8)}, storage_reader=second.reader())
    with refuses_the_checkpoint(IntegrityError, "layout_mismatch", "torch.float32", "torch.float64"):
        dcp.load({"w": torch.ones(8, dtype=torch.float64)}, storage_reader=second.reader())


def test_a_state_that_changes_its_shape_between_async_saves_is_saved_whole(
    life: Life, store: backstay.dcp.Store
) -> None:
    stager = store.stager()
    for step, count in ((1, 1000), (2, 1000), (3, 3000), (4, 3000)):
        full = state(step, count)
        future = dcp.async_save(full, storage_writer=store.writer(step), async_stager=stager)
        full["w"].zero_()
        future.result()
        assert store.wait_complete(step)
    second = life.again(4)
    target = state(0, 3000)
    dcp.load(target, storage_reader=second.reader())
    assert torch.equal(target["w"], torch.full((3000,), 4.0))
    assert target["n"] == 4


def test_steps_must_increase_and_a_writer_is_for_one_save(store: backstay.dcp.Store) -> None:
    dcp.save(state(5), storage_writer=store.writer(5))
    with refuses_the_checkpoint(UsageError, "step_not_increasing", 5):
        dcp.save(state(5), storage_writer=store.writer(5))
    with refuses(UsageError, "no_writer"):
        store.stager().stage(state(6))
    with refuses(UsageError, "other_process", "THREAD"):
        store.writer(7).__reduce__()


def test_before_begin_everything_says_what_to_do(cluster: LocalCluster) -> None:
    idle = backstay.dcp.Store(run_id="idle", socket=str(cluster.nodes[0].socket))
    with refuses(UsageError, "not_begun", "begin()"):
        idle.writer(1)
    nowhere = backstay.dcp.Store(run_id="x", socket="/nonexistent/backstay.sock")
    with refuses(UnavailableError, "no_daemon"):
        nowhere.begin(deadline_s=0.5)
