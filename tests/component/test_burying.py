"""A node that is told that a run is over: what it deletes, what it keeps, and what its next daemon still knows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from backstay.errors import StaleGenerationError
from backstay.ids import SnapshotKey
from backstay.protocol import messages
from backstayd.coder.jobs import CoderEvent
from backstayd.core.messages.desired import RunDesired
from backstayd.core.messages.tombstone import Cause, Tombstone
from backstayd.node.reconcile.memory_jobs import note_stored
from backstayd.store.paths import FragmentRef
from tests.kit.node import NodeThread, running_node
from tests.kit.shards import RUN
from tests.kit.trainer import PlainTrainer, trainer_of, wait_until
from tests.kit.wording import refuses

FINISHED = Tombstone(run=RUN, attempt=1, generation=1, cause=Cause.FINISHED, world_id="world", step=1, unix_s=2e9)


@pytest.fixture
def node(tmpfs_dir: Path) -> Iterator[NodeThread]:
    with running_node(tmpfs_dir) as running:
        yield running
        running.check()


def test_a_run_that_is_over_leaves_nothing_but_a_tombstone_that_the_next_daemon_knows(tmpfs_dir: Path) -> None:
    with running_node(tmpfs_dir) as node:
        node.start_world()
        trainer = trainer_of(node)
        trainer.snapshot(1)
        trainer.call(messages.Finish())
        node.desire(tombstones=(FINISHED,))
        wait_until(lambda: not (node.memory_dir / "job").exists(), why="the run is deleted")
        assert node.report().runs == ()
        assert node.report().tombstones == (FINISHED,)
        trainer.close()
    with running_node(tmpfs_dir) as node:
        assert node.report().tombstones == (FINISHED,)
        node.desire(lifted=(FINISHED,))
        assert node.report().tombstones == ()
    with running_node(tmpfs_dir) as node:
        assert node.report().tombstones == (), "and what was lifted stays so"


def test_a_trainer_that_writes_what_a_tombstone_names_is_spared(node: NodeThread) -> None:
    decision = node.start_world()
    trainer = trainer_of(node)
    trainer.snapshot(1)
    node.desire(tombstones=(replace(FINISHED, cause=Cause.FORGOTTEN),))
    trainer.snapshot(2)
    assert [shard.step for run in node.report().runs for shard in run.shards] == [1, 2]
    assert node.report().runs[0].decision == decision
    trainer.close()


def test_a_history_above_a_tombstone_keeps_all_it_has(node: NodeThread) -> None:
    node.start_world()
    first = trainer_of(node)
    first.snapshot(1)
    first.call(messages.Finish())
    decision = node.start_world(world_id="later", attempt=2)
    second = trainer_of(node, world_id="later")
    second.snapshot(5)
    wait_until(lambda: node.report().runs[0].decision == decision, why="the later history is recorded")
    assert [(s.attempt, s.step) for s in node.report().runs[0].shards] == [(1, 1), (2, 5)]
    live = RunDesired(run=RUN, world_id="later", decision=decision)
    node.desire(live, tombstones=(FINISHED,))
    wait_until(lambda: [s.attempt for s in node.report().runs[0].shards] == [2], why="the earlier one is deleted")
    assert node.report().runs[0].decision == decision
    second.snapshot(6)
    first.close()
    second.close()


def test_late_bytes_of_a_run_that_is_over_are_deleted_again(node: NodeThread) -> None:
    node.start_world()
    trainer = trainer_of(node)
    trainer.snapshot(1)
    trainer.call(messages.Finish())
    node.desire(tombstones=(FINISHED,))
    wait_until(lambda: node.report().runs == (), why="the run is deleted")
    trainer.close()
    late = node.memory_dir / RUN / "attempt-0001" / "step-00000001" / "parity"
    late.mkdir(parents=True)
    event = CoderEvent(
        kind="fragment_stored",
        fragment=FragmentRef(run=RUN, key=SnapshotKey(1, 1), plan_id="ab" * 16, stripe=0, index=1),
    )
    node.call(lambda: note_stored(node.node.state, event))
    assert not (node.memory_dir / "job").exists()


def test_a_name_under_which_nothing_was_ever_kept_goes_with_its_last_session(node: NodeThread) -> None:
    trainer = PlainTrainer(node.socket)
    trainer.attach()
    assert [run.run for run in node.report().runs] == [RUN]
    trainer.close()
    wait_until(lambda: node.report().runs == (), why="the session is gone")
    assert not (node.memory_dir / "job").exists()
    stale = PlainTrainer(node.socket, world_id="never decided")
    with refuses(StaleGenerationError, "stale_world", "never decided"):
        stale.attach(attempt=1)
    assert not (node.memory_dir / "job").exists(), "nor does one who is refused leave his name"
    stale.close()
