"""Tasks by name: one at a time, tried again with pauses, ended together."""

from __future__ import annotations

import asyncio

from backstayd.clock import Clock
from backstayd.node.reconcile.tasks import TaskKey, TaskKind, Tasks

RUN = "job/run"
KEY = TaskKey(RUN, TaskKind.ENCODE, "a")
UPLOAD = TaskKey(RUN, TaskKind.UPLOAD, "a", 0)


class SteppedClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_task_that_fails_is_tried_again_after_growing_pauses() -> None:
    async def scenario() -> None:
        time = SteppedClock()
        tasks = Tasks(Clock(monotonic_s=time), lambda: None, last_pause_s=1.0, durable_pause_s=3.0)

        async def broken() -> None:
            raise ValueError("on purpose")

        pauses = []
        for _ in range(6):
            tasks.start(KEY, broken)
            while tasks.running(RUN):
                await asyncio.sleep(0)
            begin = time.now
            while KEY in tasks.settled(RUN):
                time.now += 0.05
            pauses.append(time.now - begin)
        assert pauses == sorted(pauses)
        assert pauses[0] < 0.2
        assert 1.0 <= pauses[-1] < 1.2
        for _ in range(6):
            tasks.fail(UPLOAD)
        time.now += 2.9
        assert UPLOAD in tasks.settled(RUN), "durable storage is tried again less often"
        await tasks.close()

    asyncio.run(scenario())


def test_what_is_settled_for_good_stays_so_and_close_ends_the_rest() -> None:
    async def scenario() -> None:
        ended = []
        tasks = Tasks(Clock(), lambda: ended.append(1), last_pause_s=1.0, durable_pause_s=3.0)

        async def long() -> None:
            await asyncio.sleep(60)

        tasks.settle(KEY)
        tasks.start(UPLOAD, long)
        assert tasks.running(RUN) == {UPLOAD}
        assert tasks.running("job/other") == frozenset()
        assert tasks.settled(RUN) == {KEY}
        await tasks.close()
        assert tasks.running(RUN) == frozenset()
        assert ended == [1]

    asyncio.run(scenario())
