"""Leases of nodes: silence that nobody could have heard is no silence."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from backstay.ids import Generation
from backstayd.core.inventory.nodes import Liveness, NodeTable
from backstayd.core.messages.report import NodeIdentity, NodeReport

LEASE_S = 3.0


def table_with(name: str, *, heard_s: float) -> NodeTable:
    table = NodeTable(LEASE_S)
    node = NodeIdentity(name=name, incarnation="i", bulk_address="h:1")
    table.observe(NodeReport(node=node, sequence=1, generation=Generation(1, "c")), heard_s)
    return table


@given(heard_s=st.floats(0, 2.9), away_s=st.floats(0, 1e6))
def test_a_node_is_not_lost_for_what_it_said_while_nobody_listened(heard_s: float, away_s: float) -> None:
    table = table_with("a", heard_s=LEASE_S - heard_s)
    now_s = LEASE_S + away_s
    table.excuse(away_s, now_s)
    assert table.tick(now_s) == []
    assert table.nodes["a"].liveness is not Liveness.LOST
    assert table.nodes["a"].seen_s <= now_s


@given(away=st.lists(st.floats(0, 100), max_size=6))
def test_a_node_that_stays_silent_is_lost_a_lease_of_listening_later(away: list[float]) -> None:
    table, now_s, listened_s = table_with("a", heard_s=0.0), 0.0, 0.0
    for away_s in away:
        now_s, listened_s = now_s + 0.4 + away_s, listened_s + 0.4
        table.excuse(away_s, now_s)
        assert table.tick(now_s) == []
    assert table.tick(now_s + LEASE_S - listened_s + 0.001) == ["a"]
