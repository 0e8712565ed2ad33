"""Which coordinator is tried next: every address once a round, hints first and once, names anew in each round."""

from __future__ import annotations

import asyncio
import threading

import pytest

from backstayd.addresses import split_addresses
from backstayd.transport.address_book import AddressBook, Resolver, resolve_blocking


def rounds(book: AddressBook) -> list[str]:
    found = []
    while not book.is_round_over:
        found.append(book.next().address)
    return found


def test_a_round_tries_every_address_once_in_order() -> None:
    book = AddressBook("a:1, b:2,c:3,a:1")
    assert book.is_round_over
    book.begin_round({})
    assert rounds(book) == ["a:1", "b:2", "c:3"]


def test_a_hint_is_tried_next_and_not_again_in_its_round() -> None:
    book = AddressBook("a:1,b:2,c:3")
    book.begin_round({})
    book.note(book.next(), "a:1 does not lead", leader="c:3")
    hinted = book.next()
    assert hinted.address == "c:3"
    book.note(hinted, "c:3 does not lead", leader="a:1")
    assert rounds(book) == ["b:2"], "a:1 has answered already: two that name each other are not asked in circles"
    assert book.summary() == "a:1 does not lead; c:3 does not lead"


def test_a_hint_at_an_address_that_was_not_configured_is_followed() -> None:
    book = AddressBook("a:1")
    book.begin_round({})
    book.note(book.next(), "does not lead", leader="[fd00::7]:7070")
    hinted = book.next()
    assert (hinted.address, hinted.host) == ("[fd00::7]:7070", "fd00::7")
    assert book.is_round_over


def test_a_hint_that_is_no_address_is_passed_over() -> None:
    book = AddressBook("a:1")
    book.begin_round({})
    book.note(book.next(), "does not lead", leader="nonsense")
    assert book.is_round_over


def test_a_name_with_several_numbers_is_as_many_places_and_keeps_its_name() -> None:
    book = AddressBook("backstay:7070,10.0.0.9:7070")
    assert book.names() == ("backstay",)
    book.begin_round({"backstay": ("10.0.0.1", "10.0.0.2", "fd00::3")})
    assert book.count == 4
    first = book.next()
    assert (first.address, first.host) == ("10.0.0.1:7070", "backstay")
    assert rounds(book) == ["10.0.0.2:7070", "[fd00::3]:7070", "10.0.0.9:7070"]
    book.begin_round({"backstay": ("10.0.0.5",)})
    assert rounds(book) == ["backstay:7070", "10.0.0.9:7070"], "the machines behind a name change"
    book.begin_round({})
    assert rounds(book) == ["backstay:7070", "10.0.0.9:7070"], "a resolver that fails does not forget the name"


def test_who_was_connected_last_is_tried_last_and_old_answers_are_forgotten() -> None:
    book = AddressBook("a:1,b:2")
    book.begin_round({})
    target = book.next()
    book.note(target, "a:1 does not lead", leader="b:2")
    leader = book.next()
    book.found(leader)
    assert book.is_round_over
    assert book.answers == {}
    book.note(leader, "b:2 does not lead", leader="a:1")
    assert book.next().address == "a:1", "the one that steps down may know its follower"
    book.begin_round({})
    assert rounds(book) == ["a:1", "b:2"]


def test_localhost_resolves_without_a_loop_and_a_name_that_does_not_exist_is_left_out() -> None:
    assert "127.0.0.1" in resolve_blocking(["localhost", "no-such-host.invalid"])["localhost"]
    assert "no-such-host.invalid" not in resolve_blocking(["no-such-host.invalid"])


def test_a_resolver_that_hangs_takes_one_thread_a_name_and_hides_no_other() -> None:
    asked: list[str] = []
    answered = threading.Event()

    def look_up(name: str) -> tuple[str, ...]:
        asked.append(name)
        if name == "slow":
            answered.wait(20)
        if name == "gone":
            raise OSError("no such name")
        return (f"number of {name}",)

    async def scenario() -> None:
        resolver = Resolver(look_up)
        for _ in range(3):
            found = await resolver.resolve(["slow", "quick", "gone"], timeout_s=0.01)
            assert "slow" not in found
            assert "gone" not in found
        assert asked.count("slow") == 1
        answered.set()
        found = await resolver.resolve(["slow", "quick", "gone"], timeout_s=20)
        assert found == {"slow": ("number of slow",), "quick": ("number of quick",)}

    asyncio.run(scenario())


@pytest.mark.parametrize("text", ["", "a", "a:1,", ",a:1", "a:1,b", "a:1 b:2"])
def test_a_list_with_something_that_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        split_addresses(text)
