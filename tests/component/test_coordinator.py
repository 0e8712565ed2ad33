"""The coordinator process in a loop with real gRPC links: from a waiting world to a protected snapshot and on."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Awaitable, Callable
from typing import Any

from backstay.ids import Generation
from backstayd.config.schema import CoordinatorConfig
from backstayd.coordinator.app import CoordinatorProcess
from backstayd.core.messages.decisions import DecisionPhase, Outcome, Staging, StagingState
from backstayd.core.messages.desired import NodeDesired
from backstayd.core.messages.plans import ShardRecord
from backstayd.core.messages.report import NodeIdentity, NodeReport, RunReport, SessionPhase, SessionRecord
from backstayd.transport.link import CoordinatorLink
from backstayd.transport.operator import OperatorClient

LEASE_S = 0.6


class PlainNode:
    """A node without bytes: follows decisions, has one rank."""

    def __init__(self, name: str, address: str, rank: int) -> None:
        self.name, self.rank = name, rank
        self.generation = Generation()
        self.phase = SessionPhase.RESTORING
        self.run = RunReport(run="default/gpt")
        self.seen: list[NodeDesired] = []
        self.sequence = 0
        self.link = CoordinatorLink(address, report=self.report, on_desired=self.obey, lease_s=LEASE_S)

    def report(self) -> NodeReport:
        self.sequence += 1
        session = SessionRecord(world_id="w", rank=self.rank, world_size=2, phase=self.phase)
        node = NodeIdentity(name=self.name, incarnation=f"i-{self.name}", bulk_address=f"{self.name}:1")
        run = RunReport(
            run=self.run.run,
            sessions=(session,),
            shards=self.run.shards,
            decision=self.run.decision,
            staging=self.run.staging,
        )
        return NodeReport(node=node, sequence=self.sequence, generation=self.generation, runs=(run,))

    def obey(self, desired: NodeDesired) -> None:
        if not (self.generation.admits(desired.generation)):
            return
        self.generation = desired.generation
        self.seen.append(desired)
        for run in desired.runs:
            if run.decision is None:
                continue
            states = {DecisionPhase.PREPARE: StagingState.READY, DecisionPhase.RECORD: StagingState.RECORDED}
            decision = self.run.decision
            if run.decision_phase is DecisionPhase.RECORD:
                decision = run.decision
            if run.decision_phase in states:
                staging = Staging(decision_id=run.decision.decision_id, state=states[run.decision_phase])
                self.run = RunReport(run=run.run, shards=self.run.shards, decision=decision, staging=staging)
            elif run.decision_phase is DecisionPhase.RELEASE:
                self.phase = SessionPhase.TRAINING
        self.link.notify()

    def commit(self, step: int) -> None:
        assert self.run.decision is not None
        shard = ShardRecord(
            attempt=self.run.decision.attempt,
            step=step,
            rank=self.rank,
            world_size=2,
            size_bytes=1_000_000,
            digest=f"{self.rank:064x}",
            world_id="w",
        )
        self.run = RunReport(run=self.run.run, shards=(shard,), decision=self.run.decision, staging=self.run.staging)
        self.link.notify()


async def until(condition: Callable[[], object], why: str, deadline_s: float = 15.0) -> None:
    end = asyncio.get_running_loop().time() + deadline_s
    while not condition():
        assert asyncio.get_running_loop().time() < end, f"still not after {deadline_s} s: {why}"
        await asyncio.sleep(0.01)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 60))  # type: ignore[arg-type]


def last_run(node: PlainNode) -> Any:
    return node.seen[-1].runs[0]


def test_a_world_of_two_nodes_is_decided_released_and_given_plans() -> None:
    async def scenario() -> None:
        config = CoordinatorConfig(insecure=True, listen="127.0.0.1:0", http="127.0.0.1:0", lease_s=LEASE_S)
        process = CoordinatorProcess(config)
        await process.start()
        nodes = [PlainNode(f"n{rank}", process.address, rank) for rank in range(2)]
        for node in nodes:
            node.link.start()
        await until(lambda: all(node.phase is SessionPhase.TRAINING for node in nodes), "the world was released")
        decisions = {last_run(node).decision.decision_id for node in nodes}
        assert len(decisions) == 1
        assert last_run(nodes[0]).decision.outcome is Outcome.NONE
        for node in nodes:
            node.commit(step=1)
        await until(lambda: all(last_run(node).plans for node in nodes), "both nodes were given a plan")
        assert last_run(nodes[0]).plans == last_run(nodes[1]).plans
        assert [m.node for m in last_run(nodes[0]).plans[0].members] == ["n0", "n1"]

        def watch() -> None:
            with OperatorClient(process.address) as client:
                told = client.get_status()
            with urllib.request.urlopen(f"http://{process.http_address}/status.json", timeout=5) as answer:
                served = json.load(answer)
            assert told["runs"][0]["snapshots"][0]["state"] == "complete" == served["runs"][0]["snapshots"][0]["state"]
            assert {"world_opened", "decided", "recorded", "released", "complete"} <= {
                e["kind"] for e in told["timeline"]
            }
            with urllib.request.urlopen(f"http://{process.http_address}/metrics", timeout=5) as answer:
                text = answer.read().decode()
            assert 'backstay_recoveries_total{outcome="none",source="none",training_job="default/gpt"} 1.0' in text
            assert 'backstay_nodes{state="live"} 2.0' in text

        await asyncio.to_thread(watch)
        for node in nodes:
            await node.link.close()
        await process.close()

    run(scenario)


def test_a_restarted_coordinator_keeps_the_world_that_trains() -> None:
    async def scenario() -> None:
        config = CoordinatorConfig(insecure=True, listen="127.0.0.1:0", http="127.0.0.1:0", lease_s=LEASE_S)
        process = CoordinatorProcess(config)
        await process.start()
        nodes = [PlainNode(f"n{rank}", process.address, rank) for rank in range(2)]
        for node in nodes:
            node.link.start()
        await until(lambda: all(node.phase is SessionPhase.TRAINING for node in nodes), "the world was released")
        before = last_run(nodes[0]).decision
        await process.close()
        again = CoordinatorProcess(
            CoordinatorConfig(insecure=True, listen=process.address, http="127.0.0.1:0", lease_s=LEASE_S)
        )
        await again.start()
        await until(lambda: nodes[0].generation.incarnation == again.core.incarnation, "the new one is obeyed")
        assert nodes[0].generation.number > 1
        await until(lambda: last_run(nodes[0]).decision == before, "the decision was kept")
        assert last_run(nodes[0]).decision_phase is DecisionPhase.RELEASE
        for node in nodes:
            await node.link.close()
        await again.close()

    run(scenario)
