"""The control plane over real sockets: links, reconnection, refusal, the operator's calls."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import grpc
import pytest

from backstay.errors import ConfigError, SnapshotNotFoundError, UnavailableError
from backstay.ids import Generation
from backstayd.clock import boot_s
from backstayd.core.messages.desired import NodeDesired, RunDesired
from backstayd.core.messages.report import NodeIdentity, NodeReport, RunReport
from backstayd.transport import convert
from backstayd.transport.coordinator_service import CoordinatorServer, _response, _Stream
from backstayd.transport.link import CoordinatorLink, _Words
from backstayd.transport.operator import OperatorClient
from backstayd.v1 import coordinator_pb2, coordinator_pb2_grpc
from tests.kit.wording import refuses

LEASE_S = 0.6


class RecordingBackend:
    """A backend that remembers the reports it saw and answers what it was told to."""

    def __init__(self) -> None:
        self.reports: list[NodeReport] = []
        self.suspects: list[tuple[str, str]] = []
        self.answer = NodeDesired(generation=Generation(1, "c"))

    def observe(self, report: NodeReport) -> None:
        self.reports.append(report)

    def suspect(self, node: str, incarnation: str) -> None:
        self.suspects.append((node, incarnation))

    def desired(self, node: str) -> NodeDesired:
        return self.answer

    def status(self, *, is_brief: bool) -> dict[str, Any]:
        return {"format": 1, "nodes": []}

    def forget(self, run: str) -> None:
        if run != "default/gpt":
            raise SnapshotNotFoundError(f"no node knows the run {run}", reason="unknown_run")


def report_of(name: str = "n1", sequence: int = 1, protocol: int = 1) -> NodeReport:
    node = NodeIdentity(name=name, incarnation="i1", bulk_address="127.0.0.1:1", protocol=protocol)
    return NodeReport(node=node, sequence=sequence)


async def until(condition: Callable[[], object], why: str, deadline_s: float = 10.0) -> None:
    end = asyncio.get_running_loop().time() + deadline_s
    while not condition():
        assert asyncio.get_running_loop().time() < end, f"still not after {deadline_s} s: {why}"
        await asyncio.sleep(0.01)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 30))  # type: ignore[arg-type]


def test_a_report_goes_up_and_desired_state_comes_down() -> None:
    async def scenario() -> None:
        backend, desired = RecordingBackend(), []
        server = CoordinatorServer("127.0.0.1:0", backend, lease_s=LEASE_S)
        link = CoordinatorLink(await server.start(), report=report_of, on_desired=desired.append, lease_s=LEASE_S)
        link.start()
        await until(lambda: desired, "the first answer")
        assert backend.reports[0] == report_of()
        assert link.is_connected
        backend.answer = replace(backend.answer, runs=(RunDesired(run="default/gpt"),))
        server.notify()
        await until(lambda: desired[-1] == backend.answer, "the changed answer")
        await link.close()
        assert not link.is_connected
        await server.close()

    run(scenario)


def test_an_answer_says_what_was_wanted_when_the_report_that_it_answers_was_sent() -> None:
    """Not when it is read: it may have lain in a buffer while this process was frozen."""

    async def scenario() -> None:
        backend, seen = RecordingBackend(), []
        server = CoordinatorServer("127.0.0.1:0", backend, lease_s=60.0)
        link = CoordinatorLink(
            await server.start(), report=report_of, on_desired=lambda _: seen.append(link.answered_s), lease_s=60.0
        )
        begun_s = boot_s()
        link.start()
        await until(lambda: seen, "the first answer")
        answered_s = boot_s()
        assert begun_s <= seen[0] <= answered_s
        backend.answer = replace(backend.answer, runs=(RunDesired(run="default/gpt"),))
        server.notify()  # nothing was reported meanwhile
        await until(lambda: len(seen) > 1, "another answer")
        assert seen[1] == seen[0]
        link.notify()
        await until(lambda: link.answered_s >= answered_s, "a report that is sent from then on is answered")
        await link.close()
        await server.close()

    run(scenario)


def test_a_node_whose_stream_breaks_is_suspected_at_once() -> None:
    async def scenario() -> None:
        backend = RecordingBackend()
        server = CoordinatorServer("127.0.0.1:0", backend, lease_s=LEASE_S)
        link = CoordinatorLink(await server.start(), report=report_of, on_desired=lambda _: None, lease_s=LEASE_S)
        link.start()
        await until(lambda: backend.reports, "the first report")
        assert backend.suspects == []
        await link.close()
        await until(lambda: backend.suspects, "the broken stream to be noticed")
        assert backend.suspects[0] == ("n1", "i1")
        await server.close()

    run(scenario)


def test_a_notified_change_is_reported_without_waiting_for_the_heartbeat() -> None:
    async def scenario() -> None:
        backend = RecordingBackend()
        server = CoordinatorServer("127.0.0.1:0", backend, lease_s=60.0)
        report = report_of()
        link = CoordinatorLink(await server.start(), report=lambda: report, on_desired=lambda _: None, lease_s=60.0)
        link.start()
        await until(lambda: backend.reports, "the first report")
        report = replace(report_of(sequence=2), used_bytes=7)
        link.notify()
        await until(lambda: backend.reports[-1] == report, "the notified report", deadline_s=5.0)
        await link.close()
        await server.close()

    run(scenario)


def test_a_link_reconnects_to_a_restarted_coordinator() -> None:
    async def scenario() -> None:
        states: list[bool] = []
        backend = RecordingBackend()
        server = CoordinatorServer("127.0.0.1:0", backend, lease_s=LEASE_S)
        address = await server.start()
        link = CoordinatorLink(
            address, report=report_of, on_desired=lambda _: None, lease_s=LEASE_S, on_state=states.append
        )
        link.start()
        await until(lambda: states == [True], "connected")
        await server.close()
        await until(lambda: states == [True, False], "noticed the loss")
        again = CoordinatorServer(address, RecordingBackend(), lease_s=LEASE_S)
        await again.start()
        await until(lambda: states == [True, False, True], "connected again")
        await link.close()
        await again.close()

    run(scenario)


def test_a_silent_coordinator_is_lost_after_a_lease() -> None:
    async def scenario() -> None:
        states: list[bool] = []
        is_silent = asyncio.Event()

        class Stopping(coordinator_pb2_grpc.CoordinatorServiceServicer):
            async def Sync(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
                desired = convert.to_message(NodeDesired(generation=Generation(1, "c")), coordinator_pb2.NodeDesired)
                await context.write(coordinator_pb2.SyncResponse(desired=desired))
                is_silent.set()
                await asyncio.Event().wait()

        server = grpc.aio.server()
        coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(Stopping(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        link = CoordinatorLink(
            f"127.0.0.1:{port}", report=report_of, on_desired=lambda _: None, lease_s=LEASE_S, on_state=states.append
        )
        link.start()
        await until(lambda: states[:2] == [True, False], "the silence was noticed")
        assert "silent" in link.last_error
        await link.close()
        await server.stop(grace=None)

    run(scenario)


def test_a_node_of_a_foreign_protocol_is_refused_by_name() -> None:
    async def scenario() -> None:
        backend = RecordingBackend()
        server = CoordinatorServer("127.0.0.1:0", backend, lease_s=LEASE_S)
        link = CoordinatorLink(
            await server.start(), report=lambda: report_of(protocol=7), on_desired=lambda _: None, lease_s=LEASE_S
        )
        link.start()
        await until(lambda: "node n1" in link.last_error, "the refusal")
        assert "protocol 7" in link.last_error
        assert not backend.reports
        assert not link.is_connected
        await link.close()
        await server.close()

    run(scenario)


def test_a_mistake_in_answering_cuts_the_stream_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        backend = RecordingBackend()
        answers: list[NodeDesired] = []
        server = CoordinatorServer("127.0.0.1:0", backend, lease_s=LEASE_S)
        link = CoordinatorLink(await server.start(), report=report_of, on_desired=answers.append, lease_s=LEASE_S)
        link.start()
        await until(lambda: answers, "the first answer")
        backend.answer = replace(backend.answer, generation=Generation(1 << 70, "c"))  # no wire carries that
        server.notify()
        await until(lambda: backend.suspects, "the stream is cut at once, not after a lease")
        backend.answer = NodeDesired(generation=Generation(2, "c"))
        await until(lambda: answers[-1] == backend.answer, "the node connects anew")
        assert "a mistake in serving a node's stream" in caplog.text
        caplog.clear()
        await link.close()
        await server.close()
        assert not caplog.records, "an ordinary end is no mistake"

    run(scenario)


def test_an_operator_reads_the_status_and_forgets_a_run() -> None:
    async def scenario() -> None:
        server = CoordinatorServer("127.0.0.1:0", RecordingBackend(), lease_s=LEASE_S)
        address = await server.start()

        def operate() -> None:
            with OperatorClient(address) as client:
                assert client.get_status() == json.loads('{"format": 1, "nodes": []}')
                client.forget("default/gpt")
                with refuses(SnapshotNotFoundError, "unknown_run") as caught:
                    client.forget("default/other")
                assert caught.value.reason == "unknown_run"

        await asyncio.to_thread(operate)
        await server.close()

    run(scenario)


def test_without_a_coordinator_the_operator_is_told_where_nobody_answers() -> None:
    with (
        OperatorClient("127.0.0.1:1", timeout_s=0.5) as client,
        pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1"),
    ):
        client.get_status()


def test_an_address_in_use_is_an_operators_error() -> None:
    async def scenario() -> None:
        first = CoordinatorServer("127.0.0.1:0", RecordingBackend(), lease_s=LEASE_S)
        address = await first.start()
        second = CoordinatorServer(address, RecordingBackend(), lease_s=LEASE_S)
        with refuses(ConfigError, "cannot_listen"):
            await second.start()
        await second.close()
        await first.close()

    run(scenario)


def test_a_stream_that_is_refused_again_and_again_is_one_line_a_minute_without_a_trace(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        server = CoordinatorServer("127.0.0.1:0", RecordingBackend(), lease_s=LEASE_S)
        address = await server.start()
        async with grpc.aio.insecure_channel(address) as channel:
            for _ in range(10):
                change_of_nothing = coordinator_pb2.SyncRequest(delta=coordinator_pb2.Delta(changed=[1]))
                call = coordinator_pb2_grpc.CoordinatorServiceStub(channel).Sync(iter([change_of_nothing]))
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call.read()
                assert caught.value.code() is grpc.StatusCode.DATA_LOSS
        await server.close()

    run(scenario)
    assert len([line for line in caplog.messages if "a node's stream" in line]) == 1, caplog.messages
    assert "Traceback" not in caplog.text
    assert "Unexpected" not in caplog.text


def test_a_report_too_large_loses_its_largest_run_by_name_and_not_the_node(caplog: pytest.LogCaptureFixture) -> None:
    sound, huge = RunReport(run="job/sound", owner="1"), RunReport(run="job/huge", owner="1" * 5000)
    words, stream = _Words(), CoordinatorServer("127.0.0.1:0", RecordingBackend(), lease_s=LEASE_S)
    words.read(_response(NodeDesired(generation=Generation(1, "c")), None))
    last: NodeReport | None = None
    for sequence, runs in enumerate(
        [(sound, huge), (sound, huge), (sound,), (huge, replace(sound, rebuilt_bytes=1))], 1
    ):
        request = words.write(replace(report_of(sequence=sequence), runs=runs), limit_bytes=4000)
        assert request.ByteSize() < 4000
        last = stream._read(request, last, _Stream(), None)
        assert [run.run for run in last.runs] == ["job/sound"]
    assert last is not None
    assert last.runs[0].rebuilt_bytes == 1
    assert sum("job/huge" in line for line in caplog.messages) == 1
