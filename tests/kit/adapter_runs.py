"""Runs one training three times in forked processes: never attached, attached and killed, and started again.

For the scripts of the adapters' tests, which import their framework once and call :func:`run_all`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # DDP and Trainers load it; once here is quicker than once a process
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset, IterableDataset

from tests.kit.forked_ranks import fork_ranks

PARTS = ("control", "first", "second")
CHECKED = 2  # the first snapshots are committed at the next fence only


@dataclass(frozen=True, kw_only=True)
class Run:
    """One rank of one part of one case. ``die_at``: the step after which it kills itself, or 0."""

    case: str
    part: str
    rank: int
    world_size: int
    out: Path
    die_at: int

    @property
    def is_attached(self) -> bool:
        return self.part != "control"

    @property
    def run_id(self) -> str:
        return f"{self.out.name}-{self.case}"  # the names of finished runs are not used again

    def log(self, **line: Any) -> None:
        with open(self.out / f"{self.case}-{self.part}-{self.rank}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def settle(self, step: int, keeper: Any) -> None:
        """Wait until this step is committed; at the step that is due, SIGKILL to this process once every rank's is."""
        if not step or not self.die_at:
            return
        if keeper.stats().started > CHECKED:
            assert keeper.wait_committed()
        if step != self.die_at:
            return
        (self.out / f"{self.case}-ready-{self.rank}").touch()
        deadline = time.monotonic() + 60
        while not all((self.out / f"{self.case}-ready-{rank}").exists() for rank in range(self.world_size)):
            assert time.monotonic() < deadline, "another rank never came to the step at which all are killed"
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)


class Noisy(Dataset[torch.Tensor]):
    """Draws from the generators of its process for each item, as augmentations do."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((4,), float(index)) + torch.randn(4) * random.random()


class Stream(IterableDataset[torch.Tensor]):
    """The same without an index."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __iter__(self) -> Iterator[torch.Tensor]:
        for index in range(self._count):
            yield torch.full((4,), float(index)) + torch.randn(4)


def digest(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], *others: Any) -> str:
    """SHA-256 over this rank's parts of parameters, buffers, optimizer state, all generators and ``others``."""
    total = hashlib.sha256()

    def add(value: Any) -> None:
        value = value._local_tensor if isinstance(value, DTensor) else value
        if isinstance(value, torch.Tensor):
            value = value.detach().contiguous()
            total.update(value.view(torch.uint8 if value.ndim else value.dtype).numpy().tobytes())
        elif isinstance(value, Mapping):
            for key, item in sorted(value.items(), key=lambda pair: str(pair[0])):
                add(str(key))
                add(item)
        else:
            total.update(repr(value).encode())

    for tensor in (*model.parameters(), *model.buffers()):
        add(tensor)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            add({key: value for key, value in group.items() if key != "params"})
            for parameter in group["params"]:
                add(optimizer.state[parameter])
    add(torch.get_rng_state())
    add(random.getstate())
    for other in others:
        add(other)
    return total.hexdigest()


def steps_of(out: Path, case: str, part: str, rank: int) -> dict[int, str]:
    """Step → digest, as a part logged them."""
    return {line["step"]: line["digest"] for line in lines_of(out, case, part, rank) if "digest" in line}


def lines_of(out: Path, case: str, part: str, rank: int) -> list[dict[str, Any]]:
    text = (out / f"{case}-{part}-{rank}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def run_all(train: Callable[[Run], None], cases: Mapping[str, tuple[int, int]]) -> int:
    """Run each case (name → world size, step to die after) with the arguments of the command line; 1 if a part failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--cases", default="")
    arguments = parser.parse_args()
    wanted = arguments.cases.split(",") if arguments.cases else list(cases)
    failures = 0
    for case in wanted:
        for part in PARTS:
            world_size, die_at = cases[case]
            dies = die_at if part == "first" else 0
            statuses = _run_part(train, case, part, world_size, dies, arguments)
            expected = [-signal.SIGKILL] if dies else [0]
            if any(status not in expected for status in statuses):
                print(f"{case}, {part}: ended with {statuses}, expected {expected}", file=sys.stderr)
                failures += 1
                break
    return 1 if failures else 0


def _run_part(
    train: Callable[[Run], None], case: str, part: str, world_size: int, dies: int, arguments: argparse.Namespace
) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run_rank(rank: int) -> None:
        os.environ["BACKSTAY_SOCKET"] = arguments.socket
        if world_size > 1:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "GLOO_SOCKET_IFNAME": "lo",
                "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        torch.set_num_threads(1)
        train(Run(case=case, part=part, rank=rank, world_size=world_size, out=arguments.out, die_at=dies))
        if part == "control" and "backstay" in sys.modules:
            raise AssertionError("the control imported backstay")
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    return fork_ranks(world_size, run_rank)
