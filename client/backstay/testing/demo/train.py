"""The training run of the demo: a byte-level GPT under FSDP2, deterministic to the bit, with or without backstay.

Started by torchrun as a file. Settings come from the environment (``DEMO_SETTINGS``, a JSON object). The control run
must never import backstay, so the import is inside the branch that protects the run. Every rank appends JSON lines to a
own file: what it computed, for the harness to compare.

A world that shrinks trains the same global batch on any number of ranks, FSDP2 or FSDP2 × TP (:class:`ElasticTraining`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

VOCABULARY: Final = 256
SEED: Final = 20260117
GATE_DEADLINE_S: Final = 600.0
TENSOR_PARALLEL_WORLD: Final = 4  # ranks; a world that may shrink trains as 2 × 2 with this many: FSDP2 × TP


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings from the harness, the same for every rank."""

    steps: int
    d_model: int
    layers: int
    heads: int
    tokens: int
    batch: int
    text: str
    notes_dir: str
    run_id: str = ""  # "" = control run
    may_shrink: bool = False
    gate_file: str = ""  # contains the last step that may be computed for now; "" = no limit
    restore_deadline_s: float = 300.0


class Block(nn.Module):
    """Pre-norm attention and MLP with dropout; ``[batch, tokens, d_model]`` in and out."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)
        self.norm_2 = nn.LayerNorm(d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(batch, tokens, 3, self.heads, width // self.heads).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(width // self.heads)
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        weights = self.dropout(scores.masked_fill(~mask, float("-inf")).softmax(-1))
        mixed = torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, tokens, width)
        x = x + self.dropout(self.out(mixed))
        return x + self.dropout(self.mlp(self.norm_2(x)))


class ByteGPT(nn.Module):
    """Next-byte prediction: ``[batch, tokens]`` of int64 in, logits ``[batch, tokens, 256]`` out."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, settings.d_model)
        self.position = nn.Parameter(torch.zeros(settings.tokens, settings.d_model))
        self.blocks = nn.ModuleList(Block(settings.d_model, settings.heads) for _ in range(settings.layers))
        self.norm = nn.LayerNorm(settings.d_model)
        self.head = nn.Linear(settings.d_model, VOCABULARY, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.embedding(ids) + self.position)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class TextLoader:
    """Windows of real text; which ones follows from position and row alone. Its position is state that a restore brings back.

    Args:
        rows: Names of the windows of a step that this rank takes.
        has_noise: Two choices of each batch come from global RNGs, so that both of them matter.
    """

    def __init__(self, settings: Settings, rows: Sequence[str], *, has_noise: bool) -> None:
        self._bytes = np.fromfile(settings.text, dtype=np.uint8)
        self._length = settings.tokens + 1
        self._rows = rows
        self._has_noise = has_noise
        self.position = 0

    def next_batch(self) -> torch.Tensor:
        """``[rows, tokens + 1]`` int64."""
        windows = []
        for row in self._rows:
            name = f"{SEED}/{self.position}/{row}".encode()
            where = int.from_bytes(hashlib.sha256(name).digest()[:8]) % (len(self._bytes) - self._length)
            windows.append(self._bytes[where : where + self._length].astype(np.int64))
        self.position += 1
        batch = np.stack(windows)
        if self._has_noise:
            batch[:, random.randrange(self._length)] = np.random.randint(0, VOCABULARY)
        return torch.from_numpy(batch)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Notes:
    """One rank's lines; each is a single append, so that a SIGKILL tears at most the last one."""

    def __init__(self, settings: Settings, rank: int) -> None:
        path = Path(settings.notes_dir, f"rank-{rank:05d}.jsonl")
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, kind: str, **fields: Any) -> None:
        line = json.dumps({"kind": kind, "time_unix_s": time.time(), **fields}) + "\n"
        os.write(self._fd, line.encode())


class Training:
    """Model, optimizer, schedule and data of one rank."""

    learning_rate = 3e-3
    foreach: bool | None = None

    def __init__(self, settings: Settings, rank: int) -> None:
        torch.manual_seed(SEED)  # every rank draws the same full parameters and keeps its shard of them
        self.model = ByteGPT(settings)
        self._shard()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.learning_rate, weight_decay=0.1, foreach=self.foreach
        )
        warmup = max(1, settings.steps // 10)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) / warmup, 0.5 * (1.1 + math.cos(math.pi * step / settings.steps))),
        )
        self.loader = self._make_loader(settings, rank)
        torch.manual_seed(SEED + 1 + rank)
        random.seed(SEED + 1 + rank)
        np.random.seed(SEED + 1 + rank)

    def _shard(self) -> None:
        for block in self.model.blocks:
            fully_shard(block)
        fully_shard(self.model)

    def _make_loader(self, settings: Settings, rank: int) -> TextLoader:
        return TextLoader(settings, [f"{rank}/{row}" for row in range(settings.batch)], has_noise=True)

    def step(self) -> float:
        """One optimizer step; returns this rank's loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        return float(loss.item())

    def _loss(self) -> torch.Tensor:
        batch = self.loader.next_batch()
        logits = self.model(batch[:, :-1])
        return nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), batch[:, 1:].reshape(-1))

    def digests(self) -> dict[str, str]:
        """SHA-256 of the parameters, the optimizer state, and RNGs with schedule and data position."""
        parameters, optimizer, rest = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            _update(parameters, name, self._digested(parameter.detach()))
            for key, value in sorted(self.optimizer.state.get(parameter, {}).items()):
                _update(optimizer, f"{name}.{key}", self._digested(value))
        for group in self.optimizer.param_groups:
            settings = {key: value for key, value in group.items() if key != "params"}
            optimizer.update(json.dumps(settings, sort_keys=True, default=repr).encode())
        state = {key: value for key, value in self.scheduler.state_dict().items() if key != "lr_lambdas"}
        rest.update(json.dumps([state, self.loader.position, self._rng_state()], sort_keys=True, default=repr).encode())
        return {"parameters": parameters.hexdigest(), "optimizer": optimizer.hexdigest(), "rng": rest.hexdigest()}

    def _digested(self, value: Any) -> Any:
        """What of a tensor's value the digests cover: this rank's shard."""
        return value.to_local() if isinstance(value, DTensor) else value

    def _rng_state(self) -> str:
        kind, keys, *numbers = np.random.get_state()
        generators = (
            torch.get_rng_state().numpy().tobytes(),
            random.getstate(),
            kind,
            np.asarray(keys).tobytes(),
            numbers,
        )
        return repr(generators)


class ElasticTraining(Training):
    """One rank of a world of any size: without dropout and noise a step is the same sum on any layout, but for the order of
    the additions. Rank 0 digests the gathered full state, which does not depend on the layout."""

    learning_rate = 1e-3
    foreach = False  # one tensor at a time: the foreach kernels take no tensors of two meshes

    def _shard(self) -> None:
        world_size = dist.get_world_size()
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if world_size != TENSOR_PARALLEL_WORLD:
            mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("data",))
        else:
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
            for block in self.model.blocks:
                plan = {
                    "qkv": ColwiseParallel(output_layouts=Replicate()),
                    "out": RowwiseParallel(input_layouts=Replicate()),
                    "mlp.0": ColwiseParallel(),
                    "mlp.2": RowwiseParallel(),
                }
                parallelize_module(block, mesh["tensor"], plan)
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh["data"])
        fully_shard(self.model, mesh=mesh["data"])
        self._data_parallel = int(mesh["data"].size())

    def _make_loader(self, settings: Settings, rank: int) -> TextLoader:
        index = rank // (dist.get_world_size() // self._data_parallel)
        rows = [f"{sample}" for sample in range(settings.batch) if sample % self._data_parallel == index]
        self._scale = len(rows) / settings.batch * self._data_parallel  # FSDP2 averages over the data-parallel ranks
        return TextLoader(settings, rows, has_noise=False)

    def step(self) -> float:
        """One optimizer step; returns the loss of the global batch, the same on all ranks."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss()
        (loss * self._scale).backward()
        self.optimizer.step()
        self.scheduler.step()
        total = loss.detach().double() * self._scale
        dist.all_reduce(total)
        return float(total) / dist.get_world_size()

    def digests(self) -> dict[str, str]:
        """As of any training, of the full state; "" on all ranks but the first. A collective."""
        found = super().digests()
        return found if dist.get_rank() == 0 else dict.fromkeys(found, "")

    def _digested(self, value: Any) -> Any:
        return value.full_tensor() if isinstance(value, DTensor) else value

    def _rng_state(self) -> str:
        return ""


def _update(digest: Any, name: str, value: Any) -> None:
    digest.update(name.encode())
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    else:
        digest.update(repr(value).encode())


def loss_bits(loss: float) -> str:
    """The 64 bits of a loss as hex digits: equal text means equal bits."""
    return struct.pack(">d", loss).hex()


def wait_at_gate(settings: Settings, step: int) -> None:
    """Wait until the harness permits ``step``: pending faults come first, and none comes after the end."""
    deadline = time.monotonic() + GATE_DEADLINE_S
    while settings.gate_file and int(Path(settings.gate_file).read_text()) < step:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{settings.gate_file} did not let step {step} pass within {GATE_DEADLINE_S:g} s")
        time.sleep(0.05)


def train(settings: Settings, rank: int, notes: Notes) -> None:
    """Train to the last step, from the start (control) or from the restored step (protected)."""
    training = (ElasticTraining if settings.may_shrink else Training)(settings, rank)
    keeper: Any = None
    start = 0
    if settings.run_id:
        import backstay

        began = time.monotonic()
        keeper = backstay.Snapshotter(
            training.model,
            training.optimizer,
            run_id=settings.run_id,
            job="demo",
            extra={"scheduler": training.scheduler, "loader": training.loader},
        )
        result = keeper.restore(deadline_s=settings.restore_deadline_s)
        start = result.step
        notes.write(
            "restored",
            step=start,
            outcome=result.outcome,
            attempt=result.attempt,
            message=result.message,
            source=result.sources.get(rank, ""),  # "rebuild node-1 node-2": of this rank's shard
            seconds=time.monotonic() - began,
            **(training.digests() if start else {}),
        )
    for step in range(start + 1, settings.steps + 1):
        wait_at_gate(settings, step)
        loss = training.step()
        notes.write("step", step=step, loss=loss_bits(loss), value=loss, **training.digests())
        if keeper is not None:
            keeper.snapshot(step)
    if keeper is not None:
        keeper.fence()
    notes.write("end", step=settings.steps, **training.digests())
    if keeper is not None:
        keeper.finish()


def main() -> int:
    settings = Settings(**json.loads(os.environ["DEMO_SETTINGS"]))
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    notes = Notes(settings, rank)
    world_size = int(os.environ["WORLD_SIZE"])
    node = os.environ.get("BACKSTAY_TEST_NODE", "")
    notes.write("start", rank=rank, world_size=world_size, pid=os.getpid(), node=node)
    dist.init_process_group("gloo")
    try:
        train(settings, rank, notes)
    except Exception as error:
        notes.write("error", error=type(error).__name__, message=str(error)[:4000])
        exit_code = getattr(error, "exit_code", None)
        if exit_code is None:
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return int(exit_code)
    if not settings.run_id and any(name.partition(".")[0] in ("backstay", "backstayd") for name in sys.modules):
        raise AssertionError("the control run imported backstay, so it is not a valid control")
    notes.write("done", modules=len(sys.modules))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
