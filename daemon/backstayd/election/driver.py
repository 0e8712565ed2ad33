"""Runs the elector: queries the store from threads, each call with a deadline, and notifies its owner when to lead or stop.

Runs in one event loop. Its clock includes time asleep, so that a suspended host knows that its lease has expired. Must not
make decisions: the elector does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from backstay.errors import BackstayError, ConfigError, UnavailableError
from backstayd.election.elector import Action, Elector, Lead, Read, StepDown, Swap
from backstayd.election.lease import LeaseRecord, LeaseStore, Timing

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Election:
    """One candidate, for the lifetime of its process.

    Args:
        on_lead: Called with the term when this candidate begins to lead.
        on_step_down: Called with the reason when it stops leading; nothing may be sent after that.
        clock: Seconds, including time asleep.
    """

    def __init__(
        self,
        store: LeaseStore,
        elector: Elector,
        timing: Timing,
        *,
        on_lead: Callable[[int], None],
        on_step_down: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self._store, self._elector, self._timing, self._clock = store, elector, timing, clock
        self._on_lead, self._on_step_down = on_lead, on_step_down
        # Two, so that one call that hangs in the resolver does not block the next.
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="backstay-election")
        self._ticker: asyncio.Task[None] | None = None
        self._calls: set[asyncio.Task[None]] = set()
        self._woken, self._answered = asyncio.Event(), asyncio.Event()
        self._is_troubled = False
        self._logged_leader = ""

    async def start(self) -> None:
        """Read once, then compete. Waits for a store that is unreachable; ConfigError if it rejects us."""
        try:
            await self._in_thread(self._store.read)
        except UnavailableError as error:
            self._trouble(error)
        except ConfigError:
            await self._end_store()
            raise
        self._ticker = asyncio.get_running_loop().create_task(self._run(), name="election")

    def may_act(self) -> bool:
        """Whether this process leads right now; check before sending anything. Steps down if the lease expired unnoticed."""
        now_s = self._clock()
        if self._elector.is_leading and not self._elector.may_act(now_s):
            self._carry_out(self._elector.tick(now_s))
        return self._elector.may_act(now_s)

    def failure(self) -> str:
        """Why it can no longer compete, as text; "" while it competes. From any thread."""
        return "the election task ended unexpectedly" if self._ticker is not None and self._ticker.done() else ""

    def resign(self, reason: str) -> None:
        """Stop leading and let others lead for one lease."""
        self._carry_out(self._elector.resign(reason, self._clock()))
        self._woken.set()

    def is_leading(self) -> bool:
        """The same without side effects: may be called from any thread."""
        return self._elector.may_act(self._clock())

    def margin_s(self) -> float:
        """How long it may lead without another renewal; 0 for a standby."""
        return self._elector.margin_s(self._clock())

    def leader(self) -> LeaseRecord | None:
        """The leader as far as this candidate knows; None while it is unsure."""
        return self._elector.leader(self._clock())

    async def close(self) -> None:
        """Step down, release the lease so that another takes over at once, and stop; takes at most one lease."""
        if self._ticker is not None:
            self._carry_out(self._elector.stop(self._clock()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._timing.lease_s):
                    while not self._elector.is_finished:
                        self._answered.clear()
                        self._woken.set()
                        await self._answered.wait()
            self._ticker.cancel()
        tasks = [*([self._ticker] if self._ticker is not None else []), *self._calls]
        for task in self._calls:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._end_store()

    async def _end_store(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._store.close)

    async def _run(self) -> None:
        while True:
            now_s = self._clock()
            self._carry_out(self._elector.tick(now_s))
            self._log_leader()
            self._woken.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, self._elector.wake_s(now_s) - self._clock())):
                    await self._woken.wait()

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Lead):
                logger.info("this coordinator leads, term %d (lease in %s)", action.term, self._store.name)
                self._on_lead(action.term)
            elif isinstance(action, StepDown):
                logger.warning("this coordinator no longer leads: %s", action.reason)
                self._on_step_down(action.reason)
            else:
                task = asyncio.get_running_loop().create_task(self._ask(action), name="election-call")
                self._calls.add(task)
                task.add_done_callback(self._calls.discard)

    def _log_leader(self) -> None:
        """Log another leader, once per term."""
        record = self.leader()
        if record is not None and record.holder != self._elector.holder and record.holder != self._logged_leader:
            logger.info("standing by: the coordinator at %s leads", record.address)
            self._logged_leader = record.holder
        elif self._elector.is_leading:
            self._logged_leader = ""

    async def _ask(self, question: Read | Swap) -> None:
        """Query the store, pass its answer to the elector, and carry out the resulting actions."""
        try:
            if isinstance(question, Read):
                found = await self._in_thread(self._store.read)
                actions = self._elector.on_read(found, self._clock())
            else:
                version = await self._in_thread(lambda: self._store.compare_and_swap(question.record, question.version))
                actions = self._elector.on_swapped(version, self._clock())
            self._is_troubled = False
        except (BackstayError, OSError) as error:
            self._trouble(error)
            actions = self._elector.on_failed(str(error), self._clock())
        except Exception as error:  # the boundary of a call: whatever a client library raises counts as no answer
            logger.exception("unexpected error while querying %s", self._store.name)
            actions = self._elector.on_failed(repr(error), self._clock())
        self._carry_out(actions)
        self._woken.set()
        self._answered.set()

    async def _in_thread(self, call: Callable[[], T]) -> T:
        """Run ``call`` in a thread; UnavailableError at the deadline, even if the thread still hangs."""
        try:
            async with asyncio.timeout(self._timing.call_timeout_s):
                return await asyncio.get_running_loop().run_in_executor(self._threads, call)
        except TimeoutError:
            message = f"{self._store.name} did not answer within {self._timing.call_timeout_s:g} s"
            raise UnavailableError(message, reason="no_lease_store") from None

    def _trouble(self, error: Exception) -> None:
        level = logging.DEBUG if self._is_troubled else logging.WARNING
        logger.log(level, "the election cannot reach its store, retrying: %s", error)
        self._is_troubled = True
