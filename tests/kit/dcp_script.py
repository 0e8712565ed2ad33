"""A rank that saves and loads by DCP what it is told to, and says what it saw: one JSON line for each thing done.

``python tests/kit/dcp_script.py OPTIONS`` where OPTIONS is JSON: rank, world_size, port, run_id, log, and ``do``, a list of
[verb, argument...]. The state of a step is a function of the step, so that any number of ranks knows what must come back.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import backstay.dcp
import backstay.files

warnings.filterwarnings("ignore")
DEADLINE_S = 120.0


def build(world_size: int) -> dict[str, Any]:
    """Model and optimizer state as DCP has it: FSDP2 over all ranks, of shapes that do not divide evenly."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(67, 129), torch.nn.ReLU(), torch.nn.Linear(129, 13))
    if world_size > 1:
        mesh = init_device_mesh("cpu", (world_size,))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.ones(2, 67)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optim": moments, "train": {"step": 0, "lr": 0.5, "tag": "x"}, "scale": torch.zeros(3)}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key in sorted(value):
            yield from leaves(value[key], f"{path}.{key}")


def expected(path: str, tensor: torch.Tensor, step: int) -> torch.Tensor:
    """The whole tensor of that name at that step."""
    generator = torch.Generator().manual_seed(zlib.crc32(path.encode()) + step)
    return torch.randn(tuple(tensor.shape), generator=generator).to(tensor.dtype)


def fill(state: dict[str, Any], step: int) -> None:
    """Without communication: async_save has its own under way."""
    with torch.no_grad():
        for path, tensor in leaves(state):
            whole = expected(path, tensor, step)
            if isinstance(tensor, DTensor):
                part = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
                tensor._local_tensor.copy_(part._local_tensor)
            else:
                tensor.copy_(whole)
    state["train"] = {"step": step, "lr": step / 7, "tag": f"at {step}"}


def differing(state: dict[str, Any], step: int) -> list[str]:
    found = []
    for path, tensor in leaves(state):
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if not torch.equal(whole, expected(path, tensor, step)):
            found.append(path)
    if state["train"] != {"step": step, "lr": step / 7, "tag": f"at {step}"}:
        found.append(f"train {state['train']}")
    return found


class Rank:
    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.log = Path(options["log"])
        self.state = build(options["world_size"])
        self.store = backstay.dcp.Store(run_id=options["run_id"], strict=options.get("strict", True))
        self.url = f"backstay://default/{options['run_id']}"
        self.stager = self.store.stager()

    def say(self, event: str, **facts: Any) -> None:
        with self.log.open("a") as log:
            log.write(json.dumps({"event": event, **facts}) + "\n")

    def begin(self) -> None:
        self.say("begun", step=self.store.begin())

    def begin_files(self) -> None:
        self.say("begun", step=backstay.files.begin(self.url))

    def load(self, step: int) -> None:
        fill(self.state, -1)
        dcp.load(self.state, storage_reader=self.store.reader())
        self.say("loaded", step=step, differing=differing(self.state, step))

    def load_files(self, step: int) -> None:
        fill(self.state, -1)
        dcp.load(self.state, checkpoint_id=f"{self.url}/step-{step}")
        self.say("loaded", step=step, differing=differing(self.state, step))

    def save_own(self, step: int) -> None:
        """Each rank has a branch that no other has, as pipeline stages do."""
        rank = self.options["rank"]
        own = {"layers": {str(rank): [torch.full((3,), float(rank)), {"rank": rank}]}, "step": step}
        dcp.save(own, storage_writer=self.store.writer(step))

    def load_without_template(self) -> None:
        """What dcp_to_torch_save does: the nesting comes from the checkpoint alone."""
        found: dict[str, Any] = {}
        _load_state_dict(found, self.store.reader(), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
        self.say("loaded_free", state=json.loads(json.dumps(found, default=torch.Tensor.tolist)))

    def save(self, step: int) -> None:
        fill(self.state, step)
        dcp.save(self.state, storage_writer=self.store.writer(step))
        self.say("saved", step=step)

    def save_alone(self, step: int) -> None:
        """Without any collective."""
        fill(self.state, step)
        writer = self.store.writer(step)
        dcp.save(self.state, storage_writer=writer, no_dist=True)
        self.say("saved", step=step, committed=writer.is_committed, problem=self.store.last_problem)

    def async_save(self, step: int) -> None:
        fill(self.state, step)
        future = dcp.async_save(self.state, storage_writer=self.store.writer(step), async_stager=self.stager)
        fill(self.state, -step)  # at once: what training would do
        future.result()
        self.say("saved", step=step)

    def try_save(self, step: int) -> None:
        fill(self.state, step)
        try:
            dcp.save(self.state, storage_writer=self.store.writer(step))
        except (Exception, CheckpointException) as error:  # noqa: BLE001 - the test reads it
            ours = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            self.say("refused", step=step, error=str(error), reason=getattr(ours, "reason", ""))
        else:
            self.say("saved", step=step)

    def save_until_kept(self, step: int) -> None:
        """Step after step, as training does: right after a fault a slot may not be free yet."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            self.try_save(step)
            if json.loads(self.log.read_text().splitlines()[-1])["event"] == "saved":
                break
            step += 1
            time.sleep(0.2)
        self.complete(step)

    def save_files(self, step: int) -> None:
        fill(self.state, step)
        dcp.save(self.state, checkpoint_id=f"{self.url}/step-{step}")
        self.say("saved", step=step, is_seen=fsspec.filesystem("backstay").exists(f"{self.url}/step-{step}/.metadata"))

    def async_save_files(self, step: int) -> None:
        fill(self.state, step)
        future = dcp.async_save(self.state, checkpoint_id=f"{self.url}/step-{step}")
        fill(self.state, -step)
        future.result()
        self.say("saved", step=step)

    def write_part(self, step: int) -> None:
        """What a rank has done when it dies in the middle of a save."""
        backstay.files.store_of(self.url).write(step, f"step-{step}/__0_0.distcp", b"half")
        self.say("part", step=step)

    def complete(self, step: int) -> None:
        self.say("complete", step=step, is_complete=self.store.wait_complete(step, DEADLINE_S))

    def await_file(self, path: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not Path(path).exists() and time.monotonic() < deadline:
            time.sleep(0.02)

    def finish(self) -> None:
        self.store.finish()

    def barrier(self) -> None:
        dist.barrier()


def main(options: dict[str, Any]) -> int:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{options['port']}"
    dist.init_process_group("gloo", init_method=address, rank=options["rank"], world_size=options["world_size"])
    rank = Rank(options)
    try:
        for verb, *arguments in options["do"]:
            getattr(rank, verb)(*arguments)
        rank.say("done")
    except BaseException as error:
        rank.say("failed", error=f"{type(error).__name__}: {error}")
        raise
    finally:
        rank.store.close()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
