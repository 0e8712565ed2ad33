"""The gate's comparison and its verdicts: what passes, what is asked for, what the sentence says."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from backstay.ids import Generation
from backstay.protocol.messages import GateDetail, GateEntry
from backstayd.core.inventory.run_context import LiveSession
from backstayd.core.messages.decisions import Base, Decision, Outcome
from backstayd.core.messages.gate import GateReport, GateState
from backstayd.core.messages.report import SessionPhase, SessionRecord
from backstayd.core.recover.gate import Gate, conflicts_of, is_passed_mark

DECISION = Decision(
    decision_id="d1",
    generation=Generation(3, "c"),
    run="j/r",
    world_id="w",
    world_size=4,
    attempt=2,
    outcome=Outcome.EXACT,
    base=Base(attempt=1, step=12, snapshot_id="s"),
)


def entry(name: str, digest: str = "x", ranks: tuple[int, ...] = ()) -> GateEntry:
    return GateEntry(name=name, ranks=ranks, digest=digest)


def report(*entries: GateEntry, details: tuple[GateDetail, ...] = (), failure: str = "") -> GateReport:
    return GateReport(decision_id="d1", entries=entries, details=details, failure=failure)


def world(reports: dict[int, GateReport | None], **changes: int) -> dict[int, LiveSession]:
    return {
        rank: LiveSession(
            f"n{rank}",
            SessionRecord(
                world_id="w", rank=rank, world_size=4, phase=SessionPhase.TRAINING, gate=said,
                last_step=changes.get(f"last_{rank}", 12),
            ),
        )
        for rank, said in reports.items()
    }  # fmt: skip


def verdict_of(
    reports: dict[int, GateReport | None], *, gate: Gate | None = None, now_s: float = 0.0, **changes: int
) -> tuple[GateState, str]:
    gate = gate or Gate()
    gate.update(DECISION, world(reports, **changes), now_s=now_s, lease_s=3.0)
    assert gate.verdict is not None
    return gate.verdict.state, gate.verdict.message


def test_ranks_that_all_say_the_same_pass_and_nobody_passes_before_the_last_has_spoken() -> None:
    said = report(entry("identity: x"), entry("layout: all ranks"))
    assert verdict_of({0: said, 1: said, 2: said, 3: None})[0] is GateState.WAITING
    assert verdict_of(dict.fromkeys(range(4), said))[0] is GateState.PASSED


def test_a_difference_is_asked_for_first_and_then_told_with_tensor_ranks_expected_and_found() -> None:
    gate = Gate()
    name = "replicas: all ranks"
    reports: dict[int, GateReport | None] = {r: report(entry(name, "odd" if r == 2 else "x")) for r in range(4)}
    assert verdict_of(reports, gate=gate)[0] is GateState.DETAIL
    assert gate.verdict is not None
    assert gate.verdict.entries == (name,)
    for rank in range(4):
        crc = "bad" if rank == 2 else "good"
        detail = GateDetail(entry=name, names=("model.a", "model.b"), digests=("same", crc))
        reports[rank] = report(entry(name, "odd" if rank == 2 else "x"), details=(detail,))
    state, message = verdict_of(reports, gate=gate)
    assert state is GateState.FAILED
    assert gate.is_content
    assert message == (
        "the layout gate refuses step 12: replicas: all ranks: model.b is bad on rank 2, expected good as on ranks 0, 1 and 3"
    )


def test_a_stream_that_two_ranks_own_is_refused() -> None:
    reports: dict[int, GateReport | None] = {
        rank: report(entry("identity: x"), entry(f"rng: stream {stream}", "", (rank,)))
        for rank, stream in enumerate((0, 0, 2, 3))
    }
    state, message = verdict_of(reports)
    assert state is GateState.FAILED
    assert "rng: stream 0 is owned by ranks 0 and 1, expected one owner" in message


def test_a_rank_that_does_not_share_what_another_shares_with_it_is_named() -> None:
    said = report(entry("layout: ranks 0, 1", "x", (0, 1)))
    other = report(entry("layout: ranks 2, 3", "x", (2, 3)))
    detail = (GateDetail(entry="layout: ranks 0, 1", names=(), digests=()),)
    gate = Gate()
    reports: dict[int, GateReport | None] = {0: said, 1: other, 2: other, 3: other}
    assert verdict_of(reports, gate=gate)[0] is GateState.DETAIL
    reports = {r: report(*s.entries, details=detail) for r, s in reports.items() if s is not None}
    detail2 = (*detail, GateDetail(entry="layout: ranks 2, 3", names=(), digests=()))
    reports = {r: report(*s.entries, details=detail2) for r, s in reports.items() if s is not None}
    state, message = verdict_of(reports, gate=gate)
    assert state is GateState.FAILED
    assert "layout: ranks 0, 1: stated by rank 0 only, expected of rank 1 too" in message
    assert not gate.is_content, "another program, not other bytes"


def test_a_failure_ends_it_at_once_although_others_have_not_spoken() -> None:
    state, message = verdict_of({0: report(entry("identity: x")), 1: report(failure="out of memory"), 2: None, 3: None})
    assert state is GateState.FAILED
    assert message == "rank 1 did not load step 12: out of memory"


def test_a_rank_that_died_is_not_waited_for_longer_than_a_lease() -> None:
    gate, said = Gate(), report(entry("identity: x"))
    reports: dict[int, GateReport | None] = {0: said, 1: said, 2: said}
    assert verdict_of(reports, gate=gate, now_s=10.0)[0] is GateState.WAITING
    state, message = verdict_of(reports, gate=gate, now_s=13.0)
    assert state is GateState.FAILED
    assert "rank 3 died" in message


def test_a_rank_that_trains_without_having_asked_is_not_waited_for() -> None:
    said = report(entry("identity: x"))
    assert verdict_of({0: said, 1: said, 2: said, 3: None}, last_3=13)[0] is GateState.PASSED


def test_a_new_coordinator_takes_the_word_of_a_rank_that_was_told() -> None:
    said, told = report(entry("identity: x")), GateReport(decision_id="d1")
    assert is_passed_mark(told)
    assert verdict_of({0: told, 1: said})[0] is GateState.PASSED


def test_a_verdict_is_never_taken_back_but_by_another_decision() -> None:
    gate = Gate()
    assert verdict_of({0: report(failure="x")}, gate=gate)[0] is GateState.FAILED
    assert verdict_of(dict.fromkeys(range(4), report(entry("identity: x"))), gate=gate)[0] is GateState.FAILED
    assert not gate.update(DECISION, {}, now_s=1.0, lease_s=3.0)


@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.sets(st.integers(0, 3), min_size=1)), max_size=6, unique_by=lambda x: x[0]
    ),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
def test_any_single_change_of_one_rank_is_seen_and_no_other(
    statements: list[tuple[str, set[int]]], rank: int, random: object
) -> None:
    made = {r: [entry(name, "x", tuple(sorted(scope))) for name, scope in statements if r in scope] for r in range(4)}
    assert conflicts_of({r: report(*e) for r, e in made.items()}, range(4)) == []
    shared = [index for index, e in enumerate(made[rank]) if len(e.ranks) > 1]
    if not shared:
        return
    index = random.choice(shared)  # type: ignore[attr-defined]
    changed = made[rank][index]
    made[rank][index] = entry(changed.name, "y", changed.ranks)
    found = conflicts_of({r: report(*e) for r, e in made.items()}, range(4))
    assert [conflict.name for conflict in found] == [changed.name]
    del made[rank][index]
    found = conflicts_of({r: report(*e) for r, e in made.items()}, range(4))
    assert [(conflict.name, conflict.absent) for conflict in found] == [(changed.name, (rank,))]
