"""Who gets a place on a port that strangers reach, and who gives one up."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from backstayd.security.connection_limits import Places

LIMIT = 6


@contextmanager
def connections(count: int) -> Iterator[list[socket.socket]]:
    pairs = [socket.socketpair() for _ in range(count)]
    try:
        yield [ours for ours, _ in pairs]
    finally:
        for pair in pairs:
            for one in pair:
                one.close()


def is_cut(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False


def test_the_source_that_holds_most_gives_way_and_busy_ones_never() -> None:
    places = Places(3)
    with connections(6) as (greedy_1, greedy_2, other, new, last, refused):
        for sock, source in ((greedy_1, "greedy"), (greedy_2, "greedy"), (other, "other")):
            assert places.take(sock, source)
        places.set_busy(greedy_1, is_busy=True)
        assert places.take(new, "new")
        assert (is_cut(greedy_1), is_cut(greedy_2), is_cut(other)) == (False, True, False)
        for sock in (other, new):
            places.set_busy(sock, is_busy=True)
        assert not places.take(last, "last"), "all are in the middle of an exchange"
        places.set_busy(other, is_busy=False)
        assert places.take(refused, "last")
        assert is_cut(other)
        for sock in (greedy_1, new, refused):
            places.leave(sock)


def test_one_source_has_at_most_its_share() -> None:
    places = Places(LIMIT, per_source=2)
    with connections(3) as (first, second, third):
        assert places.take(first, "a")
        assert places.take(second, "a")
        assert not places.take(third, "a")
        places.leave(first)
        assert places.take(third, "a")
        places.cut_idle(0.0)
        assert is_cut(second)
        assert is_cut(third)


def test_a_process_that_can_open_no_more_files_refuses_a_place_and_serves_on() -> None:
    places = Places(LIMIT)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with connections(1) as (sock,), contextlib.ExitStack() as filled:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    filled.enter_context(open(os.devnull))
            assert not places.take(sock, "a")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        filled.close()
        assert places.take(sock, "a")
        places.leave(sock)


@pytest.mark.parametrize("seed", range(20))
def test_a_newcomer_gets_a_place_whatever_happened_before_as_long_as_one_is_idle(seed: int) -> None:
    draw, places, held = random.Random(seed), Places(LIMIT), {}  # type: ignore[var-annotated]
    with connections(200) as socks:
        for index, sock in enumerate(socks):
            source = draw.choice("abc") if draw.random() < 0.8 else f"new-{index}"
            busy = {one for one, (_, is_busy) in held.items() if is_busy and not is_cut(one)}
            held = {one: state for one, state in held.items() if not is_cut(one)}
            before = Counter(name for name, _ in held.values())
            got = places.take(sock, source)
            assert got or len(busy) == LIMIT
            cut = [name for one, (name, _) in held.items() if is_cut(one)]
            assert len(cut) == (1 if got and len(held) == LIMIT else 0)
            idle = {name for one, (name, is_busy) in held.items() if not is_busy}
            assert all(before[name] == max(before[other] for other in idle) for name in cut)
            if got:
                held[sock] = (source, draw.random() < 0.3)
                places.set_busy(sock, is_busy=held[sock][1])
            elif draw.random() < 0.9:
                places.leave(one := draw.choice(sorted(held, key=id)))
                del held[one]
        for one in held:
            places.leave(one)
