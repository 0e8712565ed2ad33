"""What is left out of a message on a stream is put back exactly at the other end."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backstay.errors import IntegrityError
from backstay.ids import Generation
from backstayd.core.messages.desired import NodeDesired, Peer
from backstayd.core.messages.plans import ShardRecord
from backstayd.core.messages.report import NodeIdentity, NodeReport, RunReport
from backstayd.transport import convert, delta
from backstayd.v1 import coordinator_pb2
from tests.unit.test_convert import values_of

NODE = NodeIdentity(name="n1", incarnation="i1", bulk_address="127.0.0.1:1")
SHARD = ShardRecord(attempt=1, step=3, rank=0, world_size=1, size_bytes=10, digest="ab")


def carry_report(record: NodeReport, last: NodeReport) -> NodeReport:
    """Over the wire as a change of ``last``."""
    request = coordinator_pb2.SyncRequest()
    request.delta.CopyFrom(delta.write(record, last, request.report))
    again = coordinator_pb2.SyncRequest.FromString(request.SerializeToString())
    return delta.read(again.report, again.delta, last)


def carry_desired(record: NodeDesired, last: NodeDesired) -> NodeDesired:
    response = coordinator_pb2.SyncResponse()
    response.delta.CopyFrom(delta.write(record, last, response.desired))
    again = coordinator_pb2.SyncResponse.FromString(response.SerializeToString())
    return delta.read(again.desired, again.delta, last)


@settings(max_examples=40, deadline=None)
@given(values_of(NodeReport), values_of(NodeReport), st.booleans())
def test_a_changed_report_arrives_whole(first: NodeReport, second: NodeReport, shares: bool) -> None:
    unique = {run.run: run for run in first.runs}
    first = replace(first, runs=tuple(unique.values()))
    kept = first.runs if shares else ()
    second = replace(second, runs=tuple({run.run: run for run in (*second.runs, *kept)}.values()))
    assert carry_report(second, first) == second
    assert carry_report(first, second) == first, "what was there is absent again"


@settings(max_examples=40, deadline=None)
@given(values_of(NodeDesired), values_of(NodeDesired))
def test_changed_desired_state_arrives_whole(first: NodeDesired, second: NodeDesired) -> None:
    first = replace(first, runs=tuple({run.run: run for run in first.runs}.values()))
    second = replace(second, runs=tuple({run.run: run for run in second.runs}.values()))
    assert carry_desired(second, first) == second


def test_only_what_changed_of_a_run_is_sent() -> None:
    run = RunReport(run="default/gpt", shards=(SHARD,), failed_plans=("p" * 1000,))
    last = NodeReport(node=NODE, sequence=1, runs=(run,))
    report = replace(last, sequence=2, runs=(replace(run, shards=(SHARD, replace(SHARD, step=4))),))
    request = coordinator_pb2.SyncRequest()
    request.delta.CopyFrom(delta.write(report, last, request.report))
    assert len(request.SerializeToString()) < 150
    assert not request.report.runs[0].failed_plans
    assert carry_report(report, last) == report


def test_nothing_new_is_a_bare_heartbeat_and_the_same_record() -> None:
    last = NodeReport(node=NODE, sequence=1, runs=(RunReport(run="default/gpt", shards=(SHARD,)),))
    request = coordinator_pb2.SyncRequest(takes_deltas=True)
    request.delta.CopyFrom(delta.write(last, last, request.report))
    assert len(request.SerializeToString()) < 8
    assert delta.read(request.report, request.delta, last) is last


def test_a_change_of_nothing_is_refused() -> None:
    with pytest.raises(IntegrityError, match="a change of nothing"):
        delta.read(coordinator_pb2.NodeReport(), coordinator_pb2.Delta(), None)


def test_a_change_that_lacks_a_run_is_refused() -> None:
    last = NodeReport(node=NODE, sequence=1)
    change = coordinator_pb2.Delta(changed=[coordinator_pb2.NodeReport.RUNS_FIELD_NUMBER])
    change.runs.add(changed=[1])
    with pytest.raises(IntegrityError, match="names 0 runs and describes 1"):
        delta.read(coordinator_pb2.NodeReport(), change, last)


def test_fields_of_a_later_version_are_skipped() -> None:
    last = NodeDesired(generation=Generation(1, "c"), peers=(Peer(name="n1", bulk_address="a:1"),))
    change = coordinator_pb2.Delta(changed=[9999])
    assert delta.read(coordinator_pb2.NodeDesired(), change, last) == last


def test_what_many_messages_carry_becomes_one_record() -> None:
    message = coordinator_pb2.RunReport(run="a/b")
    message.plans.add(plan_id="p", run="a/b", snapshot_id="s", attempt=1, step=1, world_size=2, m=1, chunk_bytes=1)
    again = coordinator_pb2.RunReport.FromString(message.SerializeToString())
    first, second = convert.from_message(RunReport, message), convert.from_message(RunReport, again)
    assert first.plans[0] is second.plans[0]
    words = [convert.to_message(report, coordinator_pb2.RunReport).SerializeToString() for report in (first, second)]
    assert words[0] == words[1] == message.SerializeToString()
