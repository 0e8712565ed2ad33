"""A step that one rank declares whole: every rank of its world hears of it, nobody else does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backstay.errors import StaleGenerationError, UsageError
from backstay.protocol import messages
from backstayd.core.messages.desired import RunDesired
from tests.kit.node import NodeThread, running_node
from tests.kit.shards import RUN
from tests.kit.trainer import PlainTrainer
from tests.kit.wording import refuses


@pytest.fixture
def node(tmpfs_dir: Path) -> Iterator[NodeThread]:
    with running_node(tmpfs_dir) as running:
        yield running


def _trainers(node: NodeThread, count: int) -> list[PlainTrainer]:
    node.start_world(world_size=count)
    trainers = [PlainTrainer(node.socket, rank=rank, world_size=count) for rank in range(count)]
    for trainer in trainers:
        trainer.attach()
    for trainer in trainers:
        trainer.restore()
    return trainers


def test_what_one_rank_seals_the_others_of_its_node_and_the_coordinator_hear(node: NodeThread) -> None:
    first, second = _trainers(node, 2)
    assert second.call(messages.AwaitSeal(after_step=0))[0] == messages.Sealed()
    first.call(messages.Seal(step=7))
    assert second.call(messages.AwaitSeal(after_step=0, wait_s=30))[0].step == 7
    (run,) = node.report().runs
    assert {session.rank: session.sealed_step for session in run.sessions} == {0: 7, 1: 0}
    began = time.monotonic()
    assert second.call(messages.AwaitSeal(after_step=7, wait_s=0.05))[0].step == 7
    assert time.monotonic() - began < 10
    first.close()
    second.close()


def test_what_another_node_sealed_comes_from_the_coordinator_and_only_of_this_world(node: NodeThread) -> None:
    (trainer,) = _trainers(node, 1)
    decision = node.call(lambda: node.node.state.run_desired(RUN)).decision
    node.desire(RunDesired(run=RUN, world_id="world", decision=decision, sealed_step=9, complete_step=8))
    assert trainer.call(messages.AwaitSeal(after_step=0, wait_s=30))[0].step == 9
    assert trainer.call(messages.AwaitSeal(after_step=0, wait_s=30, complete_step=8))[0].complete_step == 8
    node.desire(RunDesired(run=RUN, world_id="another", sealed_step=12))
    with pytest.raises(StaleGenerationError):
        trainer.call(messages.AwaitSeal(after_step=9))[0]
    trainer.close()


def test_a_seal_before_restore_or_not_after_the_base_is_refused(node: NodeThread) -> None:
    trainer = PlainTrainer(node.socket)
    trainer.attach()
    with pytest.raises(UsageError, match="restore"):
        trainer.call(messages.Seal(step=1))
    node.start_world()
    trainer.restore()
    with refuses(UsageError, "step_not_increasing", "seal"):
        trainer.call(messages.Seal(step=0))
    trainer.close()
