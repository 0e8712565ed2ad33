"""Every layout restores from every kind of other layout and from its own, bit for bit, on real daemons, with all nodes and
with one lost.

A row of ``PAIRS`` is one source and one target; ``HARMS`` says what happens to the cluster between the two (a durable copy
alone would be another one). What must come out is what a plain process holds that was never restored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from backstay.testing import LocalCluster
from tests.kit.layout_world import Layout, LayoutRanks
from tests.kit.light_world import wait_protected

PLAIN: Layout = ("plain", (1,))
PAIRS: list[tuple[Layout, Layout]] = [
    (PLAIN, ("ddp", (2,))),
    (PLAIN, ("fsdp", (3,))),
    (PLAIN, ("tp", (2,))),
    (PLAIN, ("pipeline", (3, 1))),
    (("ddp", (3,)), PLAIN),
    (("ddp", (3,)), ("ddp", (5,))),
    (("ddp", (3,)), ("fsdp_tp", (2, 2))),
    (("fsdp", (4,)), ("fsdp", (3,))),
    (("fsdp", (4,)), ("fsdp", (5,))),
    (("fsdp", (4,)), PLAIN),
    (("fsdp", (4,)), ("hsdp", (2, 2))),
    (("fsdp", (4,)), ("ddp", (4,))),
    (("hsdp", (2, 2)), ("fsdp", (6,))),
    (("hsdp", (2, 2)), ("tp", (4,))),
    (("tp", (2,)), PLAIN),
    (("tp", (2,)), ("fsdp_tp", (2, 3))),
    (("fsdp_tp", (2, 2)), ("fsdp_tp", (3, 2))),
    (("fsdp_tp", (2, 2)), ("fsdp", (5,))),
    (("fsdp_tp", (2, 2)), ("pipeline", (2, 2))),
    (("pipeline", (3, 1)), PLAIN),
    (("pipeline", (3, 1)), ("pipeline", (2, 2))),
    (("pipeline", (2, 2)), ("pipeline", (3, 2))),
    (("pipeline", (2, 2)), ("fsdp", (2,))),
    (("fsdp", (4,)), ("fsdp", (4,))),  # as it was: some ranks hold nothing of a short parameter
    (("hsdp", (2, 3)), ("hsdp", (2, 3))),
]
AFTER_A_LOSS = [0, 4, 7, 9, 13, 17, 20, 22, 23]  # rows of PAIRS that are tried again when a node is lost
NODES = 3


def name_of(layout: Layout) -> str:
    return f"{layout[0]}-{'x'.join(map(str, layout[1]))}"


def everything_of(answers: list[dict[str, Any]], key: str) -> dict[str, str]:
    """What the ranks hold, united; ranks that hold the same thing must hold the same bytes."""
    united: dict[str, str] = {}
    for answer in answers:
        for name, digest in answer[key].items():
            assert united.setdefault(name, digest) == digest, f"{name} differs between ranks"
    return united


def check(
    answers: list[dict[str, Any]], source: list[dict[str, Any]], plain: list[dict[str, Any]], *, is_other: bool
) -> None:
    """All that a restored world must be; ``is_other``: in another layout than the source's."""
    assert everything_of(answers, "state") == everything_of(plain, "state")
    assert everything_of(answers, "next") == everything_of(plain, "next"), "it does not train on as the plain one"
    old, new = len(source), len(answers)
    hyper = {name: values for answer in plain for name, values in answer["hyper"].items()}
    for rank, answer in enumerate(answers):
        assert (answer["outcome"], answer["step"], answer["base_world_size"]) == ("EXACT", 2, old)
        assert answer["is_resharded"] == is_other
        assert all(values == hyper[name] for name, values in answer["hyper"].items())
        logical = rank % old
        assert answer["cursor"] == source[logical]["cursor"]
        for name, value in answer["buffers"].items():
            holders = [r for r, other in enumerate(source) if name in other["buffers"]]
            expected = logical if logical in holders else holders[rank % len(holders)]
            assert value == source[expected]["buffers"][name], name
        assert answer["average"].items() <= everything_of(plain, "average").items()
        if rank < old:
            assert answer["draws"] == source[rank]["draws"]
    assert len({tuple(answer["draws"]) for answer in answers}) == new, "each stream is owned by one rank"
    samples = sorted(sample for answer in answers for sample in answer["ledger"])
    assert samples == list(range(old)) if old != new else True
    assert all(answer["sources"] for answer in answers)


def nothing_happens(cluster: LocalCluster) -> list[int]:
    return list(range(NODES))


def a_node_is_lost(cluster: LocalCluster) -> list[int]:
    cluster.destroy_node(1)
    return [0, 2]


HARMS: dict[str, tuple[Callable[[LocalCluster], list[int]], list[int]]] = {
    "all_nodes": (nothing_happens, list(range(len(PAIRS)))),
    "one_node_lost": (a_node_is_lost, AFTER_A_LOSS),
}


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[LayoutRanks]:
    running = LayoutRanks(tmp_path / "ranks.log")
    yield running
    running.close()


@pytest.mark.parametrize("harm", HARMS)
def test_every_layout_restores_from_every_kind_of_other(ranks: LayoutRanks, harm: str) -> None:
    apply, rows = HARMS[harm]
    pairs = [PAIRS[row] for row in rows]
    with LocalCluster(nodes=NODES, parity=1, group_size=NODES, lease_s=1.0) as cluster:
        saved: dict[Layout, list[dict[str, Any]]] = {}
        for source in dict.fromkeys([PLAIN, *(source for source, _ in pairs)]):
            run = name_of(source)
            sockets = [str(cluster.nodes[rank % NODES].socket) for rank in range(math.prod(source[1]))]
            saved[source] = ranks.run("save", source, run, sockets, seed=11)
            assert everything_of(saved[source], "state") == everything_of(saved[PLAIN], "state")
            wait_protected(cluster, f"default/{run}", 2)
        left = apply(cluster)
        for source, target in pairs:
            sockets = [str(cluster.nodes[left[rank % len(left)]].socket) for rank in range(math.prod(target[1]))]
            print(f"{name_of(source)} -> {name_of(target)}", flush=True)
            answers = ranks.run("load", target, name_of(source), sockets, seed=99, other=source[0])
            check(answers, saved[source], saved[PLAIN], is_other=source != target)
