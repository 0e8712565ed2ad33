"""A durable copy that the trainer asks for, in its code or because its job is told to stop: real torch, real daemons."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from backstay.testing import LocalCluster
from tests.kit.storage_world import RUN, cluster_with, records_in, storage_of, wait_persisted
from tests.kit.training import Training

RUN_ID = RUN.partition("/")[2]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "storage"
    path.mkdir()
    return path


@pytest.fixture
def cluster(directory: Path, tmp_path: Path) -> Iterator[LocalCluster]:
    """Copies are made on demand only."""
    with cluster_with(f"file://{directory}", tmp_path, nodes=2, every_steps=0) as cluster:
        yield cluster


def test_persist_has_the_newest_protected_snapshot_copied_while_training_goes_on(
    cluster: LocalCluster, directory: Path, tmp_path: Path
) -> None:
    ask = tmp_path / "ask"
    training = Training(cluster, tmp_path, run_id=RUN_ID, persist=[str(ask), ""])
    training.start()
    step = training.wait_protected(2)
    assert records_in(directory) == []
    ask.touch()
    wait_persisted(cluster, step)
    assert [process.poll() for process in training.processes] == [None, None]
    training.wait_protected(storage_of(cluster)["step"] + 2)
    assert len(records_in(directory)) == 1, "one wish, one copy"


def test_sigterm_asks_for_a_copy_and_what_the_signal_did_before_still_happens(
    cluster: LocalCluster, directory: Path, tmp_path: Path
) -> None:
    note = tmp_path / "handled"
    training = Training(cluster, tmp_path, run_id=RUN_ID, sigterm=[str(note), "default"])
    training.start()
    step = training.wait_protected(2)
    lives_on, ends = training.processes
    lives_on.send_signal(signal.SIGTERM)
    cluster.wait_until(note.exists, 20, "the handler that was there before to run")
    wait_persisted(cluster, step)
    assert [process.poll() for process in training.processes] == [None, None], "that handler lets it train on"
    first = storage_of(cluster)["step"]
    training.wait_protected(first + 1)

    ends.send_signal(signal.SIGTERM)
    assert ends.wait(30) == -signal.SIGTERM, "nothing was there before: it ends as it would have"
    lives_on.kill()
    wait_persisted(cluster, first + 1)
    left = training.protected_step()
    cluster.wait_until(lambda: max(records_in(directory)) >= left, 60, "the newest protected step to be copied")
