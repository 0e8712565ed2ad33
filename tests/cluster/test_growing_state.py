"""State that changes its size from step to step: the slot that was reserved ahead is exchanged, and no snapshot is lost."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from backstay import Snapshotter  # noqa: E402
from backstay.testing.cluster import LocalCluster  # noqa: E402


class Breathing:
    """Something whose tensors come and go, such as a buffer of samples that is used up."""

    def __init__(self) -> None:
        self.tensors: list[Any] = []

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": self.tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tensors = state["tensors"]


def test_every_step_is_kept_though_the_shard_grows_and_shrinks() -> None:
    model = torch.nn.Linear(16, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    breathing = Breathing()
    with (
        LocalCluster(1, parity=0, group_size=1, lease_s=2.0) as cluster,
        Snapshotter(
            model, optimizer, run_id="breathing", socket=str(cluster.nodes[0].socket), extra={"samples": breathing}
        ) as keeper,
    ):
        keeper.restore()
        for step in range(1, 9):
            optimizer.zero_grad()
            model(torch.randn(4, 16)).sum().backward()
            optimizer.step()
            breathing.tensors = [torch.full((1000, step % 3 + 1), float(step))] * (step % 4)
            assert keeper.snapshot(step).state == "started"
            keeper.fence()
            assert keeper.wait_committed()
        stats = keeper.stats()
        assert (stats.committed, stats.skipped, stats.abandoned, stats.last_committed_step) == (8, 0, 0, 8), stats
