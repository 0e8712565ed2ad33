"""Several parts of one model in one process (pipeline stages) seen as the one module they were cut from.

The merged module is only walked for its tensors; it must never be called, moved or trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from backstay.errors import UsageError


def merge_parts(parts: Sequence[nn.Module]) -> nn.Module:
    """One module whose tensors have the names they have in their parts: ``layers.0.…`` wherever layer 0 lies.

    A single part is returned as it is. Non-persistent buffers may lie in several parts; they are not state.

    Raises:
        UsageError: if two parts have another tensor of the same name.
    """
    if not parts:
        raise UsageError("no model parts were given; give the modules of this process")
    return parts[0] if len(parts) == 1 else _merge(parts, "")


def _merge(parts: Sequence[nn.Module], path: str) -> nn.Module:
    merged = nn.Module()
    children: dict[str, list[nn.Module]] = {}
    for part in parts:
        _take_tensors(merged, part, path)
        for name, child in part._modules.items():
            if child is not None and all(child is not other for other in children.get(name, ())):
                children.setdefault(name, []).append(child)
    for name, found in children.items():
        merged._modules[name] = found[0] if len(found) == 1 else _merge(found, f"{path}{name}.")
    return merged


def _take_tensors(merged: nn.Module, part: nn.Module, path: str) -> None:
    volatile = part._non_persistent_buffers_set
    kept = {name: buffer for name, buffer in part._buffers.items() if name not in volatile}
    pairs: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
        (merged._parameters, dict(part._parameters)),
        (merged._buffers, kept),
    )
    for mine, theirs in pairs:
        for name, tensor in theirs.items():
            if tensor is not None and mine.setdefault(name, tensor) is not tensor:
                raise UsageError(
                    f"{path}{name} is in two parts of the model, as different tensors; rename one of them",
                    reason="duplicate_tensor",
                )
