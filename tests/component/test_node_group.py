"""Three real nodes and a real coordinator in one process: protect, lose, rebuild, and what a flipped byte does."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from backstay.protocol import messages
from backstayd.config.schema import CoordinatorConfig
from backstayd.coordinator.app import CoordinatorProcess
from backstayd.store.paths import RunPaths
from tests.component.coder_nodes import spoil_parity
from tests.kit.files import files_in
from tests.kit.node import NodeThread, running_node
from tests.kit.shards import RUN, MadeShard
from tests.kit.trainer import PlainTrainer, wait_until

LEASE_S = 1.0
RANKS = range(3)


@contextmanager
def running_coordinator(parity: int) -> Iterator[CoordinatorProcess]:
    box: dict[str, Any] = {}
    started = threading.Event()

    async def main() -> None:
        process = CoordinatorProcess(
            CoordinatorConfig(insecure=True, listen="127.0.0.1:0", http="127.0.0.1:0", parity=parity, lease_s=LEASE_S)
        )
        await process.start()
        box.update(process=process, loop=asyncio.get_running_loop(), stop=asyncio.Event())
        started.set()
        await box["stop"].wait()
        await process.close()

    thread = threading.Thread(target=lambda: asyncio.run(main()), name="coordinator-under-test")
    thread.start()
    assert started.wait(20)
    try:
        yield box["process"]
    finally:
        box["loop"].call_soon_threadsafe(box["stop"].set)
        thread.join(20)
        assert not thread.is_alive()


class Group:
    def __init__(self, directory: Path, coordinator: str, stack: ExitStack) -> None:
        self.directory, self.coordinator = directory, coordinator
        self._stack = stack
        self._own: dict[int, ExitStack] = {}
        self.nodes: dict[int, NodeThread] = {}
        for number in RANKS:
            self.start(number)

    def start(self, number: int) -> None:
        own = self._stack.enter_context(ExitStack())
        node = own.enter_context(
            running_node(
                self.directory, name=f"n{number}", lease_s=LEASE_S, coordinator=self.coordinator, is_alone=False
            )
        )
        self._own[number], self.nodes[number] = own, node

    def destroy(self, number: int) -> None:
        """The daemon ends and its memory is gone."""
        self._own[number].close()
        shutil.rmtree(self.nodes.pop(number).memory_dir)

    def world(self, world_id: str, nodes: list[int] | None = None) -> tuple[list[PlainTrainer], list[Any]]:
        """Trainers of all ranks, restored: (trainers, (answer, bytes by rank) of each)."""
        trainers = [
            PlainTrainer(
                self.nodes[(nodes or list(RANKS))[rank]].socket,
                rank=rank,
                world_size=len(RANKS),
                world_id=world_id,
                payload_bytes=600_000 + 70_000 * rank,
            )
            for rank in RANKS
        ]
        for trainer in trainers:
            trainer.attach()
        with ThreadPoolExecutor(len(RANKS)) as pool:
            return trainers, list(pool.map(lambda trainer: trainer.restore(deadline_s=30), trainers))

    def snapshot(self, trainers: list[PlainTrainer], step: int) -> list[MadeShard]:
        """Take ``step`` on every rank and wait until it is protected."""
        with ThreadPoolExecutor(len(RANKS)) as pool:
            made = list(pool.map(lambda trainer: trainer.snapshot(step, wait_s=10), trainers))
        wait_until(lambda: self.protected_step() >= step, why=f"step {step} is protected")
        return made

    def protected_step(self) -> int:
        node = next(iter(self.nodes.values()))
        return node.call(lambda: node.node.state.run_desired(RUN).protected_step)

    def shard_file(self, number: int, step: int) -> Path:
        (path,) = self.nodes[number].memory_dir.glob(f"{RUN}/attempt-*/step-{step:08d}/*.safetensors")
        return path


@pytest.fixture
def group(tmpfs_dir: Path, request: pytest.FixtureRequest) -> Iterator[Group]:
    with running_coordinator(getattr(request, "param", 1)) as coordinator, ExitStack() as stack:
        group = Group(tmpfs_dir, coordinator.address, stack)
        yield group
        for node in group.nodes.values():
            node.check()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    with path.open("r+b") as file:
        file.write(data)


def test_a_world_starts_is_protected_loses_a_node_and_gets_every_byte_back(group: Group) -> None:
    trainers, answers = group.world("first")
    assert {answer.outcome for answer, _ in answers} == {"NONE"}
    for step in (1, 2, 3):
        made = group.snapshot(trainers, step)
    for number, node in group.nodes.items():
        (run,) = node.report().runs
        assert {(shard.step, shard.rank) for shard in run.shards} >= {(3, number)}
        files = [*files_in(node.memory_dir / RUN / "slots", "rank-*.*"), *files_in(node.memory_dir, "*.safetensors")]
        assert len(files) == 2
    for trainer in trainers:
        trainer.close()
    group.destroy(0)
    group.start(0)
    trainers, answers = group.world("second")
    assert {(answer.outcome, answer.step) for answer, _ in answers} == {("EXACT", 3)}
    assert [shards[rank] for rank, (_, shards) in enumerate(answers)] == [shard.data for shard in made]
    group.snapshot(trainers, 4)
    for trainer in trainers:
        trainer.call(messages.Finish())
        trainer.close()
    for node in group.nodes.values():
        wait_until(lambda node=node: not (node.memory_dir / "job").exists(), why="nothing of the run is left")


def test_a_flipped_byte_here_or_at_a_peer_is_put_aside_and_the_next_source_used(group: Group) -> None:
    trainers, _ = group.world("first")
    made = group.snapshot(trainers, 1)
    for trainer in trainers:
        trainer.close()
    flip(group.shard_file(1, 1))
    moved = [1, 2, 0]  # rank 1 comes to node 2, so a peer reads the bad shard
    trainers, answers = group.world("second", moved)
    assert [shards[rank] for rank, (_, shards) in enumerate(answers)] == [shard.data for shard in made]
    assert {(answer.outcome, answer.step) for answer, _ in answers} == {("EXACT", 1)}
    quarantined = group.nodes[1].memory_dir / RUN / "quarantine"
    wait_until(lambda: list(quarantined.glob("*.json")), why="the holder looked itself and put its shard aside")
    made = group.snapshot(trainers, 2)
    for trainer in trainers:
        trainer.close()
    flip(group.shard_file(0, 2))
    trainers, answers = group.world("third", moved)
    assert [shards[rank] for rank, (_, shards) in enumerate(answers)] == [shard.data for shard in made]
    for trainer in trainers:
        trainer.close()


@pytest.mark.parametrize("group", [2], indirect=True)
def test_a_lost_node_is_rebuilt_past_parity_that_is_wrong_with_right_digests(group: Group) -> None:
    trainers, _ = group.world("first")
    made = group.snapshot(trainers, 1)
    for trainer in trainers:
        trainer.close()
    group.destroy(0)
    stored = group.nodes[1].report().runs[0]
    (spoilt,) = [fragment for fragment in stored.fragments if (fragment.stripe, fragment.index) == (1, 0)]
    spoil_parity(RunPaths(group.nodes[1].memory_dir, RUN), stored.plans[0], stripe=1, index=0, at=5)
    group.start(0)
    trainers, answers = group.world("second")
    assert {(answer.outcome, answer.step) for answer, _ in answers} == {("EXACT", 1)}
    assert [shards[rank] for rank, (_, shards) in enumerate(answers)] == [shard.data for shard in made]
    (mark,) = group.nodes[1].report().runs[0].quarantined
    assert (mark.plan_id, mark.stripe, mark.index) == (spoilt.plan_id, 1, 0)
    assert "does not fit the other fragments" in mark.reason
    for trainer in trainers:
        trainer.close()


def test_a_daemon_that_restarts_under_a_running_world_is_protected_again(group: Group) -> None:
    trainers, _ = group.world("first")
    group.snapshot(trainers, 1)
    group._own[2].close()
    group.start(2)
    trainers[2].close()
    again = PlainTrainer(
        group.nodes[2].socket, rank=2, world_size=3, world_id="first", payload_bytes=trainers[2].payload_bytes
    )
    again.attach(attempt=trainers[2].attempt)
    trainers[2] = again
    group.snapshot(trainers, 2)
    for trainer in trainers:
        trainer.close()
