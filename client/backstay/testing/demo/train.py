"""The training run of the demo: a byte-level GPT under FSDP2, deterministic to the bit, with or without backstay.

Started by torchrun as a file. Settings come from the environment (``DEMO_SETTINGS``, a JSON object). The control run
must never import backstay, so the import is inside the branch that protects the run. Every rank appends JSON lines to a
file of its own: what it computed, for the harness to compare.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

VOCABULARY: Final = 256
SEED: Final = 20260117
GATE_DEADLINE_S: Final = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the harness decides; the same for every rank."""

    steps: int
    d_model: int
    layers: int
    heads: int
    tokens: int
    batch: int
    text: str
    notes_dir: str
    run_id: str = ""  # "" = control run
    gate_file: str = ""  # holds the last step that may be computed for now; "" = no limit
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
    """Windows of real text; which ones follows from rank and position alone. Two of its choices come from global RNGs.

    Its position is state that a restore has to bring back.
    """

    def __init__(self, settings: Settings, rank: int) -> None:
        self._bytes = np.fromfile(settings.text, dtype=np.uint8)
        self._settings = settings
        self._rank = rank
        self.position = 0

    def next_batch(self) -> torch.Tensor:
        """``[batch, tokens + 1]`` int64."""
        rows = []
        length = self._settings.tokens + 1
        for row in range(self._settings.batch):
            name = f"{SEED}/{self._rank}/{self.position}/{row}".encode()
            where = int.from_bytes(hashlib.sha256(name).digest()[:8]) % (len(self._bytes) - length)
            rows.append(self._bytes[where : where + length].astype(np.int64))
        self.position += 1
        batch = np.stack(rows)
        batch[:, random.randrange(length)] = np.random.randint(0, VOCABULARY)  # noise, so that both RNGs matter
        return torch.from_numpy(batch)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Notes:
    """One rank's lines; each is one write at the end of the file, so that a SIGKILL tears at most the last one."""

    def __init__(self, settings: Settings, rank: int) -> None:
        path = Path(settings.notes_dir, f"rank-{rank:05d}.jsonl")
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, kind: str, **fields: Any) -> None:
        line = json.dumps({"kind": kind, "time_unix_s": time.time(), **fields}) + "\n"
        os.write(self._fd, line.encode())


class Training:
    """Model, optimizer, schedule and data of one rank."""

    def __init__(self, settings: Settings, rank: int) -> None:
        torch.manual_seed(SEED)  # every rank draws the same full parameters and keeps its shard of them
        self.model = ByteGPT(settings)
        for block in self.model.blocks:
            fully_shard(block)
        fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3, weight_decay=0.1)
        warmup = max(1, settings.steps // 10)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) / warmup, 0.5 * (1.1 + math.cos(math.pi * step / settings.steps))),
        )
        self.loader = TextLoader(settings, rank)
        torch.manual_seed(SEED + 1 + rank)
        random.seed(SEED + 1 + rank)
        np.random.seed(SEED + 1 + rank)

    def step(self) -> float:
        """One optimizer step; returns this rank's loss."""
        batch = self.loader.next_batch()
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(batch[:, :-1])
        loss = nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), batch[:, 1:].reshape(-1))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        return float(loss.item())

    def digests(self) -> dict[str, str]:
        """SHA-256 of the local parameters, the local optimizer state, and RNGs with schedule and data position."""
        parameters, optimizer, rest = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            _update(parameters, name, parameter.detach())
            for key, value in sorted(self.optimizer.state.get(parameter, {}).items()):
                _update(optimizer, f"{name}.{key}", value)
        for group in self.optimizer.param_groups:
            settings = {key: value for key, value in group.items() if key != "params"}
            optimizer.update(json.dumps(settings, sort_keys=True, default=repr).encode())
        rest.update(torch.get_rng_state().numpy().tobytes())
        rest.update(repr(random.getstate()).encode())
        kind, keys, *numbers = np.random.get_state()
        rest.update(repr((kind, numbers)).encode() + np.asarray(keys).tobytes())
        state = {key: value for key, value in self.scheduler.state_dict().items() if key != "lr_lambdas"}
        rest.update(json.dumps(state, sort_keys=True, default=repr).encode())
        rest.update(str(self.loader.position).encode())
        return {"parameters": parameters.hexdigest(), "optimizer": optimizer.hexdigest(), "rng": rest.hexdigest()}


def _update(digest: Any, name: str, value: Any) -> None:
    digest.update(name.encode())
    if isinstance(value, torch.Tensor):
        local = value.to_local() if isinstance(value, DTensor) else value
        digest.update(f"{local.dtype}{tuple(local.shape)}".encode())
        digest.update(local.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    else:
        digest.update(repr(value).encode())


def loss_bits(loss: float) -> str:
    """The 64 bits of a loss as hex digits: equal text means equal bits."""
    return struct.pack(">d", loss).hex()


def wait_at_gate(settings: Settings, step: int) -> None:
    """Wait until the harness lets ``step`` be computed: a fault that is due comes first, none comes after the end."""
    deadline = time.monotonic() + GATE_DEADLINE_S
    while settings.gate_file and int(Path(settings.gate_file).read_text()) < step:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{settings.gate_file} did not let step {step} pass within {GATE_DEADLINE_S:g} s")
        time.sleep(0.05)


def train(settings: Settings, rank: int, notes: Notes, make: Callable[[Settings, int], Any]) -> None:
    """Train to the last step, from the start (control) or from wherever the run is (protected)."""
    training = make(settings, rank)
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


def main(make: Callable[[Settings, int], Any] = Training) -> int:
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
        train(settings, rank, notes, make)
    except Exception as error:
        notes.write("error", error=type(error).__name__, message=str(error)[:4000])
        exit_code = getattr(error, "exit_code", None)
        if exit_code is None:
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return int(exit_code)
    if not settings.run_id and any(name.partition(".")[0] in ("backstay", "backstayd") for name in sys.modules):
        raise AssertionError("the control run imported backstay; it is no control")
    notes.write("done", modules=len(sys.modules))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
