"""Two ranks whose wrappers show other names or other parameters than they train: what comes back is what each rank had."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import backstay
from tests.kit.local_daemon import LocalDaemon

WIDTH = 256  # so that replicas would divide a weight


class Experts(nn.Module):
    """Of each rank its own, beside a part that all have."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.dense = nn.Linear(WIDTH, WIDTH)
        torch.manual_seed(seed)
        self.expert = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(self.expert(x))


class Adapted(nn.Module):
    """Frozen at the root, which FSDP2 leaves unsharded after a forward without backward."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.trained = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.trained(self.frozen(x))


def build(kind: str, seed: int) -> nn.Module:
    if kind == "unsharded":
        model: nn.Module = Adapted(seed)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
        fully_shard(model.trained, mp_policy=policy)
        return fully_shard(model, mp_policy=policy)
    model = Experts(seed)
    model = (
        nn.Sequential(checkpoint_wrapper(model)) if kind == "checkpointed" else torch.compile(model, backend="eager")
    )
    names = [name for name, _ in model.named_parameters() if "expert" in name]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return DistributedDataParallel(model)


def evaluate(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.ones(1, WIDTH))


def whole(model: nn.Module) -> list[torch.Tensor]:
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]


def train_and_restore(rank: int, directory: str, socket: str, kind: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    seed = 20 if kind == "unsharded" else 20 + rank
    model, fresh = build(kind, seed), build(kind, seed + 50)
    optimizer, fresh_optimizer = (
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad]) for m in (model, fresh)
    )
    with backstay.Snapshotter(model, optimizer, run_id="r", socket=socket) as keeper:
        keeper.restore()
        for step in (1, 2, 3):
            model(torch.rand(4, WIDTH)).sum().backward()
            optimizer.step()
            evaluate(model)
            assert keeper.snapshot(step).state == "started"
            model(torch.rand(4, WIDTH)).sum().backward()  # frees what the evaluation had gathered
            keeper.fence()
            assert keeper.wait_committed()
        assert keeper.stats().last_committed_step == 3, keeper.stats().last_problem
        dist.barrier()
    evaluate(fresh)  # as a sanity check before training does
    with backstay.Snapshotter(fresh, fresh_optimizer, run_id="r", socket=socket) as keeper:
        assert keeper.restore().step == 3
    assert torch.equal(evaluate(model), evaluate(fresh))
    assert all(map(torch.equal, whole(model), whole(fresh)))
    pairs = zip(optimizer.state.values(), fresh_optimizer.state.values(), strict=True)
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in pairs)
    Path(directory, f"same-{rank}").touch()
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["unsharded", "checkpointed", "compiled"])
def test_each_rank_gets_back_what_it_trained_whatever_its_wrappers_show(kind: str, tmp_path: Path) -> None:
    with LocalDaemon() as daemon:
        multiprocessing.spawn(train_and_restore, (str(tmp_path), daemon.socket_path, kind), nprocs=2)
    assert sorted(path.name for path in tmp_path.glob("same-*")) == ["same-0", "same-1"]
