"""One rank of a training whose loop is the code block of README.md, as it stands there.

``python tests/kit/recipe_rank.py OPTIONS`` where OPTIONS is JSON: recipe (a file with the block), rank, world_size, port, out
(a file for the result), hold (a step that is never trained: the process waits there to be killed; 0: none), is_attached (false:
``backstay`` is a stand-in that does nothing, the control run), loader (``plain`` or ``stateful``). FSDP2 where there are
several ranks; dropout; needs torch and nothing else.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import random
import signal
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SAMPLES, BATCH, EPOCHS, WIDTH = 40, 2, 3, 32


class NeverAttached:
    """What a Snapshotter looks like to a script that has none."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.values: dict[str, Any] = {}

    def restore(self) -> Any:
        return types.SimpleNamespace(step=0)

    def snapshot(self, step: int) -> None:
        """Nothing is kept."""

    def finish(self) -> None:
        """Nothing is freed."""


class Samples(torch.utils.data.Dataset[torch.Tensor]):
    """A part of the data for each rank."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.linspace(-1, 1, WIDTH) * (index + 1) / SAMPLES + self._rank


def make_model(world_size: int) -> torch.nn.Module:
    model = torch.nn.Sequential(
        torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.Dropout(0.2), torch.nn.ReLU(), torch.nn.Linear(4 * WIDTH, WIDTH)
    )
    if world_size > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world_size,))
        for layer in (model[0], model[3]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def make_loader(kind: str, rank: int) -> Any:
    if kind == "plain":
        return torch.utils.data.DataLoader(Samples(rank), batch_size=BATCH, shuffle=True)
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(Samples(rank), batch_size=BATCH, shuffle=True)


def digest(model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> str:
    """SHA-256 over this rank's parts of parameters and optimizer state, the schedule and the generators."""
    total = hashlib.sha256()

    def add(tensor: torch.Tensor) -> None:
        local = getattr(tensor, "_local_tensor", tensor).detach().contiguous()
        total.update(bytes(local.reshape(-1).view(torch.uint8).tolist()))

    for parameter in model.parameters():
        add(parameter)
        for value in optimizer.state[parameter].values():
            add(value)
    add(torch.get_rng_state())
    total.update(json.dumps([scheduler.state_dict(), repr(random.getstate())], sort_keys=True).encode())
    return total.hexdigest()


def main(options: dict[str, Any]) -> int:
    rank, world_size = options["rank"], options["world_size"]
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if world_size > 1:
        where = f"tcp://127.0.0.1:{options['port']}"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world_size)
    torch.manual_seed(7 + rank)
    random.seed(7 + rank)
    model = make_model(world_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    loader = make_loader(options["loader"], rank)
    if options["is_attached"]:
        backstay: Any = importlib.import_module("backstay")
    else:
        backstay = types.SimpleNamespace(Snapshotter=NeverAttached)
    trained: list[Any] = []

    def train_one_step(batch: torch.Tensor) -> None:
        if options["hold"] and scope["step"] + 1 == options["hold"]:
            signal.pause()
        trained.append([scope["step"], scope["epoch"], batch[:, -1].tolist()])
        loss = (model(batch) - batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    scope: dict[str, Any] = {
        "model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader, "epochs": EPOCHS,
        "train_one_step": train_one_step,
    }  # fmt: skip
    sys.modules["backstay"] = backstay
    exec(compile(Path(options["recipe"]).read_text(), "README.md", "exec"), scope)
    modules = sorted({name.partition(".")[0] for name in sys.modules})
    found = {"digest": digest(model, optimizer, scheduler), "trained": trained, "modules": modules}
    Path(options["out"]).write_text(json.dumps(found))
    if world_size > 1:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
