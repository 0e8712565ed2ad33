"""One small model in many parallel layouts, trained by arithmetic that no layout changes.

Gradients are a function of the parameters, element by element, so every layout trains to the same bits: what any layout holds
can be compared with what a plain process holds, without asking the product.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

WIDTH = 12


class Net(nn.Module):
    """Parts of every kind: large, odd, tied, half precision, empty on most ranks, with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, WIDTH)
        self.head = nn.Linear(WIDTH, 23, bias=False)
        self.head.weight = self.embed.weight
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.odd = nn.Linear(5, 7)
        self.big = nn.Linear(300, 301)
        self.coarse = nn.Linear(10, 11, dtype=torch.bfloat16)
        self.norm = nn.BatchNorm1d(7)
        self.short = nn.Parameter(torch.randn(2))
        self.frozen = nn.Parameter(torch.randn(9, 3), requires_grad=False)
        self.nothing = nn.Parameter(torch.empty(0, 4))


STAGES = (("embed", "head", "up"), ("down", "odd"), ("big", "coarse", "norm", "short", "frozen", "nothing"))


@dataclass
class Training:
    """One rank's model and optimizer, and the world it is in."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    groups: list[dict[str, Any]] = field(default_factory=list)

    def step(self) -> None:
        """Train by gradients that are a function of the parameters."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = (parameter.detach() * 0.5 + 0.25).to(parameter.dtype)
        self.optimizer.step()
        self.optimizer.zero_grad()


def build(kind: str, sizes: tuple[int, ...], *, seed: int = 11) -> Training:
    """A rank's part of the model in a layout, of a process group that exists already if it has several ranks.

    Args:
        kind: plain, ddp, fsdp, hsdp, tp, fsdp_tp, pipeline.
        sizes: Sizes of the mesh: (ranks,), (replicas, shards), (shards, tensor), (stages, replicas of each).
        seed: Of the initial parameters; the same on all ranks.
    """
    torch.manual_seed(seed)
    random.seed(seed)
    net = Net()
    model = _LAYOUTS[kind](net, sizes)
    rank = dist.get_rank() if dist.is_initialized() else 0
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.fill_(100.0 * rank + len(name))
        else:
            buffer.fill_(rank)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return Training(model, torch.optim.AdamW([g for g in groups if g["params"]], lr=0.05, amsgrad=True))


def _plain(net: nn.Module, sizes: tuple[int, ...]) -> nn.Module:
    return net


def _ddp(net: nn.Module, sizes: tuple[int, ...]) -> nn.Module:
    return nn.parallel.DistributedDataParallel(net)


def _fsdp(net: nn.Module, sizes: tuple[int, ...]) -> nn.Module:
    return _shard(net, init_device_mesh("cpu", sizes))


def _hsdp(net: nn.Module, sizes: tuple[int, ...]) -> nn.Module:
    return _shard(net, init_device_mesh("cpu", sizes, mesh_dim_names=("replicas", "shards")))


def _tp(net: nn.Module, sizes: tuple[int, ...]) -> nn.Module:
    return _cut_tensors(net, init_device_mesh("cpu", sizes))


def _fsdp_tp(net: nn.Module, sizes: tuple[int, ...]) -> nn.Module:
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("shards", "tensor"))
    return _shard(_cut_tensors(net, mesh["tensor"]), mesh["shards"])


def _pipeline(net: nn.Module, sizes: tuple[int, ...]) -> nn.Module:
    stages, replicas = sizes
    stage, _ = divmod(dist.get_rank(), replicas)
    kept = {name for index in range(len(STAGES)) if index * stages // len(STAGES) == stage for name in STAGES[index]}
    for name in [*net._modules, *net._parameters]:
        if name not in kept:
            delattr(net, name)
    groups = [dist.new_group([s * replicas + r for r in range(replicas)]) for s in range(stages)]
    return net if replicas == 1 else nn.parallel.DistributedDataParallel(net, process_group=groups[stage])


def _shard(net: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for part in (net.big, net.coarse):
        fully_shard(part, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def _cut_tensors(net: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(net, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


_LAYOUTS: dict[str, Callable[[nn.Module, tuple[int, ...]], nn.Module]] = {
    "plain": _plain,
    "ddp": _ddp,
    "fsdp": _fsdp,
    "hsdp": _hsdp,
    "tp": _tp,
    "fsdp_tp": _fsdp_tp,
    "pipeline": _pipeline,
}


def gathered(training: Training) -> dict[str, torch.Tensor]:
    """All parameters and optimizer state this rank knows of, whole; a collective. Buffers are left out."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in training.model.named_parameters():
        clean = name.removeprefix("module.")
        found[clean] = whole(parameter)
        for key, value in (training.optimizer.state.get(parameter) or {}).items():
            found[f"{clean}.{key}"] = whole(value)
    return found


def hyper_parameters(training: Training) -> dict[str, Mapping[str, Any]]:
    """By parameter, what its group says."""
    names = {id(p): name.removeprefix("module.") for name, p in training.model.named_parameters()}
    return {
        names[id(p)]: {key: value for key, value in group.items() if key != "params"}
        for group in training.optimizer.param_groups
        for p in group["params"]
    }


def whole(value: torch.Tensor) -> torch.Tensor:
    """A plain copy of the whole tensor; a collective."""
    full = value.full_tensor() if isinstance(value, DTensor) else value
    return full.detach().clone()
