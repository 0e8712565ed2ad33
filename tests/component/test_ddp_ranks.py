"""Four ranks of DDP: what docs/trainer.md says about going on bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import backstay
from tests.kit.local_daemon import LocalDaemon

RANKS, WIDTH, RESTORED, LAST = 4, 61, 3, 5


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(4)]
    model = DistributedDataParallel(nn.Sequential(*layers), find_unused_parameters=True)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int) -> list[torch.Tensor]:
    torch.manual_seed(100 * step + rank)
    model(torch.randn(8, WIDTH)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


def train_and_restart(rank: int, directory: str, socket: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=RANKS)
    expected: list[list[torch.Tensor]] = []
    model, optimizer = build()
    with backstay.Snapshotter(model, optimizer, run_id="r", socket=socket) as keeper:
        keeper.restore()
        for step in range(1, LAST + 1):
            expected.append(train(model, optimizer, rank, step))
            if step <= RESTORED:
                keeper.snapshot(step)
                keeper.fence()
                assert keeper.wait_committed()
        dist.barrier()
    model, optimizer = build()
    with backstay.Snapshotter(model, optimizer, run_id="r", socket=socket) as keeper:
        assert keeper.restore().step == RESTORED
        for step in range(RESTORED + 1, LAST + 1):
            assert all(map(torch.equal, train(model, optimizer, rank, step), expected[step - 1]))
    Path(directory, f"same-{rank}").touch()
    dist.destroy_process_group()


def test_four_ranks_of_ddp_that_keep_their_first_buckets_go_on_bit_for_bit(tmp_path: Path) -> None:
    with LocalDaemon() as daemon:
        multiprocessing.spawn(train_and_restart, (str(tmp_path), daemon.socket_path), nprocs=RANKS)
    assert len(list(tmp_path.glob("same-*"))) == RANKS
