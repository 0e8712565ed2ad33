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
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # DDP and Trainers load it; once here is quicker than once a process
from torch import nn
from torch.distributed.tensor import DTensor

PARTS = ("control", "first", "second")
CHECKED = 2  # the first snapshots are committed at the next fence only


@dataclass(frozen=True, kw_only=True)
class Run:
    """One rank of one part of one case. ``die_at``: the step after which it kills itself, or 0."""

    case: str
    part: str
    rank: int
    world_size: int
    socket: str
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


def run_all(train: Callable[[Run], None], cases: Mapping[str, int], die_at: Mapping[str, int]) -> int:
    """Run each case (name → world size) with the arguments of the command line; 1 if a part failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--cases", default="")
    arguments = parser.parse_args()
    wanted = arguments.cases.split(",") if arguments.cases else list(cases)
    failures = 0
    for case in wanted:
        for part in PARTS:
            dies = die_at[case] if part == "first" else 0
            statuses = _run_part(train, case, part, cases[case], dies, arguments)
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
    children = []
    for rank in range(world_size):
        run = Run(
            case=case,
            part=part,
            rank=rank,
            world_size=world_size,
            socket=arguments.socket,
            out=arguments.out,
            die_at=dies,
        )
        children.append(_fork(train, run, port))
    return _wait(children)


def _wait(children: list[int]) -> list[int]:
    """Exit codes; when one fails, the others are killed: they would wait for it."""
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child] > 0:
            for other in set(children) - set(codes):
                os.kill(other, signal.SIGKILL)
    return [codes[child] for child in children]


def _fork(train: Callable[[Run], None], run: Run, port: int) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ["BACKSTAY_SOCKET"] = run.socket
        if run.world_size > 1:
            os.environ |= {
                "RANK": str(run.rank), "LOCAL_RANK": str(run.rank), "WORLD_SIZE": str(run.world_size),
                "LOCAL_WORLD_SIZE": str(run.world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "GLOO_SOCKET_IFNAME": "lo",
            }  # fmt: skip
        torch.set_num_threads(1)
        train(run)
        if run.part == "control" and "backstay" in sys.modules:
            raise AssertionError("the control imported backstay")
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        status = 0
    except BaseException:  # noqa: BLE001 - a forked child must end here, whatever happened
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
