"""Hooks that call the fence before any optimizer changes a parameter.

First among every optimizer's step pre-hooks and outside torch.compile. Must not change what the step does.
"""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch

_log = logging.getLogger("backstay")


class Fence:
    """The hooks of one Snapshotter.

    ``unhooked`` are the optimizers that have no step hooks. ``is_synchronous``: the hooks cannot be relied on, so snapshots
    must be copied before snapshot() returns.
    """

    def __init__(self, optimizers: Sequence[Any], wait: Callable[[], None]) -> None:
        self.unhooked: list[Any] = []
        self._handles: list[Any] = []
        self._hooked: list[Any] = []
        self._ran: dict[int, Any] = {}  # id of an optimizer -> its step when its hook ran last
        self._is_warned = False
        self._wait = wait
        guarded = torch.compiler.disable(self._before_step)
        for optimizer in optimizers:
            register = getattr(optimizer, "register_step_pre_hook", None)
            hooks = getattr(optimizer, "_optimizer_step_pre_hooks", None)
            if register is None or not isinstance(hooks, OrderedDict) or not _runs_hooks(_class_step(optimizer)):
                self.unhooked.append(optimizer)
                continue
            handle = register(guarded)
            with contextlib.suppress(KeyError):
                hooks.move_to_end(handle.id, last=False)
            self._handles.append(handle)
            self._hooked.append(optimizer)
        self.is_synchronous = bool(self.unhooked)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def is_doubtful(self) -> bool:
        """Whether an optimizer may step without the fence: its ``step`` was replaced on the object and has run no hook yet."""
        for optimizer in self._hooked:
            step = _step_of(optimizer)
            if not _runs_hooks(step) and self._ran.get(id(optimizer)) is not step:
                if not self._is_warned:
                    self._is_warned = True
                    _log.warning(
                        "backstay: %s.step was replaced on the object by something that has not run its step hooks; until it "
                        "does, snapshots are copied synchronously, before snapshot() returns. To have them copied in the "
                        "background, let what replaces it call the former step (further occurrences are not logged)",
                        type(optimizer).__name__,
                    )
                return True
        return False

    def _before_step(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        self._ran[id(optimizer)] = _step_of(optimizer)
        self._wait()


def _class_step(optimizer: Any) -> Any:
    return getattr(type(optimizer), "step", None)


def _step_of(optimizer: Any) -> Any:
    """What ``optimizer.step()`` calls: tools replace it on the instance (apex's amp, torch's schedulers)."""
    return getattr(optimizer, "__dict__", {}).get("step") or _class_step(optimizer)


def _runs_hooks(step: Any) -> bool:
    """Whether ``step`` is wrapped by torch's ``profile_hook_step``, which is what calls the hooks.

    ``Optimizer.__init__`` patches the class; a subclass that skips it runs none. ``functools.wraps`` keeps the mark.
    """
    return bool(getattr(step, "hooked", False))
