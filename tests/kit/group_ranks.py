"""Four ranks of which two and two train a model of their own, each pair a run; restarted, they go on from their snapshots.

A script: ``--out DIR --socket PATH``. Writes ``<rank>.json``: what was restored, digests of the trained and the restored
state, and what a model on other ranks than the group's is told.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import backstay
from backstay.errors import UsageError
from tests.kit.forked_ranks import fork_ranks

GROUPS = {"ddp": (0, 2), "fsdp2": (1, 3)}
RANKS = 4


def make(kind: str, group: dist.ProcessGroup) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model: nn.Module = nn.Sequential(nn.Linear(13, 36), nn.BatchNorm1d(36), nn.Linear(36, 8))
    if kind == "ddp":
        model = DistributedDataParallel(model, process_group=group, broadcast_buffers=False)
    else:
        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return [float(t.detach().double().abs().sum()) for t in local]


def train(kind: str, group: dist.ProcessGroup, socket: str) -> dict[str, Any]:
    model, optimizer = make(kind, group)
    with backstay.Snapshotter(model, optimizer, run_id=kind, socket=socket, process_group=group) as keeper:
        first = keeper.restore(deadline_s=60)
        for step in range(1, 4):
            optimizer.zero_grad()
            torch.manual_seed(100 * dist.get_rank() + step)
            model(torch.randn(6, 13)).sum().backward()
            optimizer.step()
            keeper.snapshot(step)
        keeper.fence()
        assert keeper.wait_committed()
        trained = digest(model, optimizer)
    dist.barrier(group)
    model, optimizer = make(kind, group)
    with backstay.Snapshotter(model, optimizer, run_id=kind, socket=socket, process_group=group) as keeper:
        second = keeper.restore(deadline_s=60)
        restored = digest(model, optimizer)
    return {
        "outcomes": [first.outcome, second.outcome],
        "step": second.step,
        "trained": trained,
        "restored": restored,
    }


def foreign(socket: str, others: dist.ProcessGroup, own: dist.ProcessGroup) -> str:
    """What restore() says of a model that spreads over all ranks, under a group of two."""
    model = DistributedDataParallel(nn.Linear(3, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        backstay.Snapshotter(model, optimizer, run_id="other", socket=socket, process_group=own).restore(deadline_s=5)
    except UsageError as error:
        return str(error)
    return ""


def run(rank: int, arguments: argparse.Namespace) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{arguments.out}/store", rank=rank, world_size=RANKS)
    groups = {kind: dist.new_group(list(ranks)) for kind, ranks in GROUPS.items()}
    own = next(kind for kind, ranks in GROUPS.items() if rank in ranks)
    other = next(kind for kind in GROUPS if kind != own)
    found = train(own, groups[own], arguments.socket)
    dist.barrier()
    found["foreign_model"] = foreign(arguments.socket, groups[other], groups[own])
    try:
        model, optimizer = nn.Linear(1, 1), torch.optim.SGD([nn.Parameter(torch.zeros(1))])
        backstay.Snapshotter(model, optimizer, run_id="x", process_group=groups[other])
    except UsageError as error:
        found["not_in_group"] = error.reason
    (Path(arguments.out) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--socket", required=True)
    arguments = parser.parse_args()
    return max(fork_ranks(RANKS, lambda rank: run(rank, arguments)))


if __name__ == "__main__":
    sys.exit(main())
