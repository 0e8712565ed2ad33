"""Distrust and the count of restores: what is spoilt by what, what is forgiven, when a loop is one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from backstay.ids import Generation, SnapshotKey
from backstayd.core.inventory.catalog import SnapshotView
from backstayd.core.inventory.distrust import MAX_DISTRUSTED, Trust, count_tries, loop_message, why_tainted
from backstayd.core.inventory.lineage import extend
from backstayd.core.inventory.nodes import NodeState
from backstayd.core.inventory.run_context import LiveSession
from backstayd.core.messages.decisions import Base, Decision, Distrusted, Lineage, Outcome
from backstayd.core.messages.report import NodeIdentity, NodeReport, RunReport, SessionPhase, SessionRecord
from backstayd.core.protect.retention import releasable
from backstayd.core.recover.probation import Probation

BAD = Distrusted(snapshot_id="s1.10", attempt=1, step=10, reason="the loss is nan")


def lineage(*bases: tuple[int, int]) -> tuple[Lineage, ...]:
    """Attempts 1, 2, ... that began from these (attempt, step)."""
    made: tuple[Lineage, ...] = ()
    for attempt, base in enumerate(bases, start=1):
        made = extend(made, attempt=attempt, base=base, world_id=f"w{attempt}")
    return made


def is_tainted(attempt: int, step: int, line: tuple[Lineage, ...]) -> bool:
    return bool(why_tainted(SnapshotKey(attempt, step), f"s{attempt}.{step}", line, [BAD]))


def test_a_distrusted_snapshot_spoils_what_was_trained_from_it_and_nothing_else() -> None:
    line = lineage((0, 0), (1, 10), (2, 14))
    assert [is_tainted(1, step, line) for step in (8, 9, 10, 11)] == [False, False, True, True]
    assert [is_tainted(2, step, line) for step in (11, 14)] == [True, True]
    assert is_tainted(3, 15, line), "and what was trained from that"
    older = lineage((0, 0), (1, 10), (1, 9))
    assert not is_tainted(3, 12, older), "the history that began before it is sound"
    other = Distrusted(snapshot_id="another", attempt=2, step=14, reason="x")
    assert not why_tainted(SnapshotKey(2, 14), "s2.14", line, [other]), "the same step of another world is another"


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(1, 6), st.integers(1, 60))
def test_no_descendant_of_a_distrusted_snapshot_is_sound_and_no_ancestor_is_spoilt(
    advances: list[int], bad_attempt: int, step: int
) -> None:
    bases, at = [(0, 0)], 0
    for attempt, advance in enumerate(advances, start=1):
        at += advance
        bases.append((attempt, at))
    line = lineage(*bases)
    bad_attempt = min(bad_attempt, len(bases))
    begin = bases[bad_attempt - 1][1]
    bad = Distrusted(snapshot_id="bad", attempt=bad_attempt, step=begin + 1, reason="x")
    key = SnapshotKey(len(bases), bases[-1][1] + step)
    # a chain without rollbacks: every snapshot at or after the bad step descends from it
    descends = key.attempt == bad_attempt and key.step > bad.step
    descends |= key.attempt > bad_attempt and bases[bad_attempt][1] >= bad.step
    assert bool(why_tainted(key, "good", line, [bad])) == descends
    assert not why_tainted(SnapshotKey(bad_attempt, begin), "good", line, [bad])


def node(name: str, *distrusted: Distrusted) -> NodeState:
    identity = NodeIdentity(name=name, incarnation="i", bulk_address="a:1")
    return NodeState(
        NodeReport(node=identity, sequence=1, runs=(RunReport(run="j/r", distrusted=distrusted),)), seen_s=0.0
    )


def united(
    trust: Trust, *nodes: NodeState, marks: tuple[Distrusted, ...] = (), survey_id: str = ""
) -> tuple[Distrusted, ...]:
    return trust.unite("j/r", nodes, {mark.snapshot_id: mark for mark in marks}, survey_id=survey_id)


def test_what_one_node_distrusts_all_do_until_an_operator_trusts_it_again() -> None:
    trust = Trust()
    assert united(trust, node("a", BAD), node("b")) == (BAD,)
    trust.clear([BAD], survey_id="")
    assert united(trust, node("a", BAD), node("b", BAD)) == ()
    assert trust.cleared == {BAD.snapshot_id}, "nodes are told until all have heard"
    assert united(trust, node("a"), node("b")) == ()
    assert trust.cleared == set()
    assert united(trust, node("a", BAD)) == (BAD,), "said again, it counts again"


def test_a_mark_does_not_count_from_when_it_is_trusted_until_a_later_survey_finds_it_gone() -> None:
    trust = Trust()
    assert united(trust, node("a"), marks=(BAD,), survey_id="1") == (BAD,)
    trust.clear([BAD], survey_id="1")
    assert united(trust, node("a", BAD), marks=(BAD,), survey_id="1") == ()
    assert united(trust, node("a"), marks=(BAD,), survey_id="1") == (), "every node has forgotten it, storage has not"
    assert united(trust, node("a"), survey_id="1") == ()
    assert united(trust, node("a"), survey_id="") == ()
    assert united(trust, node("a"), marks=(BAD,), survey_id="2") == (), "it was written while it was trusted again"
    assert united(trust, node("a"), survey_id="2") == ()
    assert united(trust, node("a"), marks=(BAD,), survey_id="3") == (BAD,), "marked anew, it counts again"


def test_what_is_distrusted_anew_counts_although_a_former_mark_of_it_is_stale() -> None:
    trust = Trust()
    trust.clear([BAD], survey_id="1")
    assert united(trust, node("a"), marks=(BAD,)) == ()
    assert united(trust, node("a", BAD), marks=(BAD,)) == (BAD,)
    assert united(trust, node("a"), marks=(BAD,)) == (BAD,), "nothing strikes the mark out"
    trust.clear([BAD], survey_id="1")
    trust.add(BAD)
    assert not trust.cleared, "nor when it is said here"
    assert not trust.stale_marks


def test_distrust_is_bounded_and_keeps_the_newest() -> None:
    many = [Distrusted(snapshot_id=f"s{i}", attempt=1, step=i, reason="x") for i in range(MAX_DISTRUSTED + 9)]
    trust = Trust()
    assert united(trust, node("a", *many)) == tuple(many[9:])
    trust.clear(many, survey_id="")
    assert len(trust.stale_marks) == MAX_DISTRUSTED


def decision(tries: int, attempt: int = 2) -> Decision:
    return Decision(
        decision_id="d", generation=Generation(1, "c"), run="j/r", world_id="w", world_size=2, attempt=attempt,
        outcome=Outcome.EXACT, base=Base(attempt=1, step=10, snapshot_id="s"), tries=tries,
    )  # fmt: skip


def test_restores_are_counted_through_the_recorded_decision_and_progress_begins_anew() -> None:
    old = SnapshotKey(1, 10)
    assert count_tries(None, "s", newest=old, trust=Trust()) == 0
    assert count_tries(decision(0), "s", newest=old, trust=Trust()) == 1
    assert count_tries(decision(7), "s", newest=old, trust=Trust()) == 8
    assert count_tries(decision(7), "another", newest=old, trust=Trust()) == 0
    assert count_tries(decision(7), "s", newest=SnapshotKey(2, 11), trust=Trust()) == 0, "it had come further"
    assert count_tries(decision(7), "s", newest=old, trust=Trust(is_loop_cleared=True)) == 0


def test_the_message_of_a_loop_says_how_often_which_step_why_and_what_next() -> None:
    message = loop_message("j/r", 10, 44, "rank 1 on node-1 died")
    for words in ("44 times", "step 10", "rank 1 on node-1 died", "backstay trust j/r", "backstay distrust j/r 10"):
        assert words in message


def test_what_was_restored_is_held_until_every_rank_is_past_its_probation() -> None:
    probation = Probation(steps=3)

    def held(*steps: int) -> bool:
        world = {
            rank: LiveSession(
                "n", SessionRecord(world_id="w", rank=rank, world_size=2, phase=SessionPhase.TRAINING, last_step=step)
            )
            for rank, step in enumerate(steps)
        }
        return bool(probation.held(decision(0), world))

    assert held(10, 10)
    assert held(13, 12)
    assert not held(13, 13)
    assert held(99), "a rank that is gone has not passed"
    assert not Probation(steps=0).held(decision(0), {})


def view(step: int, spares: int = 1) -> SnapshotView:
    return SnapshotView(
        key=SnapshotKey(1, step), world_size=1, snapshot_id=f"s{step}", world_id="w", digests={0: "d"}, sizes={0: 1},
        holders={0: ("n",)}, plans=(), rank_spares={0: spares},
    )  # fmt: skip


def released(steps: list[int], *, tainted: set[int], held: set[int] | None = None, keep: int = 1) -> list[int]:
    views = [view(step) for step in steps]
    chosen = releasable(
        views, live=range(len(views)), dead=(), keep=keep, target=1, abandoned=(),
        tainted={SnapshotKey(1, step) for step in tainted}, held={SnapshotKey(1, step) for step in held or ()},
    )  # fmt: skip
    return [steps[index] for index in chosen]


def test_a_distrusted_snapshot_is_no_reason_to_release_a_sound_one() -> None:
    assert released([12, 11, 10, 9], tainted={12, 11, 10}) == [11, 10]
    assert released([12, 11, 10, 9], tainted=set()) == [11, 10, 9]
    assert released([12, 11, 10], tainted={12, 11, 10}, keep=2) == [11, 10], "distrusted ones need one slot"
    assert released([12, 11, 10, 9], tainted=set(), held={10}) == [11, 9], "what is on probation stays"
