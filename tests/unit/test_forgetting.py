"""What a tombstone covers, which ones are kept, and when one must not be followed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backstay.format import json_records
from backstay.ids import Generation, SnapshotKey
from backstayd.core.end_of_run import why_wrong
from backstayd.core.inventory.catalog import ShapeCache, build_views, take_inventory
from backstayd.core.inventory.nodes import NodeState
from backstayd.core.inventory.tombstones import KEEPERS, Tombstones, stripped
from backstayd.core.messages.decisions import Decision, Lineage, Outcome
from backstayd.core.messages.plans import FragmentRecord, ShardRecord
from backstayd.core.messages.report import NodeIdentity, NodeReport, RunReport, SessionPhase, SessionRecord
from backstayd.core.messages.tombstone import MAX_ABSENT, MAX_AGE_S, MAX_TOMBSTONES, Cause, Tombstone, trimmed
from backstayd.core.recover.choice import near_sentence
from backstayd.store.adopt import Forgotten
from backstayd.transport.link import MAX_REPORT_BYTES

RUN = "job/run"
BURIED = Tombstone(run=RUN, attempt=3, generation=20, cause=Cause.FINISHED, world_id="w3", step=50, unix_s=1000.0)


def shard(attempt: int, step: int, world_id: str = "") -> ShardRecord:
    return ShardRecord(
        attempt=attempt, step=step, rank=0, world_size=1, size_bytes=10, digest=f"{attempt}-{step}",
        world_id=world_id or f"w{attempt}",
    )  # fmt: skip


def decision(attempt: int, generation: int, *, base: int = 0) -> Decision:
    lineage = (Lineage(attempt=attempt, base_attempt=base, base_step=0),)
    return Decision(
        decision_id=f"d{attempt}", generation=Generation(generation, "c"), run=RUN, world_id=f"w{attempt}", world_size=1,
        attempt=attempt, outcome=Outcome.NONE, lineage=lineage,
    )  # fmt: skip


def session(phase: SessionPhase, world_id: str = "w3") -> SessionRecord:
    return SessionRecord(world_id=world_id, rank=0, world_size=1, phase=phase)


def report(**fields: object) -> RunReport:
    return RunReport(run=RUN, **fields)  # type: ignore[arg-type]


def wrong(tombstone: Tombstone, *reports: RunReport) -> str:
    named = {f"n{index}": found for index, found in enumerate(reports)}
    nodes = {name: node_of(name, runs=(found,)) for name, found in named.items()}
    return why_wrong(tombstone, named, build_views(take_inventory(RUN, nodes.values()), ShapeCache()), None)


def node_of(name: str, **fields: object) -> NodeState:
    identity = NodeIdentity(name=name, incarnation=name, bulk_address=f"{name}:1")
    return NodeState(NodeReport(node=identity, sequence=1, **fields), 0.0)  # type: ignore[arg-type]


def test_a_tombstone_covers_the_histories_that_it_names_and_no_other() -> None:
    assert BURIED.covers(SnapshotKey(2, 900))
    assert BURIED.covers(SnapshotKey(3, 51), "w3"), "a part that the coordinator had not heard of"
    assert not BURIED.covers(SnapshotKey(3, 51), "another"), "a number can be given twice"
    assert not BURIED.covers(SnapshotKey(4, 1))
    idle = replace(BURIED, cause=Cause.IDLE)
    assert idle.covers(SnapshotKey(3, 50), "w3")
    assert not idle.covers(SnapshotKey(3, 51), "w3"), "a trainer that could not be seen wrote it"
    assert BURIED.covers_decision(3, Generation(20, "c"))
    assert not BURIED.covers_decision(3, Generation(21, "c"))
    assert not BURIED.covers_decision(4, Generation(20, "c"))


def test_a_report_is_seen_without_what_is_covered_and_is_the_same_if_nothing_is() -> None:
    living = report(shards=(shard(4, 9),), decision=decision(4, 30), sessions=(session(SessionPhase.TRAINING, "w4"),))
    assert stripped(living, BURIED) is living
    mixed = replace(
        living,
        shards=(shard(3, 50), shard(4, 9)),
        sessions=(*living.sessions, session(SessionPhase.ENDED)),
    )
    assert stripped(mixed, BURIED) == living
    old = report(
        shards=(shard(1, 5),), decision=decision(3, 20), fragments=(FragmentRecord(plan_id="p", stripe=0, index=0),)
    )
    assert stripped(old, BURIED) == report(fragments=old.fragments), (
        "a fragment without its plan is not known to be covered"
    )


@pytest.mark.parametrize(
    ("tombstone", "reports", "why"),
    [
        (BURIED, [report(shards=(shard(3, 50),), decision=decision(3, 20))], ""),
        (BURIED, [report(decision=decision(4, 30))], ""),
        (BURIED, [report(decision=decision(4, 30, base=3))], "attempt 4 continues what it covers"),
        (BURIED, [report(decision=decision(1, 21))], "attempt 1 was decided after it, at generation 21"),
        (BURIED, [report(sessions=(session(SessionPhase.TRAINING),))], "rank 0 on n0"),
        (BURIED, [report(sessions=(session(SessionPhase.TRAINING, "w2"),), decision=decision(3, 20))], ""),
        (BURIED, [report(sessions=(session(SessionPhase.TRAINING, "w2"),))], ""),
        (BURIED, [report(sessions=(session(SessionPhase.TRAINING, "w2"),), decision=decision(2, 20))], "rank 0 on n0"),
        (replace(BURIED, world_id=""), [report(sessions=(session(SessionPhase.TRAINING, "w2"),))], "rank 0 on n0"),
        (BURIED, [report(sessions=(session(SessionPhase.RESTORING, "new"),))], ""),
        (replace(BURIED, cause=Cause.IDLE), [report(sessions=(session(SessionPhase.RESTORING, "new"),))], "rank 0 on n0"),
        (BURIED, [report(sessions=(session(SessionPhase.ENDED),))], ""),
        (replace(BURIED, cause=Cause.IDLE), [report(shards=(shard(3, 51),))], "snapshots above step 50"),
        (BURIED, [report(shards=(shard(3, 51),))], "snapshots above step 50"),
        (BURIED, [report(shards=(replace(shard(3, 51), world_size=2),))], ""),
        (BURIED, [report(sessions=(session(SessionPhase.TRAINING),)), report(decision=decision(4, 30))], ""),
    ],
)  # fmt: skip
def test_a_tombstone_that_names_what_lives_is_not_followed(
    tombstone: Tombstone, reports: list[RunReport], why: str
) -> None:
    found = wrong(tombstone, *reports)
    assert why in found
    assert bool(found) == bool(why)


@pytest.mark.parametrize(
    "fields", [{"attempt": 1 << 60}, {"step": -1}, {"unix_s": float("nan")}, {"unix_s": 1e20}, {"run": "../x"}]
)
def test_a_tombstone_that_cannot_be_calculated_with_is_passed_over(fields: dict[str, object]) -> None:
    tombstones, bad = Tombstones(), replace(BURIED, **fields)  # type: ignore[arg-type]
    tombstones.take(replace(node_of("n1").report, tombstones=(bad, replace(BURIED, run="job/other"))))
    assert list(tombstones.known) == ["job/other"]


@given(st.lists(st.tuples(st.integers(0, 900), st.integers(0, 3), st.booleans(), st.floats(0, 1e6)), max_size=600))
def test_what_is_kept_is_bounded_and_one_user_does_not_push_out_another(
    drawn: list[tuple[int, int, bool, float]],
) -> None:
    found = [
        Tombstone(
            run=f"job/{name}", attempt=1, generation=1, cause=Cause.FINISHED, owner=str(owner), unix_s=unix_s,
            absent=("n1",) if is_away else (),
        )
        for name, owner, is_away, unix_s in drawn
    ]  # fmt: skip
    kept = trimmed(found, now_unix_s=1e6)
    assert len(kept) <= MAX_TOMBSTONES
    assert trimmed(kept, now_unix_s=1e6) == kept
    counts = {owner: sum(1 for one in kept if one.owner == str(owner)) for owner in range(4)}
    before = {one.run: one for one in found}
    for owner, count in counts.items():
        lost = sum(1 for one in before.values() if one.owner == str(owner)) - count
        assert lost == 0 or count >= max(counts.values()) - 1, "who has most loses first"
    assert trimmed(found, now_unix_s=1e6 + MAX_AGE_S) == ()


def test_a_tombstone_is_brought_to_some_nodes_and_to_all_that_hold_something_of_the_run() -> None:
    tombstones = Tombstones()
    tombstones.bury(BURIED)
    present = {f"n{index}": node_of(f"n{index}") for index in range(20)}
    present["n15"] = node_of("n15", runs=(report(shards=(shard(3, 50),)),))
    tombstones.arrange(present, set(), now_unix_s=2000.0)
    assert set(tombstones.orders.keep) == {f"n{index}" for index in range(KEEPERS)} | {"n15"}
    for name in (*(f"n{index}" for index in range(KEEPERS)), "n15"):
        tombstones.take(replace(present[name].report, tombstones=(BURIED,)))
    tombstones.arrange(present, set(), now_unix_s=2000.0)
    assert set(tombstones.orders.keep) == {"n15"}, "it has not deleted it yet"
    tombstones.arrange(present, {RUN}, now_unix_s=2000.0)
    assert not tombstones.orders.keep, "nobody has looked at the run yet"
    tombstones.lift(RUN)
    tombstones.take(replace(present["n0"].report, tombstones=(BURIED, replace(BURIED, run="job/other"))))
    tombstones.arrange(present, set(), now_unix_s=2000.0)
    assert tombstones.get(RUN) is None, "a report does not bring it back"
    assert tombstones.orders.lift["n15"] == (BURIED,)


def test_names_are_like_each_other_by_run_id_and_not_because_a_job_is_the_same() -> None:
    known = {
        "default/gpt-7b": "step 9",
        "default/ddp": "step 1",
        "vision/run-3": "step 4",
        "default/GPT-7B-2": "no snapshot yet",
    }
    assert near_sentence("default/gpt-7B", known) == (
        "; runs with a name like it: default/gpt-7b (step 9) and default/GPT-7B-2 (no snapshot yet)"
    )
    assert near_sentence("default/run-3", known) == "; runs with a name like it: vision/run-3 (step 4)"
    assert near_sentence("default/fsdp2", known) == ""
    assert near_sentence("default/ddp", known) == ""


def test_all_tombstones_that_a_node_keeps_are_a_small_part_of_what_a_report_may_have() -> None:
    names = tuple(f"{'x' * 57}-{number:05}" for number in range(MAX_ABSENT))
    full = tuple(
        Tombstone(run=f"job/{number}", attempt=1, generation=1, cause=Cause.FINISHED, absent=names)
        for number in range(MAX_TOMBSTONES)
    )
    assert all(one.is_possible for one in full)
    assert len(json_records.dumps(Forgotten(tombstones=full))) < MAX_REPORT_BYTES // 16
