"""The training state that every alternative saves: a model and AdamW of a given total size, and the steps that change it.

Real tensors and a real optimizer. Must not know how the state is saved.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

LAYER_COUNT = 16
MOST_ROWS = 65536
_BYTES_PER_PARAMETER = 12  # float32 parameter and two float32 moments


@dataclass(slots=True)
class TrainingState:
    """A model, its optimizer with existing state, and a batch sized for CPU-bound steps of a given duration."""

    model: torch.nn.Sequential
    optimizer: torch.optim.AdamW
    batch: torch.Tensor

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in tensors(self, prefix="").values())

    def cpu_step(self) -> None:
        """Forward, backward and optimizer on the CPU: changes every tensor of the state."""
        loss = self.model(self.batch).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # gradients keep their pages: allocation is not compared

    def waiting_step(self, seconds: float) -> None:
        """A step that computes elsewhere, as on a GPU: the process waits, then one small parameter changes."""
        time.sleep(seconds)
        for parameter in self.model.parameters():
            parameter.grad = None
        bias = next(p for name, p in self.model.named_parameters() if name.endswith("bias") and p.requires_grad)
        bias.grad = torch.ones_like(bias)
        self.optimizer.step()
        bias.grad = None


def build(size_bytes: int, *, seed: int) -> TrainingState:
    """A state of about ``size_bytes`` (parameters plus AdamW's moments, float32); optimizer state exists on return."""
    torch.manual_seed(seed)
    per_layer = size_bytes / LAYER_COUNT / _BYTES_PER_PARAMETER
    width = max(16, 16 * round(math.sqrt(per_layer) / 16))
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(LAYER_COUNT)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    state = TrainingState(model, optimizer, torch.randn(8, width))
    state.cpu_step()
    return state


def build_frozen(size_bytes: int, *, frozen: float, seed: int) -> TrainingState:
    """As :func:`build`, but only ``1 - frozen`` of the parameters are trained, as with LoRA: the rest is a frozen backbone."""
    torch.manual_seed(seed)
    count = size_bytes / (4 * frozen + _BYTES_PER_PARAMETER * (1 - frozen))
    width = max(64, 16 * round(math.sqrt(count * frozen / LAYER_COUNT) / 16))
    backbone = [torch.nn.Linear(width, width) for _ in range(LAYER_COUNT)]
    for parameter in torch.nn.ModuleList(backbone).parameters():
        parameter.requires_grad_(False)
    rows = max(
        1, round(sum(p.numel() for layer in backbone for p in layer.parameters()) * (1 - frozen) / frozen / (width + 1))
    )
    model = torch.nn.Sequential(*backbone, torch.nn.Linear(width, rows))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    state = TrainingState(model, optimizer, torch.randn(8, width))
    state.cpu_step()
    return state


def calibrate(state: TrainingState, seconds: float) -> None:
    """Choose the batch so that :meth:`TrainingState.cpu_step` lasts about ``seconds`` on this machine now.

    By doubling, from the quicker of two tries: a burst of stolen CPU may end it early, and can never ask for a huge batch.
    """
    while state.batch.shape[0] < MOST_ROWS and min(_step_seconds(state), _step_seconds(state)) < seconds / 2:
        state.batch = torch.randn(state.batch.shape[0] * 2, state.batch.shape[1])


def _step_seconds(state: TrainingState) -> float:
    """The shortest of a few: interference by other processes must not make the batch smaller."""
    state.cpu_step()
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        state.cpu_step()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def tensors(state: TrainingState, *, prefix: str) -> dict[str, torch.Tensor]:
    """Every tensor of the state by a flat name beginning with ``prefix``: what the alternatives save."""
    named = dict(state.model.named_parameters())
    flat: dict[str, torch.Tensor] = {f"{prefix}model.{name}": parameter.detach() for name, parameter in named.items()}
    for name, parameter in named.items():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            flat[f"{prefix}optimizer.{name}.{key}"] = value
    return flat
