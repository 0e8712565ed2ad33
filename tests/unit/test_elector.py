"""One candidate of the election, step by step: what it asks the store, when it acts, and when it must not."""

from __future__ import annotations

from backstayd.election.elector import NOBODY, Elector, Lead, Read, StepDown, Swap
from backstayd.election.lease import LeaseRecord, Timing, Versioned

TIMING = Timing(lease_s=9.0)


def record(holder: str, address: str, term: int, lease_s: float = 9.0) -> LeaseRecord:
    return LeaseRecord(holder=holder, address=address, term=term, lease_s=lease_s)


OTHER = record("other", "other:7070", 4)


def candidate() -> Elector:
    return Elector("me", "me:7070", TIMING)


def mine(term: int) -> LeaseRecord:
    return record("me", "me:7070", term)


def seen(what: LeaseRecord, version: str) -> Versioned:
    return Versioned(record=what, version=version)


def leading(elector: Elector, at_s: float = 0.0) -> None:
    """From a record that was given back to a reign of term 5, renewed last at ``at_s``."""
    assert elector.tick(at_s) == [Read()]
    released = record("", "", 4)
    assert elector.on_read(seen(released, "v1"), at_s) == [Swap(record=mine(5), version="v1")]
    assert elector.on_swapped("v2", at_s + 0.1) == [Lead(term=5)]


def test_where_there_is_no_record_one_of_nobody_is_written_and_waited_for() -> None:
    elector = candidate()
    elector.tick(0.0)
    nobody = record(NOBODY, "", 0)
    assert elector.on_read(None, 0.1) == [Swap(record=nobody, version=None)]
    assert elector.on_swapped("v1", 0.2) == []
    assert elector.tick(2.0) == [Read()]
    assert elector.on_read(seen(nobody, "v1"), 2.1) == []
    assert elector.leader(2.1) is None
    assert elector.tick(9.3) == [Swap(record=mine(1), version="v1")]
    assert elector.on_swapped("v2", 9.4) == [Lead(term=1)]


def test_anothers_record_is_replaced_only_after_a_whole_lease_unchanged() -> None:
    elector = candidate()
    elector.tick(100.0)
    assert elector.on_read(seen(OTHER, "v1"), 100.2) == []
    assert elector.leader(100.2) == OTHER
    for at_s, version in ((101.2, "v1"), (105.0, "v2"), (113.9, "v2")):
        assert elector.tick(at_s) == [Read()]
        assert elector.on_read(seen(OTHER, version), at_s) == [], "the version changed at 105: a renewal"
    assert elector.leader(113.9) is None, "it has not renewed for longer than it may act"
    assert elector.tick(115.0) == [Swap(record=mine(5), version="v2")]


def test_a_leader_with_a_longer_lease_is_waited_for_longer() -> None:
    elector, patient = candidate(), record("other", "other:7070", 4, lease_s=30.0)
    elector.tick(0.0)
    elector.on_read(seen(patient, "v1"), 0.0)
    assert elector.tick(29.0) == [Read()]
    assert elector.on_read(seen(patient, "v1"), 29.9) == []
    assert elector.tick(31.0) == [Swap(record=mine(5), version="v1")]


def test_a_reign_is_counted_from_before_the_renewal_was_sent() -> None:
    elector = candidate()
    leading(elector)
    assert elector.margin_s(0.1) == 5.9
    assert elector.tick(1.6) == [Swap(record=mine(5), version="v2")]
    assert elector.on_swapped("v3", 5.0) == []
    assert elector.may_act(7.5)
    assert not elector.may_act(7.6), "6 s after the renewal of 1.6 was sent, not after it was answered"


def test_an_answer_that_comes_after_the_deadline_makes_no_leader() -> None:
    elector = candidate()
    elector.tick(0.0)
    elector.on_read(seen(record("", "", 4), "v1"), 0.0)
    assert elector.on_swapped("v2", 6.1) == []
    assert not elector.may_act(6.1)
    assert elector.tick(6.2) == [Swap(record=mine(6), version="v2")], "taken anew, as another term"


def test_a_renewal_without_an_answer_is_looked_up_and_does_not_lengthen_the_reign() -> None:
    elector = candidate()
    leading(elector)
    elector.tick(1.6)
    assert elector.on_failed("no answer", 3.1) == []
    assert elector.tick(4.1) == [Read()]
    assert elector.on_read(seen(mine(5), "v3"), 4.2) == [Swap(record=mine(5), version="v3")], "it had happened"
    assert elector.margin_s(4.2) < 2.0
    elector.on_swapped("v4", 4.3)
    assert elector.margin_s(4.3) > 5.0


def test_a_leader_that_slept_through_its_lease_ends_before_anything_else() -> None:
    elector = candidate()
    leading(elector)
    assert not elector.may_act(60.0)
    (ended, *asked) = elector.tick(60.0)
    assert isinstance(ended, StepDown)
    assert "not renewed within 6 s" in ended.reason
    assert asked == [Swap(record=mine(6), version="v2")], "nobody took it meanwhile, or this fails: a new term"


def test_a_leader_that_finds_another_in_the_record_ends() -> None:
    elector = candidate()
    leading(elector)
    elector.tick(1.6)
    assert elector.on_swapped(None, 1.7) == []
    assert elector.tick(1.7) == [Read()]
    newer = record("other", "other:7070", 6)
    (ended,) = elector.on_read(seen(newer, "v9"), 1.8)
    assert ended == StepDown(reason="another coordinator leads: other:7070 (term 6)")


def test_a_leader_whose_record_is_deleted_ends_and_its_terms_go_on() -> None:
    elector = candidate()
    leading(elector)
    elector.tick(1.6)
    elector.on_swapped(None, 1.7)
    elector.tick(1.7)
    ended, made = elector.on_read(None, 1.8)
    assert ended == StepDown(reason="another coordinator leads: the record was deleted")
    assert made == Swap(record=record(NOBODY, "", 5), version=None)


def test_ending_gives_the_lease_back_after_it_stopped_acting() -> None:
    elector = candidate()
    leading(elector)
    ended, released = elector.stop(1.0)
    assert ended == StepDown(reason="this coordinator is stopping")
    assert not elector.may_act(1.0)
    assert released == Swap(record=record("", "", 5), version="v2")
    assert not elector.is_finished
    elector.on_swapped("v3", 1.1)
    assert elector.is_finished
    assert elector.tick(50.0) == []


def test_one_that_resigns_leaves_it_to_others_for_a_lease() -> None:
    elector = candidate()
    leading(elector)
    released = record("", "", 5)
    assert elector.resign("no node", 1.0) == [StepDown(reason="no node"), Swap(record=released, version="v2")]
    elector.on_swapped("v3", 1.1)
    assert elector.tick(9.9) == [Read()]
    assert elector.on_read(seen(released, "v3"), 9.9) == []
    elector.tick(10.9)
    assert elector.on_read(seen(released, "v3"), 11.0) == [Swap(record=mine(6), version="v3")], "nobody wanted it"
