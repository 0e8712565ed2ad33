"""Candidates of an election in simulated true time: a store that is slow, loses, repeats and forgets; clocks that differ.

Each candidate lives by its own clock; the simulation alone knows true time. Seeded: the same seed is the same run.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from backstayd.election.elector import Action, Elector, Lead, Read, StepDown
from backstayd.election.lease import LeaseRecord, Timing, Versioned

LEASE_S = 9.0
CLOCK_RATIO = 1.5  # the bound that Timing states; rates are drawn within it


@dataclass
class Store:
    """One record. ``version`` goes on counting over deletions, as etcd's revision and Kubernetes' resourceVersion do."""

    found: Versioned | None = None
    version: int = 0

    def read(self) -> Versioned | None:
        return self.found

    def swap(self, record: LeaseRecord, version: str | None) -> str | None:
        if (self.found.version if self.found is not None else None) != version:
            return None
        self.version += 1
        self.found = Versioned(record=record, version=str(self.version))
        return self.found.version


@dataclass
class Candidate:
    name: str
    rate: float
    offset_s: float
    elector: Elector
    paused_until_s: float = 0.0
    is_dead: bool = False
    open_question: int = 0  # answers to older ones are not heard
    pending: list[Callable[[], None]] = field(default_factory=list)

    def local_s(self, true_s: float) -> float:
        return self.offset_s + self.rate * true_s

    def true_s(self, local_s: float) -> float:
        return (local_s - self.offset_s) / self.rate


class TwoLeadersError(AssertionError):
    """Two candidates may act at one moment."""


class Simulation:
    """Invariant, checked at every event: at most one candidate may act, by true time; terms of reigns grow."""

    def __init__(self, seed: int, *, count: int = 3, is_forgetful: bool = False) -> None:
        self.random = random.Random(seed)
        self.now_s, self.store = 0.0, Store()
        self.timing = Timing(lease_s=LEASE_S)
        self.is_faulty, self.is_forgetful, self.outage_until_s = True, is_forgetful, 0.0
        self.reigns: list[tuple[float, str, int]] = []
        self._order, self._names = itertools.count(), itertools.count()
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self.candidates = [self._new() for _ in range(count)]
        for candidate in self.candidates:
            self._at(self.random.uniform(0, LEASE_S), lambda candidate=candidate: self._tick(candidate))

    def _new(self) -> Candidate:
        name = f"c{next(self._names)}"
        half = CLOCK_RATIO**0.5 * 0.9999
        rate = self.random.choice([1 / half, half, self.random.uniform(1 / half, half)])
        elector = Elector(name, f"{name}:7070", self.timing)
        return Candidate(name, rate, self.random.uniform(0, 1e6), elector)

    def run(self, until_s: float) -> None:
        while self._queue and self._queue[0][0] <= until_s:
            self.now_s, _, action = heapq.heappop(self._queue)
            action()
            self.check()
        self.now_s = until_s

    def disturb(self, until_s: float) -> None:
        """Pauses, kills, orderly ends, outages at random moments up to then; more likely a leader than another."""
        at_s = self.now_s
        while (at_s := at_s + self.random.expovariate(1 / (1.5 * LEASE_S))) < until_s:
            self._at(at_s - self.now_s, self._disturb_once)

    def acting(self) -> list[Candidate]:
        return [c for c in self.candidates if not c.is_dead and c.elector.may_act(c.local_s(self.now_s))]

    def check(self) -> None:
        acting = self.acting()
        if len(acting) > 1:
            raise TwoLeadersError(f"at {self.now_s}: {[c.name for c in acting]}; reigns {self.reigns[-4:]}")

    def heal(self) -> None:
        self.is_faulty, self.outage_until_s = False, 0.0

    def _at(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now_s + max(0.0, delay_s), next(self._order), action))

    def _disturb_once(self) -> None:
        if not self.is_faulty:
            return
        leaders = [c for c in self.candidates if c.elector.is_leading]
        victim = self.random.choice(leaders if leaders and self.random.random() < 0.7 else self.candidates)
        kind = self.random.choice(["pause", "pause", "kill", "stop", "outage"] + ["delete"] * self.is_forgetful)
        if kind == "pause":
            victim.paused_until_s = self.now_s + self.random.uniform(0, 2.5 * LEASE_S)
            self._at(victim.paused_until_s - self.now_s, lambda: self._thaw(victim))
        elif kind == "outage":
            self.outage_until_s = self.now_s + self.random.uniform(0, 2 * LEASE_S)
        elif kind == "delete":
            self.store.found = None
        elif kind == "stop":
            self._hear(victim, lambda: self._carry_out(victim, victim.elector.stop(victim.local_s(self.now_s))))
            self._at(self.random.uniform(0.5, 1.5) * LEASE_S, lambda: self._replace(victim))
        else:
            self._replace(victim)

    def _replace(self, victim: Candidate) -> None:
        if not victim.is_dead:
            victim.is_dead = True
            self.candidates.remove(victim)
            fresh = self._new()
            self.candidates.append(fresh)
            self._at(self.random.uniform(0, LEASE_S), lambda: self._tick(fresh))

    def _thaw(self, candidate: Candidate) -> None:
        waiting, candidate.pending = candidate.pending, []
        if self.now_s < candidate.paused_until_s:
            candidate.pending = waiting
            return
        self.random.shuffle(waiting)
        for action in waiting:
            action()

    def _hear(self, candidate: Candidate, action: Callable[[], None]) -> None:
        if candidate.is_dead:
            return
        if self.now_s < candidate.paused_until_s:
            candidate.pending.append(lambda: self._hear(candidate, action))
        else:
            action()

    def _tick(self, candidate: Candidate) -> None:
        def tick() -> None:
            local_s = candidate.local_s(self.now_s)
            self._carry_out(candidate, candidate.elector.tick(local_s))
            wake_s = candidate.true_s(candidate.elector.wake_s(local_s)) - self.now_s
            self._at(max(wake_s, 0.01) + self.random.uniform(0, 0.05), lambda: self._tick(candidate))

        self._hear(candidate, tick)

    def _carry_out(self, candidate: Candidate, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Lead):
                assert self.is_forgetful or not self.reigns or action.term > self.reigns[-1][2], "terms grow"
                self.reigns.append((self.now_s, candidate.name, action.term))
                self.check()
            elif not isinstance(action, StepDown):
                self._ask(candidate, action)

    def _ask(self, candidate: Candidate, question: Action) -> None:
        candidate.open_question += 1
        number = candidate.open_question
        timeout_s = self.timing.call_timeout_s / candidate.rate
        copies = 2 if self.is_faulty and self.random.random() < 0.1 else 1
        for copy in range(copies):
            if not (self.is_faulty and self.random.random() < 0.1):
                self._at(self._delay_s(), lambda copy=copy: self._arrive(candidate, question, number, copy == 0))
        self._at(timeout_s, lambda: self._answer(candidate, number, None, is_failure=True))

    def _arrive(self, candidate: Candidate, question: Action, number: int, is_heard: bool) -> None:
        if self.now_s < self.outage_until_s:
            return
        if isinstance(question, Read):
            found: object = self.store.read()
        else:
            found = self.store.swap(question.record, question.version)  # type: ignore[union-attr]
        if is_heard and not (self.is_faulty and self.random.random() < 0.1):
            heard = lambda: self._answer(candidate, number, found, question=question)  # noqa: E731
            self._at(self._delay_s(), heard)

    def _delay_s(self) -> float:
        """Mostly quick; now and then later than any deadline, when there are faults at all."""
        if self.is_faulty and self.random.random() < 0.05:
            return self.random.uniform(0, 3 * LEASE_S)
        return self.random.uniform(0.001, 0.2)

    def _answer(
        self,
        candidate: Candidate,
        number: int,
        found: object,
        *,
        question: Action | None = None,
        is_failure: bool = False,
    ) -> None:
        def hear() -> None:
            if candidate.open_question != number:
                return
            candidate.open_question += 1
            local_s = candidate.local_s(self.now_s)
            if is_failure:
                actions = candidate.elector.on_failed("no answer", local_s)
            elif isinstance(question, Read):
                actions = candidate.elector.on_read(found, local_s)  # type: ignore[arg-type]
            else:
                actions = candidate.elector.on_swapped(found, local_s)  # type: ignore[arg-type]
            self._carry_out(candidate, actions)
            self._at(0.0, lambda: self._tick(candidate))

        self._hear(candidate, hear)
