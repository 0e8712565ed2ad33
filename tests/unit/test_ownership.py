"""One run, one user: on every node, for a new coordinator, and beside what lies on durable storage."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from backstay.ids import Generation
from backstayd.core.inventory.nodes import NodeState
from backstayd.core.inventory.ownership import owner_of, strangers, without
from backstayd.core.messages.decisions import Decision, Outcome
from backstayd.core.messages.durable import PersistedSnapshot, Survey
from backstayd.core.messages.report import NodeIdentity, NodeReport, RunReport

RUN = "default/gpt"


def decided(number: int) -> Decision:
    return Decision(
        decision_id=f"{number:032x}",
        generation=Generation(number, "c"),
        run=RUN,
        world_id="w",
        world_size=1,
        attempt=number,
        outcome=Outcome.NONE,
    )


def stored(owner: str, generation: int = 5) -> Survey:
    snapshot = PersistedSnapshot(
        run=RUN, attempt=1, step=1, world_size=1, snapshot_id="s", shards=(), generation=generation, owner=owner
    )
    return Survey(url="file:///x", is_done=True, snapshots=(snapshot,))


def node(name: str, owner: str = "", *, decision: int = 0, survey: Survey | None = None) -> tuple[str, NodeState]:
    report = RunReport(run=RUN, owner=owner, decision=decided(decision) if decision else None, survey=survey)
    other = RunReport(run="default/other", owner="7")
    identity = NodeIdentity(name=name, incarnation="i", bulk_address="h:1")
    return name, NodeState(NodeReport(node=identity, sequence=1, runs=(report, other)), 0.0)


def test_the_first_user_named_owns_the_run_and_keeps_it() -> None:
    assert owner_of(RUN, dict([node("a")]), known="") == ""
    assert owner_of(RUN, dict([node("a", "1000"), node("b")]), known="") == "1000"
    both = dict([node("a", "1000"), node("b", "1001")])
    assert owner_of(RUN, both, known="1001") == "1001"
    assert owner_of(RUN, dict([node("b", "1001")]), known="1000") == "1000", "also while its nodes are away"


def test_a_new_coordinator_gives_the_run_to_whom_a_decision_was_recorded_for() -> None:
    both = dict([node("a", "1001"), node("b", "1000", decision=3), node("c", "1000", decision=3)])
    assert owner_of(RUN, both, known="") == "1000"
    assert owner_of(RUN, both, known="1001") == "1000", "whoever came first without one has trained nothing"


def test_what_lies_on_storage_belongs_to_whom_it_was_written_for() -> None:
    empty = dict([node("a", "1001", survey=stored("1000"))])
    assert owner_of(RUN, empty, known="1001") == "1000"
    anybodys = dict([node("a", "1001", survey=stored(""))])
    assert owner_of(RUN, anybodys, known="") == "1001", "an import is for whoever asks first"


def test_what_strangers_report_of_the_run_does_not_count_and_the_rest_does() -> None:
    nodes = dict([node("a", "1000", decision=1), node("b", "1001"), node("c")])
    foreign = strangers(RUN, nodes, "1000")
    assert foreign == {"b": "1001"}
    seen = without(RUN, nodes, foreign)
    assert [name for name in seen if RUN in seen[name].runs] == ["a", "c"]
    assert "default/other" in seen["b"].runs
    assert RUN in nodes["b"].runs, "the table of nodes itself stays as reported"
    assert without(RUN, nodes, {}) is nodes


users = st.sampled_from(["", "1000", "1001", "1002"])
claims = st.lists(st.tuples(users, st.integers(0, 3), st.none() | st.builds(stored, users)), max_size=5)


@given(claims, users)
def test_the_owner_is_somebody_who_claims_it_and_does_not_change_by_looking_again(
    made: list[tuple[str, int, Survey | None]], known: str
) -> None:
    nodes = dict(
        node(f"n{index}", owner, decision=number if owner else 0, survey=survey)
        for index, (owner, number, survey) in enumerate(made)
    )
    owner = owner_of(RUN, nodes, known=known)
    named = {one[0] for one in made} | {s.owner for *_, survey in made if survey for s in survey.snapshots} | {known}
    assert owner in named
    assert owner or not named - {""}, "somebody owns what somebody claims"
    assert owner_of(RUN, nodes, known=owner) == owner
    turned = dict(reversed(list(nodes.items())))
    assert owner_of(RUN, turned, known=known) == owner
    assert not set(strangers(RUN, nodes, owner).values()) & {"", owner}
