"""Two coordinator processes in one loop, agreeing through a Lease: one leads, the other says who does, and takes over."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backstay.errors import ConfigError, UnavailableError
from backstay.ids import Generation
from backstayd.clock import Clock, boot_s
from backstayd.config.schema import CoordinatorConfig
from backstayd.coordinator.app import CoordinatorProcess
from backstayd.core.messages.desired import NodeDesired
from backstayd.core.messages.report import NodeIdentity, NodeReport
from backstayd.core.recover.numbering import LEAP_GENERATIONS, TERM_GENERATIONS
from backstayd.transport.link import CoordinatorLink
from backstayd.transport.operator import OperatorClient
from tests.kit.kubernetes_api import KubernetesApi

LEASE_S = 0.6


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    with KubernetesApi() as running:
        path = tmp_path / "kubeconfig"
        path.write_text(running.kubeconfig())
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
        yield running


def config(**settings: Any) -> CoordinatorConfig:
    return CoordinatorConfig(
        listen="127.0.0.1:0",
        http="127.0.0.1:0",
        insecure=True,
        lease_s=LEASE_S,
        election="kubernetes://backstay/coordinator",
        election_lease_s=1.0,
        **settings,
    )


def report() -> NodeReport:
    return NodeReport(node=NodeIdentity(name="n1", incarnation="i1", bulk_address="127.0.0.1:1"), sequence=1)


async def until(condition: Callable[[], object], why: str, deadline_s: float = 20.0) -> None:
    end = asyncio.get_running_loop().time() + deadline_s
    while not condition():
        assert asyncio.get_running_loop().time() < end, f"still not after {deadline_s} s: {why}"
        await asyncio.sleep(0.01)


def read(process: CoordinatorProcess, path: str) -> str:
    with urllib.request.urlopen(f"http://{process.http_address}{path}", timeout=5) as answer:
        return str(answer.read().decode())


def leads(process: CoordinatorProcess) -> bool:
    try:
        return process.core is not None
    except UnavailableError:
        return False


def test_a_standby_says_who_leads_and_takes_over_with_higher_generations(
    server: KubernetesApi, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def scenario() -> None:
        async with contextlib.AsyncExitStack() as stack:  # a gRPC server that outlives its loop ends the process
            first, second = CoordinatorProcess(config()), CoordinatorProcess(config())
            await first.start()
            stack.push_async_callback(first.close)
            await until(lambda: leads(first), "the first to lead")
            await second.start()
            stack.push_async_callback(second.close)
            obeyed: list[NodeDesired] = []
            link = CoordinatorLink(second.address, report=report, on_desired=obeyed.append, lease_s=LEASE_S)
            link.start()
            stack.push_async_callback(link.close)
            await until(
                lambda: obeyed and obeyed[-1].generation.number, "the node to find the leader by the standby's word"
            )
            assert obeyed[-1].generation == Generation(TERM_GENERATIONS + 1, first.core.incarnation)
            await asyncio.to_thread(look_at_both, first, second)
            assert caplog.messages.count(f"standing by: the coordinator at {first.address} leads") == 1
            await first.close()
            await until(lambda: leads(second), "the second to take over")
            await until(lambda: obeyed[-1].generation.number > 2 * TERM_GENERATIONS, "the node to obey the second")
            assert obeyed[-1].generation.incarnation == second.core.incarnation

    asyncio.run(asyncio.wait_for(scenario(), 60))


def look_at_both(first: CoordinatorProcess, second: CoordinatorProcess) -> None:
    leader = json.loads(read(first, "/status.json"))["leader"]
    assert (leader["address"], leader["is_leader"], leader["term"]) == (first.address, True, 1)
    assert leader["election"] == "kubernetes://backstay/coordinator"
    standby = json.loads(read(second, "/status.json"))
    assert (standby["leader"]["address"], standby["leader"]["is_leader"]) == (first.address, False)
    assert standby["nodes"] == standby["runs"] == []
    assert "backstay_coordinator_is_leader 1.0" in read(first, "/metrics")
    told = read(second, "/metrics")
    assert "backstay_coordinator_is_leader 0.0" in told
    assert "backstay_coordinator_lease_margin_seconds 0.0" in told
    assert read(second, "/readyz") == f"ready: stands by at {second.address}; {first.address} leads\n"
    with OperatorClient(second.address) as client:
        assert client.get_status()["leader"]["address"] == first.address


def test_a_leader_whose_lease_ran_out_while_it_slept_answers_nothing_before_it_looks(server: KubernetesApi) -> None:
    async def scenario() -> None:
        slept_s = 0.0
        process = CoordinatorProcess(config(), clock=Clock(boot_s=lambda: boot_s() + slept_s))
        await process.start()
        try:
            await until(lambda: leads(process), "it to lead")
            assert process.desired("n1") is not None
            slept_s = 60.0  # nothing else ran in between: no tick, no timer, no answer of the store
            for ask in (
                lambda: process.desired("n1"),
                lambda: process.observe(report()),
                process.status,
                lambda: process.forget("default/r"),
                lambda: process.distrust("default/r", 1, "late"),
                lambda: process.trust("default/r"),
                lambda: process.locate("default/r", 0),
                lambda: process.drain("n1", undo=False),
            ):
                with pytest.raises(UnavailableError, match="does not lead") as caught:
                    ask()
                assert caught.value.reason == "not_leader"
            await until(lambda: leads(process), "it to take its own lease anew, as another term")
            assert process.status()["leader"]["term"] == 2
        finally:
            await process.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_terms_leave_room_for_the_leap_after_a_total_loss() -> None:
    assert TERM_GENERATIONS > 100 * LEAP_GENERATIONS
    assert (2**31) * TERM_GENERATIONS < 2**63, "leaseTransitions is 32 bits, a generation on the wire 64"


def test_a_wildcard_cannot_be_what_others_are_told(server: KubernetesApi) -> None:
    async def scenario() -> None:
        settings = {"listen": "0.0.0.0:0", "http": "127.0.0.1:0", "insecure": True}
        process = CoordinatorProcess(CoordinatorConfig(**settings, election="kubernetes://backstay/lead"))
        with pytest.raises(ConfigError, match="give --advertise HOST:PORT"):
            await process.start()

    asyncio.run(scenario())


def test_missing_rights_end_the_start_with_what_to_grant(server: KubernetesApi) -> None:
    async def scenario() -> None:
        server.is_forbidden = True
        with pytest.raises(ConfigError, match="get, create and update on leases"):
            await CoordinatorProcess(config()).start()

    asyncio.run(scenario())


def test_a_store_that_is_away_at_the_start_is_waited_for_as_a_standby(server: KubernetesApi) -> None:
    async def scenario() -> None:
        server.is_failing = True
        process = CoordinatorProcess(config())
        await process.start()
        try:
            assert not leads(process)
            server.is_failing = False
            await until(lambda: leads(process), "it to lead once the store answers")
        finally:
            await process.close()

    asyncio.run(scenario())
