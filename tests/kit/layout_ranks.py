"""Ranks in many layouts, one world after the other: forked from one process that has imported all and run nothing.

``python -m tests.kit.layout_ranks`` reads one JSON world a line and answers with the list of its ranks' results, so that twenty
worlds of up to six ranks cost seconds, not twenty starts of torch each.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist

import backstay.snapshotter
from tests.kit import layouts
from tests.kit.forked_ranks import fork_ranks
from tests.kit.stored import raw_bytes


class Cursor:
    """A position that is one rank's own."""

    def __init__(self, rank: int) -> None:
        self.state: dict[str, Any] = {"rank": rank, "position": 1000 + rank, "order": torch.arange(3) + rank}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class Ledger(Cursor):
    """Positions that all ranks divide among themselves."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self.state = {"samples": [rank]}

    def load_state_dicts(self, states: list[dict[str, Any]], rank: int, world_size: int) -> None:
        samples = [sample for state in states for sample in state["samples"]]
        self.state = {"samples": samples[rank::world_size]}


class Average:
    """A moving average of some parameters, cut as they are."""

    def __init__(self, training: layouts.Training, factor: float) -> None:
        parameters = dict(training.model.named_parameters())
        clean = {name.removeprefix("module."): parameter for name, parameter in parameters.items()}
        self.state = {
            name: clean[name].detach() * factor for name in ("big.weight", "up.weight", "short") if name in clean
        }

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in self.state.items():
            value.copy_(state[name])


def digest(tensor: torch.Tensor) -> str:
    """Of bytes, dtype and shape."""
    body = f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + raw_bytes(tensor)
    return hashlib.sha256(body).hexdigest()[:16]


def run_rank(order: dict[str, Any], rank: int, rendezvous: str) -> dict[str, Any]:
    """One rank's life in one world."""
    torch.set_num_threads(1)
    world_size = int(order["world_size"])
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    training = layouts.build(order["kind"], tuple(order["sizes"]), seed=order["seed"])
    if rank == order["spoilt"]:
        training.model.get_submodule("odd").double()
    torch.manual_seed(order["seed"] + 50 + rank)
    random.seed(order["seed"] + 50 + rank)
    extra: dict[str, Any] = {"cursor": Cursor(rank), "ledger": Ledger(rank), "average": Average(training, 0.5)}
    if order["do"] == "load":
        extra = {"cursor": Cursor(77), "ledger": Ledger(77), "average": Average(training, 0.0)}
        for group in training.optimizer.param_groups:
            group["lr"] = 0.7
    if order["other"] == "pipeline" or (order["kind"] == "pipeline" and order["do"] == "save"):
        extra["average"] = Cursor(0)  # each stage would have its own
    elif order["kind"] == "pipeline":
        extra["average"] = Average(layouts.Training(layouts.Net(), training.optimizer), 0.0)  # whole on each stage
    keeper = backstay.snapshotter.Snapshotter(
        training.model, training.optimizer, run_id=order["run"], socket=order["sockets"][rank], extra=extra
    )
    with keeper:
        result = keeper.restore(deadline_s=120)
        if order["do"] == "save":
            for step in (1, 2):
                training.step()
                assert keeper.snapshot(step).state == "started"
                keeper.fence()
                assert keeper.wait_committed()
            assert keeper.stats().last_committed_step == 2, keeper.stats().last_problem
        draws = [torch.rand(1).item(), random.random()]
        average = extra["average"].state if isinstance(extra["average"], Average) else {}
        answer = {
            "average": {name: digest(layouts.whole(tensor)) for name, tensor in average.items()},
            "outcome": result.outcome,
            "step": result.step,
            "is_resharded": result.is_resharded,
            "base_world_size": result.base_world_size,
            "sources": {str(key): value for key, value in result.sources.items()},
            "rng": result.rng,
            "extras": result.extras,
            "message": result.message,
            "state": {name: digest(tensor) for name, tensor in layouts.gathered(training).items()},
            "hyper": json.loads(json.dumps(layouts.hyper_parameters(training))),
            "buffers": {n.removeprefix("module."): b.flatten()[0].item() for n, b in training.model.named_buffers()},
            "draws": draws,
            "cursor": {k: v if k != "order" else v.tolist() for k, v in extra["cursor"].state.items()},
            "ledger": extra["ledger"].state["samples"],
        }
        training.step()  # what is restored must train on as if nothing had happened
        answer["next"] = {name: digest(tensor) for name, tensor in layouts.gathered(training).items()}
    if world_size > 1:
        dist.destroy_process_group()
    return answer


def run_world(order: dict[str, Any]) -> list[dict[str, Any]]:
    """Fork the ranks and wait for their results; an error is one with the key ``error``."""
    with tempfile.TemporaryDirectory() as directory:

        def run(rank: int) -> None:
            try:
                answer = run_rank(order, rank, str(Path(directory, "rendezvous")))
            except BaseException as error:  # noqa: BLE001 - the parent tells the test
                answer = {
                    "error": f"{type(error).__name__}: {error}",
                    "reason": getattr(error, "reason", ""),
                    "trace": traceback.format_exc(),
                }
            Path(directory, f"result-{rank}").write_text(json.dumps(answer))

        fork_ranks(int(order["world_size"]), run)
        paths = [Path(directory, f"result-{rank}") for rank in range(int(order["world_size"]))]
        return [json.loads(p.read_text()) if p.exists() else {"error": "the rank was killed"} for p in paths]


def main() -> None:
    """One world a line."""
    for line in sys.stdin:
        print(json.dumps(run_world(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
