"""State that lies outside of parameters, buffers and optimizers, which snapshots do not have: named in the log, not captured.

Must not call a module's own code: what it gives may need pickle, or wait for a device.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import nn

_log = logging.getLogger("backstay")

_SHOWN: Final = 3
_HOOKS: Final = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_post_hooks")


def warn(model: nn.Module) -> None:
    """Name what of ``model`` a restore leaves as the script made it, by kind, each kind in one line."""
    modules = list(model.named_modules())
    extra_state = [_name(name) for name, module in modules if _has_extra_state(module)]
    if extra_state:
        _log.warning(
            "backstay: %s have a get_extra_state(), which is not captured: after a restore it is as the script made it. If "
            "training depends on it, give the module in extra={...} too, or an object whose state_dict() and load_state_dict() "
            "keep it",
            _joined(extra_state),
        )
    own_state_dict = [f"{_name(name)} ({how})" for name, module in modules if (how := _own_state_dict(module))]
    if own_state_dict:
        _log.warning(
            "backstay: %s: snapshots hold parameters and buffers as they are and do not call state_dict(). If it shows or "
            "makes up more than those, give the module in extra={...} too",
            _joined(own_state_dict),
        )
    attributes = [line for name, module in modules for line in _parameter_attributes(name, module)]
    if attributes:
        _log.warning(
            "backstay: %s: tensors that are attributes of a parameter are not captured: after a restore they are as the script "
            "made them. If training changes them, give an object in extra={...} that keeps them",
            _joined(attributes),
        )
    hooks = [line for name, module in modules for line in _communication_hooks(name, module)]
    if hooks:
        _log.warning(
            "backstay: %s: the state of a DDP communication hook (error feedback, its own counters) is not captured and starts "
            "over after a restore: a restarted run is close to the uninterrupted one, not equal to it",
            _joined(hooks),
        )


def _has_extra_state(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


def _own_state_dict(module: nn.Module) -> str:
    """What of a module, defined outside of torch, may make its ``state_dict()`` more than parameters and buffers; or ""."""
    for method in ("_save_to_state_dict", "state_dict"):
        if not _is_of_torch(getattr(type(module), method)):
            return f"{type(module).__name__} has a {method}() of its own"
    for kind in _HOOKS:
        for hook in getattr(module, kind, {}).values():
            if not _is_of_torch(hook):
                return f"the hook {_title(hook)} runs in its {'load_' if 'load' in kind else ''}state_dict()"
    return ""


def _parameter_attributes(name: str, module: nn.Module) -> Iterator[str]:
    for key, parameter in module._parameters.items():
        kind = type(parameter)
        if parameter is None or _is_of_torch(kind):
            continue
        found = [attribute for attribute, value in vars(parameter).items() if _holds_tensor(value)]
        if found:
            yield f"{name}{'.' if name else ''}{key} ({kind.__name__}: {', '.join(found[:_SHOWN])})"


def _holds_tensor(value: Any, depth: int = 2) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    if isinstance(value, (list, tuple)):
        return depth > 0 and any(_holds_tensor(item, depth - 1) for item in value)
    inner = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return depth > 0 and not isinstance(value, type) and any(_holds_tensor(item, depth - 1) for item in inner.values())


def _communication_hooks(name: str, module: nn.Module) -> Iterator[str]:
    if isinstance(module, nn.parallel.DistributedDataParallel):
        for hook, state in getattr(module, "_comm_hooks", ()):
            if state is not None and not isinstance(state, torch.distributed.ProcessGroup):
                yield f"{_name(name)} has the hook {_title(hook)} with a {type(state).__name__}"


def _is_of_torch(thing: Callable[..., Any]) -> bool:
    while isinstance(thing, functools.partial):
        thing = thing.func
    home = getattr(thing, "__module__", None) or type(thing).__module__
    return home.partition(".")[0] == "torch"


def _title(hook: Any) -> str:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return getattr(hook, "__qualname__", None) or type(hook).__qualname__


def _name(name: str) -> str:
    return name or "(root)"


def _joined(found: Sequence[str]) -> str:
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more
