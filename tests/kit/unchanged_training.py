"""Trains small models in every supported wrapping and writes a digest of everything after each step.

A script: one process imports torch and forks the ranks. With ``--part control`` it never imports backstay.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.kit.adapter_runs import digest
from tests.kit.forked_ranks import fork_ranks

KINDS = {"plain": 1, "ddp": 2, "fsdp2": 2}
OPTIMIZERS = ("adamw_foreach", "adamw_fused", "sgd_momentum")
STEPS = 8


class Net(nn.Module):
    """Odd sizes (uneven shards), dropout, and batch statistics that differ between ranks."""

    def __init__(self, with_norm: bool) -> None:
        super().__init__()
        self.first = nn.Linear(13, 37)
        self.norm = nn.BatchNorm1d(37) if with_norm else nn.LayerNorm(37)
        self.drop = nn.Dropout(0.2)
        self.second = nn.Linear(37, 37)
        self.tail = nn.Linear(37, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.drop(torch.relu(self.norm(self.first(x))))
        return self.tail(torch.relu(self.second(hidden)))


def make(kind: str, name: str) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(1)
    random.seed(2)
    model: nn.Module = Net(with_norm=kind != "fsdp2")
    if kind == "ddp":
        model = DistributedDataParallel(model, broadcast_buffers=False)
    if kind == "fsdp2":
        fully_shard(model.second)
        fully_shard(model)
    if name == "sgd_momentum":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    else:
        way = {"fused": True} if name == "adamw_fused" else {"foreach": True}
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **way)
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)


def train(kind: str, name: str, part: str, socket: str) -> list[str]:
    model, optimizer, scheduler = make(kind, name)
    first, last = {"control": (0, STEPS), "first": (0, STEPS // 2), "second": (STEPS // 2, STEPS)}[part]
    keeper = None
    if part != "control":
        import backstay

        keeper = backstay.Snapshotter(
            model, optimizer, run_id=f"{kind}-{name}", socket=socket, extra={"scheduler": scheduler}, check_every=1
        )
        found = keeper.restore(deadline_s=60)
        if (found.step, found.outcome) != (first, "NONE" if part == "first" else "EXACT"):
            raise AssertionError(f"restored {found}, expected step {first}")
    digests = []
    rank = dist.get_rank() if dist.is_initialized() else 0
    for step in range(first, last):
        generator = torch.Generator().manual_seed(1000 * step + rank)
        loss = torch.zeros(())
        for _ in range(2):  # gradient accumulation
            loss = model(torch.randn(6, 13, generator=generator) * (1 + random.random())).square().mean()
            loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if keeper is not None:
            keeper.snapshot(step + 1)
        digests.append(digest(model, [optimizer], scheduler.state_dict(), loss))
    if keeper is not None:
        keeper.fence()
        keeper.wait_committed()
        stats = keeper.stats()
        if stats.committed != last - first or stats.is_synchronous:
            raise AssertionError(f"expected {last - first} commits: {stats}")
        keeper.close()
    return digests


def run_rank(kind: str, arguments: argparse.Namespace, rank: int) -> None:
    torch.set_num_threads(1)
    if KINDS[kind] > 1:
        store = f"file://{arguments.out}/{arguments.part}-{kind}.store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=KINDS[kind])
    results = {name: train(kind, name, arguments.part, arguments.socket) for name in OPTIMIZERS}
    if arguments.part == "control" and "backstay" in sys.modules:
        raise AssertionError("the control imported backstay")
    Path(arguments.out, f"{arguments.part}-{kind}-{rank}.json").write_text(json.dumps(results))
    if dist.is_initialized():
        dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", required=True)
    parser.add_argument("--socket", default="")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    codes = [code for kind, size in KINDS.items() for code in fork_ranks(size, partial(run_rank, kind, arguments))]
    return max(map(abs, codes))


if __name__ == "__main__":
    sys.exit(main())
