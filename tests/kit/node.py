"""A whole node daemon in a thread of the test, told what is desired by the test instead of by a coordinator."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from backstay.ids import Generation
from backstayd.config.schema import NodeConfig
from backstayd.core.messages.decisions import Decision, DecisionPhase, Outcome, Placement
from backstayd.core.messages.desired import NodeDesired, Peer, RunDesired
from backstayd.core.messages.report import NodeReport
from backstayd.node.app import Node, start_node
from backstayd.store.adopt import scan
from backstayd.store.index import RunIndex
from tests.kit.shards import RUN

T = TypeVar("T")
COORDINATOR = "00000000000000cc"


class NodeThread:
    """One running node. ``desire`` plays the coordinator."""

    def __init__(self, node: Node, loop: asyncio.AbstractEventLoop, config: NodeConfig) -> None:
        self.node, self.loop, self.config = node, loop, config
        self.generation = max(1, node.state.store.generation.number)
        self.peers: tuple[Peer, ...] = ()

    @property
    def socket(self) -> Path:
        return self.config.socket

    @property
    def memory_dir(self) -> Path:
        return self.config.memory_dir

    def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` in the node's loop."""

        async def run() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def desire(
        self, *runs: RunDesired, generation: int | None = None, answered_s: float | None = None, **more: Any
    ) -> None:
        """``answered_s``: when the report was sent that this answers; now, if it is not said."""
        if generation is not None:
            self.generation = generation
        desired = NodeDesired(generation=Generation(self.generation, COORDINATOR), runs=runs, peers=self.peers, **more)
        sent_s = self.node.state.clock.boot_s() if answered_s is None else answered_s
        self.call(lambda: self.node.reconciler.on_desired(desired, sent_s))

    def report(self) -> NodeReport:
        return self.call(self.node.reporter.report)

    def start_world(self, *, world_id: str = "world", attempt: int = 1, world_size: int = 1, **more: Any) -> Decision:
        """Let the world start from scratch here."""
        decision = fresh_decision(self.config.name, world_id=world_id, attempt=attempt, world_size=world_size)
        phase = DecisionPhase.RELEASE
        self.desire(RunDesired(run=RUN, world_id=world_id, decision=decision, decision_phase=phase, **more))
        return decision

    def check(self, *, deadline_s: float = 10.0) -> None:
        """The index equals what a fresh look at the directory finds, once no coder of this node or a peer writes there."""

        def differing() -> list[str]:
            store = self.node.state.store
            store.check_invariants()
            found = scan(self.memory_dir)
            runs = {run: found.runs.get(run, RunIndex(run=run)) for run in store.runs}
            return [run for run, index in store.runs.items() if index != runs[run]] + [
                *(found.runs.keys() - runs.keys())
            ]

        end_s = time.monotonic() + deadline_s
        while wrong := self.call(differing):
            assert time.monotonic() < end_s, f"index and directory differ: {wrong}"
            time.sleep(0.05)


def fresh_decision(node: str, *, world_id: str, attempt: int, world_size: int) -> Decision:
    return Decision(
        decision_id=f"{attempt:032x}",
        generation=Generation(attempt, COORDINATOR),
        run=RUN,
        world_id=world_id,
        world_size=world_size,
        attempt=attempt,
        outcome=Outcome.NONE,
        placements=tuple(Placement(rank=rank, node=node) for rank in range(world_size)),
    )


@contextmanager
def running_node(
    directory: Path, *, name: str = "n1", coordinator: str = "127.0.0.1:1", is_alone: bool = True, **settings: Any
) -> Iterator[NodeThread]:
    """A node with its memory in ``directory``; everything of it is ended at the end.

    ``is_alone``: the test itself says what is desired, and the node takes a coordinator for connected.
    """
    config = NodeConfig(
        name=name,
        memory_dir=directory / f"{name}-memory",
        coordinator=coordinator,
        bulk="127.0.0.1:0",
        http="127.0.0.1:0",
        insecure=True,
        **{"socket": directory / f"{name}.sock", "lease_s": 0.6, **settings},
    )
    started = threading.Event()
    box: dict[str, Any] = {}

    async def main() -> None:
        try:
            async with start_node(config) as node:
                if is_alone:
                    node.state.link.is_connected = True
                box.update(node=node, loop=asyncio.get_running_loop(), stop=asyncio.Event())
                started.set()
                await box["stop"].wait()
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            box["error"] = error
            started.set()

    thread = threading.Thread(target=lambda: asyncio.run(main()), name="node-under-test")
    thread.start()
    started.wait(30)
    try:
        if "error" in box:
            raise box["error"]
        yield NodeThread(box["node"], box["loop"], config)
    finally:
        if "stop" in box:
            box["loop"].call_soon_threadsafe(box["stop"].set)
        thread.join(30)
        assert not thread.is_alive(), "the node did not end"
    if "error" in box:
        raise box["error"]
