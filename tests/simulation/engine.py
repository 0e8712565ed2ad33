"""A fake clock and a fake network for simulations: everything that happens is an event in one queue, drawn from one seed."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Network:
    """How control messages fare. Rates are probabilities per message."""

    delay_s: tuple[float, float] = (0.001, 0.01)
    drop_rate: float = 0.0
    duplicate_rate: float = 0.0


@dataclass(slots=True)
class Engine:
    """Runs events in time order; ``after_event`` is called after each."""

    seed: int
    random: random.Random = field(init=False)
    now_s: float = 1000.0
    event_count: int = 0
    after_event: Callable[[], None] | None = None
    _queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = field(default_factory=list)
    _count: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def after(self, delay_s: float, action: Callable[..., None], *arguments: Any) -> None:
        self._count += 1
        heapq.heappush(self._queue, (self.now_s + delay_s, self._count, action, arguments))

    def between(self, low: float, high: float) -> float:
        return self.random.uniform(low, high)

    def run_until(self, condition: Callable[[], bool], *, limit_s: float) -> bool:
        """Run until the condition holds or simulated time has passed by ``limit_s``; says whether it holds."""
        end_s = self.now_s + limit_s
        while not condition():
            if not self._queue or self._queue[0][0] > end_s:
                self.now_s = end_s
                return condition()
            self.step()
        return True

    def run_for(self, duration_s: float) -> None:
        self.run_until(lambda: False, limit_s=duration_s)

    def step(self) -> None:
        self.now_s, _, action, arguments = heapq.heappop(self._queue)
        self.event_count += 1
        action(*arguments)
        if self.after_event is not None:
            self.after_event()
