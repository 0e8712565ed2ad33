"""Four ranks in several wrappings make statements of what they hold: as it is, and with something changed on one of them.

A script: ``--out DIR --socket PATH``. Writes ``<kind>-<rank>.json``: entries by variant, and the collectives of restore().
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import backstay
from backstay.format import json_records
from backstay.protocol import messages
from backstay.restore import gate_statements, load
from backstay.trainer import local_tensors, optimizer_state
from backstay.trainer.process_group import current_world
from tests.kit.forked_ranks import fork_ranks

KINDS = ("ddp", "fsdp2", "hsdp", "fsdp2_tp")
VARIANTS = ("clean", "bit", "steps", "moments", "model", "statistic")
RANKS = 4


class Collectives(TorchDispatchMode):
    """Names of the collectives that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def make(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model: nn.Module = nn.Sequential(nn.Linear(13, 36), nn.ReLU(), nn.Linear(36, 8))
    if kind == "ddp":
        model = DistributedDataParallel(model)
    elif kind == "fsdp2":
        fully_shard(model)
    elif kind == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model, mesh=mesh["data"])
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    generator = torch.Generator().manual_seed(5)
    model(torch.randn(6, 13, generator=generator)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def change(variant: str, rank: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """On the last rank: one bit of a weight, one counter, the moments of one parameter, or the model itself."""
    parameter = next(iter(model.parameters()))
    if rank != RANKS - 1:
        return
    if variant == "bit":
        values = parameter._local_tensor if isinstance(parameter, DTensor) else parameter.data
        values.view(torch.int32).view(-1)[3] ^= 1
    elif variant == "steps":
        optimizer.state[parameter]["step"] -= 1
    elif variant == "model":
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        inner.register_parameter("more", nn.Parameter(torch.zeros(3)))
    elif variant == "moments":
        del optimizer.state[parameter]["exp_avg"]


def state(kind: str, socket: str) -> dict[str, Any]:
    model, optimizer = make(kind)
    with backstay.Snapshotter(model, optimizer, run_id=kind, socket=socket) as keeper:
        keeper.restore(deadline_s=60)
        step(model, optimizer)
        keeper.snapshot(1)
        keeper.fence()
        assert keeper.wait_committed()
    dist.barrier()
    found: dict[str, Any] = {}
    place = current_world()
    for variant in VARIANTS:
        model, optimizer = make(kind)
        with backstay.Snapshotter(model, optimizer, run_id=kind, socket=socket) as keeper:
            with Collectives() as seen:
                assert keeper.restore(deadline_s=60).step == 1
            found["collectives"] = seen.names
            if variant == "statistic":  # of this rank's part alone, as some optimizers keep
                for parameter in model.parameters():
                    optimizer.state[parameter]["rms"] = torch.tensor(0.5 + place.rank)
            holdings = local_tensors.collect(model, [optimizer], rank=place.rank)
            target = load.Target(
                model=model,
                optimizers=[optimizer],
                extra={},
                rank=place.rank,
                world_size=place.size,
                run="r",
                signature="s",
            )
            loaded = load.Loaded(description=optimizer_state.describe([optimizer], holdings), streams=(place.rank,))
            change(variant, place.rank, model, optimizer)
            try:
                made = gate_statements.make(target, messages.Restored(outcome="EXACT", attempt=2, step=1), loaded)
                found[variant] = [json_records.to_json(statement.entry()) for statement in made]
            except backstay.errors.IntegrityError as error:
                found[variant] = str(error)
        dist.barrier()
    return found


def run(rank: int, arguments: argparse.Namespace) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{arguments.out}/store", rank=rank, world_size=RANKS)
    for kind in KINDS:
        (Path(arguments.out) / f"{kind}-{rank}.json").write_text(json.dumps(state(kind, arguments.socket)))
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--socket", required=True)
    arguments = parser.parse_args()
    return max(fork_ranks(RANKS, lambda rank: run(rank, arguments)))


if __name__ == "__main__":
    sys.exit(main())
