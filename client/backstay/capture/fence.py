"""Hooks that call the fence before any optimizer changes a parameter.

First among every optimizer's step pre-hooks and outside torch.compile. Must not change what the step does.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch


class Fence:
    """The hooks of one keeper. ``unhooked`` are the optimizers that have no step hooks."""

    def __init__(self, optimizers: Sequence[Any], wait: Callable[[], None]) -> None:
        self.unhooked: list[Any] = []
        self._handles: list[Any] = []
        self._wait = wait
        guarded = torch.compiler.disable(self._before_step)
        for optimizer in optimizers:
            register = getattr(optimizer, "register_step_pre_hook", None)
            hooks = getattr(optimizer, "_optimizer_step_pre_hooks", None)
            if register is None or not isinstance(hooks, OrderedDict) or not _runs_hooks(optimizer):
                self.unhooked.append(optimizer)
                continue
            handle = register(guarded)
            with contextlib.suppress(KeyError):
                hooks.move_to_end(handle.id, last=False)
            self._handles.append(handle)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before_step(self, _optimizer: Any, _args: Any, _kwargs: Any) -> None:
        self._wait()


def _runs_hooks(optimizer: Any) -> bool:
    """Whether ``step`` is wrapped by torch's ``profile_hook_step``, which is what calls the hooks.

    ``Optimizer.__init__`` patches the class; a subclass that skips it, or replaces ``step`` on the instance, runs none.
    """
    step = getattr(type(optimizer), "step", None)
    return bool(getattr(step, "hooked", False))
