"""The demo's training run for a world that shrinks: the same global batch on any number of ranks, FSDP2, or FSDP2 × TP.

Run by torchrun as a file beside train.py. Without dropout and noise a step is the same sum on any layout, but for the order of
the additions; rank 0 writes digests of the gathered full state, which do not depend on the layout.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

_TENSOR_PARALLEL_WORLD = 4  # ranks; this many train as 2 × 2: FSDP2 × TP


def _load_train() -> Any:
    """train.py beside this file; torchrun starts both as files, and the control run must import nothing of backstay."""
    spec = importlib.util.spec_from_file_location("demo_train", Path(__file__).with_name("train.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_train"] = module
    spec.loader.exec_module(module)
    return module


train = _load_train()


class SharedLoader:
    """The windows of the whole job's step, of which one data-parallel rank takes its part; the position is the same on all."""

    def __init__(self, settings: Any, *, index: int, count: int) -> None:
        self._bytes = np.fromfile(settings.text, dtype=np.uint8)
        self._settings = settings
        self._own = [sample for sample in range(settings.batch) if sample % count == index]
        self.position = 0

    @property
    def share(self) -> float:
        """Part of the global batch that this rank computes."""
        return len(self._own) / self._settings.batch

    def next_batch(self) -> torch.Tensor:
        """``[own samples, tokens + 1]`` int64."""
        rows = []
        length = self._settings.tokens + 1
        for sample in self._own:
            name = f"{train.SEED}/{self.position}/{sample}".encode()
            where = int.from_bytes(hashlib.sha256(name).digest()[:8]) % (len(self._bytes) - length)
            rows.append(self._bytes[where : where + length].astype(np.int64))
        self.position += 1
        return torch.from_numpy(np.stack(rows))

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class ElasticTraining:
    """Model, optimizer, schedule and data of one rank of a world of any size."""

    def __init__(self, settings: Any, rank: int) -> None:
        world_size = dist.get_world_size()
        torch.manual_seed(train.SEED)
        self.model = train.ByteGPT(settings)
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self._data_parallel = _shard(self.model, world_size)
        # One tensor at a time: the foreach kernels take no tensors of two meshes.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.1, foreach=False)
        warmup = max(1, settings.steps // 10)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) / warmup, 0.5 * (1.1 + math.cos(math.pi * step / settings.steps))),
        )
        ranks_per_sample = world_size // self._data_parallel
        self.loader = SharedLoader(settings, index=rank // ranks_per_sample, count=self._data_parallel)
        torch.manual_seed(train.SEED + 1 + rank)
        random.seed(train.SEED + 1 + rank)
        np.random.seed(train.SEED + 1 + rank)

    def step(self) -> float:
        """One optimizer step; returns the loss of the global batch, the same on all ranks."""
        batch = self.loader.next_batch()
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(batch[:, :-1])
        loss = nn.functional.cross_entropy(logits.reshape(-1, train.VOCABULARY), batch[:, 1:].reshape(-1))
        (loss * self.loader.share * self._data_parallel).backward()  # FSDP2 averages over the data-parallel ranks
        self.optimizer.step()
        self.scheduler.step()
        total = loss.detach().double() * self.loader.share * self._data_parallel
        dist.all_reduce(total)
        return float(total) / dist.get_world_size()

    def digests(self) -> dict[str, str]:
        """SHA-256 of the full parameters and the full optimizer state; "" on all ranks but the first. A collective."""
        parameters, optimizer, rest = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
        is_first = dist.get_rank() == 0
        for name, parameter in self.model.named_parameters():
            _update(parameters, name, parameter)
            for key, value in sorted(self.optimizer.state.get(parameter, {}).items()):
                _update(optimizer, f"{name}.{key}", value)
        state = {key: value for key, value in self.scheduler.state_dict().items() if key != "lr_lambdas"}
        rest.update(json.dumps([state, self.loader.position], sort_keys=True, default=repr).encode())
        found = {"parameters": parameters.hexdigest(), "optimizer": optimizer.hexdigest(), "rng": rest.hexdigest()}
        return found if is_first else dict.fromkeys(found, "")


def _shard(model: Any, world_size: int) -> int:
    """Cut the model for this world; returns the number of data-parallel ranks."""
    if world_size != _TENSOR_PARALLEL_WORLD:
        mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("data",))
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        for block in model.blocks:
            plan = {
                "qkv": ColwiseParallel(output_layouts=Replicate()),
                "out": RowwiseParallel(input_layouts=Replicate()),
                "mlp.0": ColwiseParallel(),
                "mlp.2": RowwiseParallel(),
            }
            parallelize_module(block, mesh["tensor"], plan)
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    return int(mesh["data"].size())


def _update(digest: Any, name: str, value: Any) -> None:
    digest.update(name.encode())
    if not isinstance(value, torch.Tensor):
        digest.update(repr(value).encode())
        return
    full = value.detach()
    if isinstance(full, DTensor):
        full = full.full_tensor()
    digest.update(f"{full.dtype}{tuple(full.shape)}".encode())
    digest.update(full.contiguous().reshape(-1).view(torch.uint8).numpy().data)


if __name__ == "__main__":
    print(f"world of {os.environ['WORLD_SIZE']}", file=sys.stderr)
    sys.exit(train.main(ElasticTraining))
