"""Restoring values into the objects that a program already has, so that every reference to them sees the values.

Optimizers keep the dictionaries and tensors of their state elsewhere too (lists for foreach kernels, preconditioners). Must not
change what is equal in form but lies otherwise in memory: such an object was replaced while training, so nothing refers to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from backstay.trainer import raw_memory


def settle(existing: Any, value: Any) -> Any:
    """``value`` with each container and tensor of the same form in ``existing`` filled and used in its place."""
    if existing is value:
        return existing
    if isinstance(value, torch.Tensor):
        if not is_like(existing, value):
            return value
        with torch.no_grad():
            existing.copy_(value)
        return existing
    if type(existing) is not type(value):
        return value
    if isinstance(value, dict):
        settled = {key: settle(existing.get(key), item) for key, item in value.items()}
        existing.clear()
        existing.update(settled)
        return existing
    if isinstance(value, list):
        existing[:] = [settle(at(existing, index), item) for index, item in enumerate(value)]
        return existing
    if type(value) is tuple:
        return tuple(settle(at(existing, index), item) for index, item in enumerate(value))
    return value


def at(items: Any, index: int) -> Any:
    return items[index] if index < len(items) else None


def is_like(existing: Any, made: torch.Tensor) -> bool:
    """Whether a tensor that is there can be filled instead of a new one."""
    if not isinstance(existing, torch.Tensor) or isinstance(existing, DTensor) != isinstance(made, DTensor):
        return False
    if existing.shape != made.shape or existing.dtype != made.dtype or existing.device != made.device:
        return False
    if isinstance(existing, DTensor) and isinstance(made, DTensor):
        if existing.placements != made.placements:
            return False
        existing, made = existing._local_tensor, made._local_tensor
    return not hasattr(type(existing), "__tensor_flatten__") and raw_memory.is_same_order(
        made.shape, existing.stride(), made.stride()
    )
