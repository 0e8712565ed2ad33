"""A rank that cannot load a snapshot of another layout: all ranks of its world raise with its reason, none waits for it."""

from __future__ import annotations

from pathlib import Path

from tests.kit.layout_world import LayoutRanks
from tests.kit.local_daemon import LocalDaemon


def test_a_rank_that_cannot_load_another_layout_ends_the_restore_of_all(tmp_path: Path) -> None:
    ranks = LayoutRanks(tmp_path / "ranks.log")
    try:
        with LocalDaemon() as daemon:
            sockets = [daemon.socket_path] * 2
            ranks.run("save", ("plain", (1,)), "r", sockets, seed=3)
            answers = ranks.run("load", ("tp", (2,)), "r", sockets, seed=4, other="plain", spoilt=1)
    finally:
        ranks.close()
    assert answers[1]["reason"] == "wrong_model", answers[1]
    assert "model.odd.bias: (7,) torch.float32 in the snapshot, (7,) torch.float64 here" in answers[1]["error"]
    assert answers[0]["reason"] == "gate_failed", answers[0]
    assert "model.odd.bias" in answers[0]["error"]
