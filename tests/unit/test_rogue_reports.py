"""One node's report that cannot be true costs that node's word on that run, never the evaluation of the others."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from typing import Any

import pytest

from backstay.errors import IntegrityError
from backstay.ids import MAX_COUNT, MAX_GENERATION, Generation
from backstayd.core.coordinator import Coordinator
from backstayd.core.inventory.catalog import InventoryCache
from backstayd.core.messages.decisions import Decision, Outcome, Placement
from backstayd.core.messages.plans import FragmentRecord, Member, Plan, ShardRecord, VolumeShard
from backstayd.core.messages.report import NodeIdentity, NodeReport, RunReport, SessionPhase, SessionRecord
from backstayd.core.policy import CorePolicy
from backstayd.core.status.document import status_document

RUN, ROGUE_RUN = "job/honest", "job/rogue"
LEASE_S = 1.0


def shard(step: int, *, world_size: int = 1, rank: int = 0, attempt: int = 1) -> ShardRecord:
    return ShardRecord(
        attempt=attempt,
        step=step,
        rank=rank,
        world_size=world_size,
        size_bytes=1000,
        digest=f"{step:064x}",
        world_id="w",
    )


def session(*, rank: int = 0, world_size: int = 1, last_step: int = 0) -> SessionRecord:
    return SessionRecord(
        world_id="w", rank=rank, world_size=world_size, phase=SessionPhase.RESTORING, last_step=last_step
    )


def plan(**changes: Any) -> Plan:
    rows = (VolumeShard(rank=0, size_bytes=1000, digest="d"),)
    members = tuple(
        Member(node=name, incarnation="i", bulk_address="n:1", shards=rows if name == "n1" else ())
        for name in ("n1", "n2")
    )
    sound = Plan(
        run=ROGUE_RUN, snapshot_id="s", attempt=1, step=5, world_size=1, m=1, chunk_bytes=1024, members=members
    )
    return replace(sound, **changes).sealed()


def decision(**changes: Any) -> Decision:
    sound = Decision(
        decision_id="d", generation=Generation(3, "c"), run=ROGUE_RUN, world_id="w", world_size=1, attempt=1,
        outcome=Outcome.NONE, placements=(Placement(rank=0, node="n2"),),
    )  # fmt: skip
    return replace(sound, **changes)


def report(name: str, *runs: RunReport, sequence: int = 1, **more: Any) -> NodeReport:
    node = NodeIdentity(name=name, incarnation=f"{name}-1", bulk_address=f"{name}:1")
    return NodeReport(node=node, sequence=sequence, runs=runs, **more)


def coordinator_that_hears(*reports: NodeReport) -> Coordinator:
    core = Coordinator(CorePolicy(parity=0, lease_s=LEASE_S), "c1", now_s=0.0)
    core.observe(report("n1", RunReport(run=RUN, sessions=(session(),), shards=(shard(3),))), 0.5)
    for one in reports:
        core.observe(one, 0.5)
    core.tick(LEASE_S)
    core.evaluate()
    return core


def is_served(core: Coordinator) -> bool:
    """Whether the honest run's trainer is being answered."""
    return core.runs[RUN].recovery.world_id == "w" and any(run.run == RUN for run in core.desired("n1").runs)


ROGUE_RUNS = {
    "a plan without shards": RunReport(run=ROGUE_RUN, plans=(plan(members=plan().members[1:], m=0),)),
    "a plan with 2^31 parity fragments": RunReport(run=ROGUE_RUN, plans=(plan(m=1 << 31),)),
    "a plan with as much parity as members": RunReport(run=ROGUE_RUN, plans=(plan(m=2),)),
    "a plan of a world of 2^31": RunReport(run=ROGUE_RUN, plans=(plan(world_size=1 << 31),)),
    "a plan that names a rank twice": RunReport(
        run=ROGUE_RUN, plans=(plan(members=(*plan().members, replace(plan().members[0], node="n3"))),)
    ),
    "a plan of chunks of no bytes": RunReport(run=ROGUE_RUN, plans=(plan(chunk_bytes=0),)),
    "a plan of another run": RunReport(run=ROGUE_RUN, plans=(plan(run=RUN),)),
    "a shard of a world of 2^31": RunReport(run=ROGUE_RUN, shards=(shard(3, world_size=1 << 31),)),
    "a shard of step 2^63 - 3": RunReport(run=ROGUE_RUN, shards=(shard((1 << 63) - 3),)),
    "a trainer outside its world": RunReport(run=ROGUE_RUN, sessions=(session(rank=7),)),
    "a trainer at step 2^48": RunReport(run=ROGUE_RUN, sessions=(session(last_step=MAX_COUNT),)),
    "a fragment of stripe 2^31": RunReport(run=ROGUE_RUN, fragments=(FragmentRecord(plan_id="p", stripe=1 << 31, index=0),)),
    "a decision for a world of 2^31": RunReport(run=ROGUE_RUN, decision=decision(world_size=1 << 31)),
    "a decision of generation 2^63 - 1": RunReport(
        run=ROGUE_RUN, decision=decision(generation=Generation((1 << 63) - 1, "c"))
    ),
    "an owner who is no user": RunReport(run=ROGUE_RUN, shards=(shard(3),), owner="root"),
    "a name that is a path": RunReport(run="../../etc/passwd", shards=(shard(3),)),
}  # fmt: skip


@pytest.mark.parametrize("what", ROGUE_RUNS)
def test_a_run_report_that_cannot_be_calculated_with_is_refused_by_name_and_costs_no_other_run(what: str) -> None:
    core = coordinator_that_hears(report("n2", ROGUE_RUNS[what], RunReport(run="job/other", shards=(shard(4),))))
    core.check_invariants()
    assert is_served(core)
    assert "job/other" in core.runs, "what the node says of other runs counts"
    assert ROGUE_RUNS[what].run not in core.runs
    (event,) = [event for event in core.timeline.all() if event.kind == "report_refused"]
    assert "n2" in event.message
    assert ROGUE_RUNS[what].run in event.message
    json.dumps(status_document(core, 1.0))


def test_sound_reports_pass_the_door() -> None:
    sound = RunReport(
        run=ROGUE_RUN, sessions=(session(),), shards=(shard(3),), plans=(plan(),), decision=decision(), owner="1000",
        fragments=(FragmentRecord(plan_id=plan().plan_id, stripe=1, index=0),),
    )  # fmt: skip
    core = coordinator_that_hears(report("n2", sound))
    assert core.nodes.nodes["n2"].runs[ROGUE_RUN] is sound


def test_a_plan_under_the_id_of_another_is_not_counted_and_what_else_the_run_holds_is() -> None:
    forged = replace(plan(), plan_id="0" * 32)
    core = coordinator_that_hears(report("n2", RunReport(run=ROGUE_RUN, shards=(shard(5),), plans=(plan(), forged))))
    core.check_invariants()
    used = core.nodes.nodes["n2"].runs[ROGUE_RUN]
    assert (used.plans, used.shards) == ((plan(),), (shard(5),))
    (event,) = [event for event in core.timeline.all() if event.kind == "report_refused"]
    assert "does not have the id of its content" in event.message


@pytest.mark.parametrize(
    "changes",
    [
        {"generation": Generation(MAX_GENERATION, "c0")},
        {"node": NodeIdentity(name="a/b", incarnation="i", bulk_address="n:1")},
        {"node": NodeIdentity(name="n2", incarnation="i" * 2000, bulk_address="n:1")},
    ],
)
def test_a_report_that_can_be_no_nodes_is_refused_whole_and_fences_nobody(changes: dict[str, Any]) -> None:
    core = coordinator_that_hears()
    with pytest.raises(IntegrityError):
        core.observe(replace(report("n2"), **changes), 1.1)
    core.evaluate()
    assert is_served(core)
    assert list(core.nodes.nodes) == ["n1"]
    assert core.generation.number < 10


def test_a_rogue_that_changes_its_lies_is_logged_once_a_minute() -> None:
    core = coordinator_that_hears()
    for beat in range(2, 100):
        lie = RunReport(run=f"job/r{beat}", shards=(shard((1 << 50) + beat),))
        core.observe(report("n2", lie, sequence=beat), 1 + beat * 0.001)
    assert sum(1 for event in core.timeline.all() if event.kind == "report_refused") == 1


def test_one_shard_that_claims_a_world_of_a_million_costs_what_one_shard_costs() -> None:
    """Evaluation and status stay in bounds of memory; both took hundreds of MiB, for every run of the cluster."""
    claim = RunReport(run=ROGUE_RUN, sessions=(session(world_size=1 << 20),), shards=(shard(5, world_size=1 << 20),))
    tracemalloc.start()
    try:
        core = coordinator_that_hears(report("n2", claim))
        text = json.dumps(status_document(core, 1.0))
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert len(text) < 1 << 20
    assert is_served(core)


def test_an_exception_in_one_run_leaves_the_others_evaluated_and_names_the_node() -> None:
    core = coordinator_that_hears(report("n2", RunReport(run=ROGUE_RUN, shards=(shard(4),))))
    spoilt = core.nodes.nodes["n2"].runs[ROGUE_RUN]
    object.__setattr__(spoilt, "shards", None)  # whatever no door has thought of
    core.observe(report("n1", RunReport(run=RUN, sessions=(session(),), shards=(shard(3),)), sequence=2), 1.1)
    core.runs[ROGUE_RUN].cache = InventoryCache()
    core.evaluate()
    assert is_served(core)
    (event,) = [event for event in core.timeline.all() if event.kind == "evaluation_failed"]
    assert (event.run, "reported by n2" in event.message) == (ROGUE_RUN, True)
    assert [run.run for run in core.desired("n2").runs if run.run == ROGUE_RUN] == [], "no orders: nothing is deleted"
    shown = next(run for run in status_document(core, 1.0)["runs"] if run["run"] == ROGUE_RUN)
    assert shown["redundancy"] == "UNPROTECTED"
    with pytest.raises(AssertionError, match="could not be evaluated"):
        core.check_invariants()
    core.observe(report("n2", RunReport(run=ROGUE_RUN, shards=(shard(4),)), sequence=3), 1.2)
    core.evaluate()
    core.check_invariants()
