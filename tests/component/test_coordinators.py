"""Several coordinators of which one leads, over real sockets: links and operators find it and follow it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import closing
from typing import Any

import pytest

from backstay.errors import SnapshotNotFoundError, UnavailableError
from backstay.ids import Generation
from backstayd.core.messages.desired import NodeDesired
from backstayd.core.messages.report import NodeIdentity, NodeReport
from backstayd.transport.coordinator_service import CoordinatorServer
from backstayd.transport.errors import NotLeaderError
from backstayd.transport.link import CoordinatorLink
from backstayd.transport.operator import OperatorClient

LEASE_S = 0.6


class Backend:
    """Leads or does not, and then says who does."""

    def __init__(self, name: str, *, is_leading: bool) -> None:
        self.name, self.is_leading, self.leader = name, is_leading, ""
        self.reports: list[NodeReport] = []
        self.asked_count = 0

    def check(self) -> None:
        self.asked_count += 1
        if not self.is_leading:
            raise NotLeaderError(f"{self.name} does not lead; {self.leader or 'nobody'} does", leader=self.leader)

    def observe(self, report: NodeReport) -> None:
        self.check()
        self.reports.append(report)

    def suspect(self, node: str, incarnation: str) -> None:
        pass

    def desired(self, node: str) -> NodeDesired:
        self.check()
        return NodeDesired(generation=Generation(1, self.name))

    def status(self, *, is_brief: bool) -> dict[str, Any]:
        self.check()
        return {"format": 1, "name": self.name}

    def forget(self, run: str) -> None:
        self.check()
        raise SnapshotNotFoundError(f"no node knows {run}", reason="unknown_run")


class Pair:
    """Two servers; the first leads."""

    def __init__(self) -> None:
        self.backends = [Backend("one", is_leading=True), Backend("two", is_leading=False)]
        self.servers = [CoordinatorServer("127.0.0.1:0", backend, lease_s=LEASE_S) for backend in self.backends]
        self.addresses: list[str] = []

    async def start(self) -> None:
        self.addresses = [await server.start() for server in self.servers]
        self.backends[1].leader = self.addresses[0]

    def change(self) -> None:
        """The second leads from now on; the first says so to those it serves."""
        first, second = self.backends
        second.is_leading, first.is_leading, first.leader = True, False, self.addresses[1]
        self.servers[0].notify()

    async def close(self) -> None:
        for server in self.servers:
            await server.close()


def report() -> NodeReport:
    return NodeReport(node=NodeIdentity(name="n1", incarnation="i1", bulk_address="127.0.0.1:1"), sequence=1)


async def until(condition: Callable[[], object], why: str, deadline_s: float = 10.0) -> None:
    end = asyncio.get_running_loop().time() + deadline_s
    while not condition():
        assert asyncio.get_running_loop().time() < end, f"still not after {deadline_s} s: {why}"
        await asyncio.sleep(0.01)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 30))  # type: ignore[arg-type]


def silent_address(sock: socket.socket) -> str:
    """Accepts connections in the kernel and never says a word, as a frozen coordinator does."""
    sock.bind(("127.0.0.1", 0))
    sock.listen(16)
    return f"127.0.0.1:{sock.getsockname()[1]}"


def test_a_link_follows_the_leader_and_its_successor() -> None:
    async def scenario() -> None:
        pair, seen = Pair(), list[NodeDesired]()
        await pair.start()
        link = CoordinatorLink(
            f"{pair.addresses[1]},{pair.addresses[0]}", report=report, on_desired=seen.append, lease_s=LEASE_S
        )
        link.start()
        await until(lambda: link.is_connected, "the leader to be found behind the standby")
        assert link.address == pair.addresses[0]
        pair.change()
        await until(lambda: seen[-1].generation.incarnation == "two", "the successor to be obeyed")
        assert link.address == pair.addresses[1]
        await link.close()
        await pair.close()

    run(scenario)


def test_a_link_follows_a_hint_to_an_address_that_it_was_not_given() -> None:
    async def scenario() -> None:
        pair = Pair()
        await pair.start()
        link = CoordinatorLink(pair.addresses[1], report=report, on_desired=lambda _: None, lease_s=LEASE_S)
        link.start()
        await until(lambda: link.is_connected, "the leader to be found by the standby's word")
        assert link.address == pair.addresses[0]
        await link.close()
        await pair.close()

    run(scenario)


def test_a_link_without_a_leader_says_what_each_address_answered() -> None:
    async def scenario() -> None:
        pair = Pair()
        await pair.start()
        pair.backends[0].is_leading, pair.backends[1].leader = False, ""
        link = CoordinatorLink(
            ",".join([*pair.addresses, "127.0.0.1:1"]), report=report, on_desired=lambda _: None, lease_s=LEASE_S
        )
        link.start()
        wanted = ("one does not lead", "two does not lead", "127.0.0.1:1")
        await until(lambda: all(words in link.last_error for words in wanted), f"all of {wanted} in the error")
        assert not link.is_connected
        pair.backends[1].is_leading = True
        await until(lambda: link.is_connected, "the one that leads at last")
        assert link.last_error == ""
        await link.close()
        await pair.close()

    run(scenario)


def test_a_line_that_ended_by_itself_is_no_life() -> None:
    async def scenario() -> None:
        link = CoordinatorLink("127.0.0.1:1", report=report, on_desired=lambda desired: None, lease_s=LEASE_S)
        link.start()
        await until(lambda: link.last_error, "it has tried")
        assert link.failure() == ""
        (task,) = [task for task in asyncio.all_tasks() if task.get_name() == "coordinator-link"]

        def is_over() -> bool:
            task.cancel()
            return task.done()

        await until(is_over, "nothing runs any more")
        assert link.failure() == "it ended by itself"
        await link.close()
        assert link.failure() == ""

    run(scenario)


def test_a_coordinator_that_never_answers_does_not_hide_the_one_that_leads() -> None:
    async def scenario() -> None:
        pair = Pair()
        await pair.start()
        with closing(socket.socket()) as frozen:
            addresses = f"{silent_address(frozen)},{pair.addresses[1]},{pair.addresses[0]}"
            link = CoordinatorLink(addresses, report=report, on_desired=lambda _: None, lease_s=LEASE_S)
            link.start()
            await until(lambda: link.is_connected, "the leader behind a silent address")
            await link.close()

            def operate() -> None:
                with OperatorClient(addresses, timeout_s=3.0) as client:
                    assert client.get_status()["name"] == "one"

            await asyncio.to_thread(operate)
        await pair.close()

    run(scenario)


def test_an_operator_follows_the_leader_and_gets_its_answers_and_its_refusals() -> None:
    async def scenario() -> None:
        pair = Pair()
        await pair.start()

        def operate() -> None:
            with OperatorClient(f"127.0.0.1:1,{pair.addresses[1]}") as client:
                assert client.get_status()["name"] == "one", "named by the standby"
                with pytest.raises(SnapshotNotFoundError, match="no node knows default/r"):
                    client.forget("default/r")
                pair.change()
                assert client.get_status()["name"] == "two"

        await asyncio.to_thread(operate)
        await pair.close()

    run(scenario)


def test_an_operator_waits_out_an_election_and_is_told_when_it_takes_too_long() -> None:
    async def scenario() -> None:
        pair = Pair()
        await pair.start()
        pair.backends[0].is_leading, pair.backends[1].leader = False, ""

        def operate() -> None:
            with OperatorClient(",".join(pair.addresses), timeout_s=0.5) as client:
                with pytest.raises(UnavailableError, match=r"one does not lead.*two does not lead") as caught:
                    client.get_status()
                assert caught.value.reason == "not_leader"

        await asyncio.to_thread(operate)
        client = OperatorClient(",".join(pair.addresses), timeout_s=10.0)
        before = pair.backends[1].asked_count
        asked = asyncio.create_task(asyncio.to_thread(client.get_status))
        await until(lambda: pair.backends[1].asked_count > before, "the operator to be turned away")
        pair.backends[1].is_leading = True
        assert (await asked)["name"] == "two"
        client.close()
        await pair.close()

    run(scenario)
