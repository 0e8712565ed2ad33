"""A broadcast condition: nobody misses a change, and nobody starves."""

from __future__ import annotations

import asyncio

from backstayd.change_signal import Signal

FOREVER_S = 60.0


def test_every_waiter_is_woken_by_one_notification() -> None:
    async def scenario() -> None:
        signal = Signal()
        waiters = [asyncio.create_task(signal.wait(FOREVER_S)) for _ in range(3)]
        await asyncio.sleep(0)
        signal.notify()
        await asyncio.wait_for(asyncio.gather(*waiters), 5)

    asyncio.run(scenario())


def test_a_change_between_looking_and_waiting_is_not_missed() -> None:
    async def scenario() -> None:
        signal = Signal()
        seen = signal.count
        signal.notify()
        await asyncio.wait_for(signal.wait(FOREVER_S, since=seen), 5)
        waiting = asyncio.create_task(signal.wait(FOREVER_S, since=signal.count))
        await asyncio.sleep(0)
        assert not waiting.done(), "it was seen"
        waiting.cancel()

    asyncio.run(scenario())


def test_a_wait_ends_by_itself_and_one_that_notifies_itself_lets_others_run() -> None:
    async def scenario() -> None:
        signal = Signal()
        await asyncio.wait_for(signal.wait(0.0), 5)
        turns = []

        async def other() -> None:
            turns.append(1)

        task = asyncio.create_task(other())
        for _ in range(3):
            seen = signal.count
            signal.notify()
            await signal.wait(FOREVER_S, since=seen)
        assert turns == [1]
        await task

    asyncio.run(scenario())
