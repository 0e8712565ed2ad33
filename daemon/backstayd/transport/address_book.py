"""Where a coordinator may be: the addresses that were configured, what their names resolve to, and who leads.

Says which one to try next and what each answered; connects to nothing itself. Names are looked up anew in each round,
because a name may stand for other machines by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final

from backstayd.addresses import join_address, split_address, split_addresses

MAX_ADDRESSES_PER_NAME: Final = 16  # of one DNS name; more coordinators than that is a mistake somewhere

Resolved = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One place to try. ``host`` is the name as it was configured, also where ``address`` is one of its numbers."""

    address: str
    host: str


class AddressBook:
    """Goes round the addresses; a hint at the leader is tried first, once.

    Invariant: a round tries each address at most once besides hints, and what is remembered of answers is of addresses
    of the last round and hints of it.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.configured = split_addresses(text)
        self.answers: dict[str, str] = {}
        self._targets = _targets(self.configured, {})
        self._untried: list[Target] = []
        self._hint: Target | None = None
        self._last = ""

    @property
    def is_round_over(self) -> bool:
        """Whether every address was tried: the moment to wait, and to look names up again."""
        return not self._untried and self._hint is None

    @property
    def count(self) -> int:
        """How many places there are to try."""
        return len(self._targets)

    @property
    def untried_count(self) -> int:
        """How many are left in this round."""
        return len(self._untried) + (self._hint is not None)

    def names(self) -> tuple[str, ...]:
        """The hosts that are names and not numbers."""
        return tuple(dict.fromkeys(host for host, _ in map(split_address, self.configured) if not _is_number(host)))

    def begin_round(self, resolved: Resolved) -> None:
        """Start over with what the names stand for now; whom we were connected to last is tried after all others.

        A name that did not resolve is tried as it is written.
        """
        self._targets = _targets(self.configured, resolved)
        self._untried = sorted(self._targets, key=lambda target: target.address == self._last)
        self._hint = None
        self.answers = {}

    def next(self) -> Target:
        """Whom to try now. Must not be called when the round is over."""
        if self._hint is not None:
            target, self._hint = self._hint, None
            self._untried = [other for other in self._untried if other.address != target.address]
            return target
        return self._untried.pop(0)

    def prefer(self, target: Target) -> None:
        """Try ``target`` first in this round."""
        self._hint = target

    def found(self, target: Target) -> None:
        """``target`` leads: the round is over."""
        self._last = target.address
        self._untried, self._hint, self.answers = [], None, {}

    def note(self, target: Target, answer: str, *, leader: str = "") -> None:
        """What ``target`` answered, for people; ``leader`` is whom it named. Each hint is followed once a round."""
        self.answers[target.address] = answer
        if leader and leader != target.address and leader not in self.answers:
            with contextlib.suppress(ValueError):
                known = next((other for other in self._targets if other.address == leader), None)
                self._hint = known or Target(address=leader, host=split_address(leader)[0])

    def summary(self) -> str:
        """What each answered in this round, in one line."""
        return "; ".join(self.answers.values())


class Resolver:
    """Looks names up for a loop, in threads of its own: a resolver that hangs keeps nothing else waiting.

    Invariant: at most one thread a name.
    """

    def __init__(self, look_up: Callable[[str], tuple[str, ...]] | None = None) -> None:
        self._look_up = look_up or _look_up
        self._open: dict[str, Future[tuple[str, ...]]] = {}

    async def resolve(self, names: Iterable[str], *, timeout_s: float) -> dict[str, tuple[str, ...]]:
        """The numbers behind each name; one that cannot be resolved in time is left out, and asked for on."""
        asked = {name: asyncio.wrap_future(self._ask(name)) for name in names}
        if asked:
            await asyncio.wait(asked.values(), timeout=timeout_s)
        return {name: answer.result() for name, answer in asked.items() if answer.done() and answer.result()}

    def _ask(self, name: str) -> Future[tuple[str, ...]]:
        future = self._open.get(name)
        if future is None or future.done():
            future = self._open[name] = Future()
            future.set_running_or_notify_cancel()  # from now on nobody who stops waiting can cancel it
            threading.Thread(target=self._answer, args=(name, future), name="resolver", daemon=True).start()
        return future

    def _answer(self, name: str, future: Future[tuple[str, ...]]) -> None:
        found: tuple[str, ...] = ()
        try:
            with contextlib.suppress(OSError, UnicodeError):
                found = self._look_up(name)
        finally:
            future.set_result(found)


def resolve_blocking(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The same for callers without a loop; the resolver's own timeouts apply."""
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        with contextlib.suppress(OSError, UnicodeError):
            found[name] = _look_up(name)
    return found


def _look_up(name: str) -> tuple[str, ...]:
    answers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(str(answer[4][0]) for answer in answers))[:MAX_ADDRESSES_PER_NAME]


def _targets(configured: Iterable[str], resolved: Resolved) -> tuple[Target, ...]:
    targets: dict[str, Target] = {}
    for address in configured:
        host, port = split_address(address)
        numbers = resolved.get(host, ())
        # A name with one number stays a name: what is said to people is what they wrote.
        places = [join_address(number, port) for number in numbers] if len(numbers) > 1 else [address]
        for place in places:
            targets.setdefault(place, Target(address=place, host=host))
    return tuple(targets.values())


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
