"""Argument validation: rejects impossible values early, with a hint at what to give instead.

Never calls what it is given.
"""

from __future__ import annotations

import inspect
import math
import numbers
import operator
import threading
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch

from backstay.errors import UsageError
from backstay.ids import check_name
from backstay.trainer.nested_optimizers import is_optimizer, with_inner

MAX_STEP: Final = 10**18 - 1  # what a directory's name holds


def model_of(given: Any) -> torch.nn.Module:
    if not isinstance(given, torch.nn.Module):
        raise UsageError(f"model is {_kind(given)}: give the torch.nn.Module that is trained, then its optimizer")
    return given


def optimizers_of(given: Any) -> tuple[Any, ...]:
    """One optimizer or several as a tuple, with those within them; anything with ``param_groups`` and ``state`` is one."""
    found = (given,) if is_optimizer(given) or not _is_collection(given) else tuple(given)
    if not found:
        raise UsageError("no optimizer was given: give the one that trains the model, or a list of all")
    for index, optimizer in enumerate(found):
        if not is_optimizer(optimizer):
            which = "optimizer" if len(found) == 1 else f"optimizer {index} of {len(found)}"
            raise UsageError(f"{which} is {_kind(optimizer)}: give a torch.optim.Optimizer, or a list of them")
    if len({id(optimizer) for optimizer in found}) < len(found):
        raise UsageError(f"the same optimizer was given twice among {len(found)}: give each once")
    return with_inner(found)


def process_group_of(given: Any) -> Any:
    """A group of torch.distributed, or None: all of its ranks."""
    if given is None:
        return None
    if not torch.distributed.is_available() or given is torch.distributed.GroupMember.NON_GROUP_MEMBER:
        raise UsageError(
            "process_group is what new_group() gives to a process that is not of the group: make the Snapshotter on the "
            "ranks of the group only",
            reason="not_in_group",
        )
    if not isinstance(given, torch.distributed.ProcessGroup):
        raise UsageError(
            f"process_group is {_kind(given)}: give what torch.distributed.new_group() or DeviceMesh.get_group() returned"
        )
    return given


def extra_of(given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise UsageError(f'extra is {_kind(given)}: give names to things, as in extra={{"scheduler": scheduler}}')
    for name, stateful in given.items():
        check_name("extra", name)
        if isinstance(stateful, torch.utils.data.DataLoader):
            continue  # its place is kept, whether it has a state of its own or not
        lacks = [verb for verb in ("state_dict", "load_state_dict") if not callable(getattr(stateful, verb, None))]
        if lacks or inspect.isclass(stateful):
            plain = f"; a plain value has its place in keeper.values[{name!r}]" if _is_plain(stateful) else ""
            raise UsageError(
                f"extra {name!r} is {_kind(stateful)}: give an object with state_dict() and load_state_dict(), which "
                f"return and take what it is to keep, or a DataLoader{plain}"
            )
    return dict(given)


def seconds_of(name: str, given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, numbers.Real):
        raise UsageError(f"{name} is {_kind(given)}: give seconds, as a number", reason="bad_argument")
    value = float(given)
    if not 0 <= value <= threading.TIMEOUT_MAX:  # false for NaN, too
        often = "; every wait has an end: give one that is long enough" if value == math.inf else ""
        raise UsageError(f"{name} is {value:g}: give seconds, 0 or more{often}", reason="bad_argument")
    return value


def count_of(name: str, given: Any) -> int:
    try:
        value = operator.index(given)
    except TypeError:
        value = -1
    if value < 0:
        raise UsageError(f"{name} is {_kind(given)}: give a whole number, 0 or more")
    return value


def step_of(call: str, given: Any) -> int:
    """A step as a plain number, whatever kind of integer it was (numpy's, a tensor of one)."""
    try:
        step = operator.index(given)
    except TypeError as error:
        raise UsageError(
            f"{call}() was given {_kind(given)}: give the number of completed optimizer steps, an int",
            reason="bad_step",
        ) from error
    if not 0 < step <= MAX_STEP:
        raise UsageError(
            f"{call}({step}): give the number of completed optimizer steps, which is 1 after the first; in a loop that "
            f"counts from 0, {call}(step + 1)",
            reason="bad_step",
        )
    return step


def values_of(given: Any) -> dict[str, Any]:
    """The same dictionary, which restore() fills and the script keeps writing to."""
    if not isinstance(given, dict):
        raise UsageError(f'keeper.values is {_kind(given)}: give a dictionary, as in keeper.values = {{"epoch": 3}}')
    return given


def names_of(argument: str, given: Any) -> frozenset[str]:
    """Several names; a bare text would be taken for its letters."""
    found = () if isinstance(given, (str, bytes)) or not isinstance(given, Iterable) else tuple(given)
    if not isinstance(given, Iterable) or isinstance(given, (str, bytes)) or not all(isinstance(n, str) for n in found):
        raise UsageError(f'{argument} is {_kind(given)}: give the names of extras, as in {argument}=["ema"]')
    return frozenset(found)


def _is_plain(given: Any) -> bool:
    return given is None or isinstance(given, (bool, int, float, str, list, tuple, dict, set, torch.Tensor))


def _is_collection(given: Any) -> bool:
    return isinstance(given, Iterable) and not isinstance(given, (str, bytes, Mapping, torch.Tensor, torch.nn.Module))


def _kind(given: Any) -> str:
    """The value's type, and the value where it is short."""
    if given is None:
        return "None"
    if inspect.isclass(given):
        return f"the class {given.__name__}"
    shown = f" ({given!r})" if isinstance(given, (str, int, float)) and len(repr(given)) <= 40 else ""
    return f"a {type(given).__name__}{shown}"
