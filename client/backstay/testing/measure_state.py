"""Measures the state of a user's model and optimizer: ``python -m backstay.testing.measure_state MODULE:FUNCTION``.

The function returns ``(model, optimizer)`` or a model alone. It is called under the meta device, so nothing is allocated; one
step with uninitialized gradients creates the optimizer's state. Prints one line of JSON. Must not train anything.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import torch

from backstay.errors import BackstayError, UsageError


def measure(function: str) -> dict[str, int]:
    """Bytes of parameters, buffers and optimizer state, each tensor once; UsageError if there is no such function."""
    model, optimizer = _made(function)
    parameters = {id(tensor): tensor for tensor in model.parameters()}
    buffers = {id(tensor): tensor for tensor in model.buffers()}
    state: dict[int, torch.Tensor] = {}
    if optimizer is not None:
        for parameter in parameters.values():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        state = {
            id(value): value for values in optimizer.state.values() for value in values.values()
            if isinstance(value, torch.Tensor)
        }  # fmt: skip
    sizes = {
        "parameter_bytes": _bytes(parameters.values()),
        "buffer_bytes": _bytes(buffers.values()),
        "optimizer_bytes": _bytes(state.values()),
    }
    return sizes | {"state_bytes": sum(sizes.values())}


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _made(function: str) -> tuple[torch.nn.Module, Any]:
    module_name, _, name = function.partition(":")
    if not module_name or not name:
        raise UsageError(f"{function!r} is not MODULE:FUNCTION, such as train:build", reason="bad_arguments")
    try:
        make = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"cannot import {function}: {error}", reason="bad_arguments") from error
    with torch.device("meta"):
        made = make()
    model, optimizer = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"{function} returned a {type(model).__name__}, not a model or (model, optimizer)")
    return model, optimizer


def main() -> int:
    try:
        print(json.dumps(measure(sys.argv[1] if len(sys.argv) == 2 else "")))
    except BackstayError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
