"""A thousand nodes in one process: each with a real line to a real coordinator, and no bytes, files or trainers behind it.

What a node would do with bytes happens at once; only the words are real. ``python -m tests.kit.many_nodes ADDRESS NODES RUNS
LEASE_S`` obeys one JSON command a line and answers one each.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from typing import Any

from backstay.ids import Generation, SnapshotKey, new_incarnation
from backstayd.core.inventory import geometry
from backstayd.core.messages.decisions import Decision, DecisionPhase, Staging, StagingState
from backstayd.core.messages.desired import NodeDesired, RunDesired
from backstayd.core.messages.plans import FragmentRecord, Plan, ShardRecord
from backstayd.core.messages.report import NodeIdentity, NodeReport, RunReport, SessionPhase, SessionRecord
from backstayd.transport.link import CoordinatorLink

SHARD_BYTES = 300_000
CAPACITY_BYTES = 64 << 30
JOINING = 20


class NodeRun:
    """What one node has of one run; one rank lives on each node."""

    def __init__(self, run: str, rank: int, world_size: int) -> None:
        self.run, self.rank, self.world_size = run, rank, world_size
        self.world_id = ""
        self.phase = SessionPhase.RESTORING
        self.attempt = self.last_step = 0
        self.shards: dict[int, ShardRecord] = {}
        self.plans: dict[str, Plan] = {}
        self.fragments: set[FragmentRecord] = set()
        self.decision: Decision | None = None
        self.staging: Staging | None = None

    def report(self) -> RunReport:
        session = SessionRecord(
            world_id=self.world_id,
            rank=self.rank,
            world_size=self.world_size,
            phase=self.phase,
            last_step=self.last_step,
        )
        return RunReport(
            run=self.run,
            sessions=(session,) if self.world_id else (),
            shards=tuple(self.shards[step] for step in sorted(self.shards)),
            plans=tuple(self.plans[plan_id] for plan_id in sorted(self.plans)),
            fragments=tuple(sorted(self.fragments, key=lambda f: (f.plan_id, f.stripe, f.index))),
            decision=self.decision,
            staging=self.staging,
        )

    def commit(self, step: int) -> None:
        digest = hashlib.sha256(f"{self.world_id}/{step}/{self.rank}".encode()).hexdigest()
        self.last_step = step
        self.shards[step] = ShardRecord(
            attempt=self.attempt,
            step=step,
            rank=self.rank,
            world_size=self.world_size,
            size_bytes=SHARD_BYTES,
            digest=digest,
            world_id=self.world_id,
        )

    def release(self, keys: tuple[SnapshotKey, ...]) -> bool:
        gone = [step for step, shard in self.shards.items() if shard.key in keys]
        plans = [plan.plan_id for plan in self.plans.values() if plan.key in keys]
        for step in gone:
            del self.shards[step]
        return self.drop(tuple(plans)) or bool(gone)

    def drop(self, plan_ids: tuple[str, ...]) -> bool:
        had = [plan_id for plan_id in plan_ids if self.plans.pop(plan_id, None) is not None]
        self.fragments = {fragment for fragment in self.fragments if fragment.plan_id not in had}
        return bool(had)

    def follow(self, decision: Decision, phase: DecisionPhase) -> bool:
        """Stage at once, record at once, train once released."""
        before = (self.staging, self.decision, self.phase)
        if phase is DecisionPhase.PREPARE and self.decision != decision:
            self.staging = Staging(decision_id=decision.decision_id, state=StagingState.READY)
        elif phase is DecisionPhase.RECORD:
            self.decision = decision
            self.staging = Staging(decision_id=decision.decision_id, state=StagingState.RECORDED)
        elif phase is DecisionPhase.RELEASE and self.phase is SessionPhase.RESTORING and self.decision is not None:
            self.phase, self.attempt = SessionPhase.TRAINING, decision.attempt
        return before != (self.staging, self.decision, self.phase)


class SimulatedNode:
    """One node with its line."""

    def __init__(self, fleet: Fleet, index: int) -> None:
        self.fleet, self.name = fleet, f"node-{index:04d}"
        self.incarnation = new_incarnation()
        self.generation = Generation()
        self.sequence = 0
        self.runs = {run: NodeRun(run, index, fleet.node_count) for run in fleet.run_names}
        self.link = CoordinatorLink(
            fleet.address, report=self.report, on_desired=self.on_desired, lease_s=fleet.lease_s
        )

    def report(self) -> NodeReport:
        self.sequence += 1
        self.fleet.report_count += 1
        return NodeReport(
            node=NodeIdentity(
                name=self.name, incarnation=self.incarnation, bulk_address=f"{self.name}:7071", version="0.1.0"
            ),
            sequence=self.sequence,
            generation=self.generation,
            runs=tuple(run.report() for run in self.runs.values()),
            capacity_bytes=CAPACITY_BYTES,
            used_bytes=sum(SHARD_BYTES * len(run.shards) for run in self.runs.values()),
        )

    def on_desired(self, desired: NodeDesired) -> None:
        self.fleet.answer_count += 1
        if not (self.generation == desired.generation or self.generation.admits(desired.generation)):
            return
        is_changed = self.generation != desired.generation
        self.generation = desired.generation
        for run in desired.runs:
            is_changed |= self._obey(run)
        if is_changed:
            self.link.notify()

    def _obey(self, desired: RunDesired) -> bool:
        run = self.runs[desired.run]
        is_changed = run.release(desired.release)
        is_changed |= run.drop(desired.drop_plans)
        for plan in desired.plans:
            is_changed |= self._encode(run, plan)
        if desired.decision is not None:
            is_changed |= run.follow(desired.decision, desired.decision_phase)
        return is_changed

    def _encode(self, run: NodeRun, plan: Plan) -> bool:
        """Store the plan, keep parity 0 of the own stripe, put the others on their members."""
        if plan.plan_id in run.plans or plan.step not in run.shards:
            return False
        run.plans[plan.plan_id] = plan
        stripe = next(index for index, member in enumerate(plan.members) if member.node == self.name)
        if geometry.stripe_chunks(plan, stripe) == 0:
            return True
        for index, member in enumerate(geometry.parity_members(stripe, n=len(plan.members), m=plan.m)):
            holder = self.fleet.nodes.get(plan.members[member].node)
            if holder is not None:
                record = FragmentRecord(plan_id=plan.plan_id, stripe=stripe, index=index)
                holder.runs[run.run].fragments.add(record)
                holder.link.notify()
        return True


class Fleet:
    """All nodes of the process, and what the test asks of them."""

    def __init__(self, address: str, node_count: int, run_count: int, lease_s: float) -> None:
        self.address, self.node_count, self.lease_s = address, node_count, lease_s
        self.run_names = [f"many/run-{index + 1}" for index in range(run_count)]
        self.report_count = self.answer_count = 0
        self.nodes: dict[str, SimulatedNode] = {}
        for index in range(node_count):
            node = SimulatedNode(self, index)
            self.nodes[node.name] = node

    async def join(self) -> dict[str, Any]:
        """Connect every node, a few at a time: one process cannot begin a thousand connections at once."""
        waiting: list[SimulatedNode] = []
        for node in self.nodes.values():
            node.link.start()
            waiting.append(node)
            while len(waiting) >= JOINING:
                await asyncio.sleep(0.005)
                waiting = [other for other in waiting if not other.link.is_connected]
        return {}

    async def train(self) -> dict[str, Any]:
        """Every run opens a world with a rank on each node."""
        for name in self.run_names:
            world_id = new_incarnation()
            for node in self.nodes.values():
                run = node.runs[name]
                run.world_id, run.phase = world_id, SessionPhase.RESTORING
                node.link.notify()
        return {}

    async def snapshot(self, step: int) -> dict[str, Any]:
        """Every rank commits its shard of ``step``."""
        for node in self.nodes.values():
            for run in node.runs.values():
                run.commit(step)
            node.link.notify()
        return {}

    async def lose(self, name: str) -> dict[str, Any]:
        """The machine is gone."""
        await self.nodes.pop(name).link.close()
        return {}

    async def count(self) -> dict[str, Any]:
        training = sum(run.phase is SessionPhase.TRAINING for node in self.nodes.values() for run in node.runs.values())
        return {
            "connected": sum(node.link.is_connected for node in self.nodes.values()),
            "training": training,
            "reports": self.report_count,
            "answers": self.answer_count,
        }


async def _serve(fleet: Fleet) -> None:
    loop = asyncio.get_running_loop()
    while True:
        line = await loop.run_in_executor(None, sys.stdin.readline)
        if not line:
            break
        command = json.loads(line)
        answer = await getattr(fleet, command.pop("do"))(**command)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(_serve(Fleet(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))))
