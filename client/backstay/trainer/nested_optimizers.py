"""Optimizers within optimizers (SAM, Lookahead), and what an optimizer's own ``state_dict()`` keeps beyond torch's two keys.

Must not guess: what is neither found nor known to be captured is refused by name. Calls ``state_dict()`` only where a class or
a hook has changed it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final

import torch
from torch.distributed.tensor import DTensor

from backstay.errors import IntegrityError, UsageError
from backstay.trainer.restore_in_place import settle
from backstay.trainer.state import json_codec

_TORCH_KEYS: Final = frozenset({"state", "param_groups"})
_MAX_DEPTH: Final = 3  # of containers in an attribute


def is_optimizer(value: Any) -> bool:
    return not isinstance(value, type) and hasattr(value, "param_groups") and hasattr(value, "state")


def with_inner(given: Sequence[Any]) -> tuple[Any, ...]:
    """``given``, each followed by the optimizers it holds in its attributes that have a state of their own."""
    found: list[Any] = []
    listed = {id(optimizer) for optimizer in given}
    states = {id(optimizer.state) for optimizer in given}
    for outer in given:
        found.append(outer)
        pending = [outer]
        while pending:
            for _, optimizer in inner(pending.pop()):
                if id(optimizer) not in listed:
                    listed.add(id(optimizer))
                    pending.append(optimizer)
                    if id(optimizer.state) not in states:  # else one of those listed shows the very same state
                        states.add(id(optimizer.state))
                        found.append(optimizer)
    return tuple(found)


def inner(optimizer: Any) -> Iterator[tuple[str, Any]]:
    """Attributes of ``optimizer`` that are optimizers, or lists or dictionaries of such."""
    for name, value in list(getattr(optimizer, "__dict__", {}).items()):
        if name not in ("state", "param_groups"):
            yield from _optimizers_in(value, name, 0)


def _optimizers_in(value: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(value, torch.Tensor) or depth > _MAX_DEPTH:
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _optimizers_in(item, f"{path}[{key!r}]", depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _optimizers_in(item, f"{path}[{index}]", depth + 1)
    elif is_optimizer(value):
        yield path, value


def refuse_unsteady(prefix: str, optimizer: Any) -> None:
    """Raise UsageError where ``state`` or ``param_groups`` are created at each access: what is written there is lost."""
    for name, first, second in (
        ("state", optimizer.state, optimizer.state),
        ("param_groups", list(optimizer.param_groups), list(optimizer.param_groups)),
    ):
        is_same = first is second if name == "state" else all(map(_is, first, second))
        if not is_same:
            held = [path for path, _ in inner(optimizer)]
            give = ", ".join(f"optimizer.{path}" for path in held) or "those it is made of"
            raise UsageError(
                f"{prefix} is a {type(optimizer).__name__} whose .{name} is made anew at each access (optimizer.{name} is not "
                f"optimizer.{name}), so that nothing could be restored into it; give Snapshotter the optimizers themselves, in "
                f"an order that stays the same: [{give}]",
                reason="unsupported_optimizer",
            )


def _is(left: Any, right: Any) -> bool:
    return left is right


def read_beyond(prefix: str, optimizer: Any, held: AbstractSet[int]) -> dict[str, Any]:
    """What ``state_dict()`` has beyond state and groups and is not captured otherwise, by key.

    Args:
        prefix: The optimizer's name, for messages.
        optimizer: One optimizer.
        held: Addresses of the tensors that are captured.

    Raises:
        UsageError: a key that :func:`write_beyond` could not put back.
    """
    kept: dict[str, Any] = {}
    held_by = [other for _, other in inner(optimizer)]
    has_state = all(other.state is not optimizer.state for other in held_by)
    try:
        shown = dict(optimizer.state_dict())
    except Exception as error:
        raise _refusal(prefix, optimizer, f"raises {type(error).__name__}: {error}") from error
    attributes = getattr(optimizer, "__dict__", {})
    for key, value in shown.items():
        if key in _TORCH_KEYS:
            continue
        mine = attributes.get(key)
        is_of_inner = bool(held_by) and isinstance(value, dict) and set(value) == _TORCH_KEYS
        is_part = _is_stateful(mine) and not is_optimizer(mine)
        if is_part or (key in attributes and _is_same(mine, value)):
            kept[key] = value
        elif not is_of_inner and not (has_state and _is_held(value, held)):  # empty at first: filled from its own state
            raise _refusal(prefix, optimizer, f"has {key!r} beside 'state' and 'param_groups', which is no attribute")
    return kept


def write_beyond(optimizer: Any, stored: Mapping[str, Any]) -> None:
    """Put back what :func:`read_beyond` read."""
    for key, value in stored.items():
        mine: Any = getattr(optimizer, key, None)
        if _is_stateful(mine):
            mine.load_state_dict(value)
        else:
            setattr(optimizer, key, settle(mine, value))


def check_beyond(index: int, optimizer: Any, stored: Mapping[str, Any]) -> None:
    """Raise IntegrityError where there is nothing to put ``stored`` back into."""
    missing = [key for key in stored if key not in getattr(optimizer, "__dict__", {})]
    if missing:
        raise IntegrityError(
            f"optimizer {index}: the snapshot has {missing[:3]} of it, and this {type(optimizer).__name__} has no such "
            "attributes; nothing was loaded. Build the optimizer as it was, or take a new run_id",
            reason="wrong_optimizers",
        )


def has_own_state_dict(optimizer: Any) -> bool:
    """Whether ``state_dict()`` may show more than torch's."""
    method = getattr(type(optimizer), "state_dict", None)
    hooks = getattr(optimizer, "_optimizer_state_dict_post_hooks", None)
    return method is not None and (method is not torch.optim.Optimizer.state_dict or bool(hooks))


def _is_stateful(value: Any) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def _is_same(mine: Any, value: Any) -> bool:
    """Whether the attribute itself is shown, or a copy of plain values."""
    return mine is value or (not _tensors_in(value) and json_codec.is_same(mine, value))


def _tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in _tensors_in(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors_in(item)]
    return []


def _is_held(value: Any, held: AbstractSet[int]) -> bool:
    """Whether everything in ``value`` is captured already: views of tensors that are, or nothing at all."""
    if isinstance(value, torch.Tensor):
        return not value.numel() or address(value) in held
    if isinstance(value, Mapping):
        return all(_is_held(item, held) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(_is_held(item, held) for item in value)
    return value is None


def address(tensor: torch.Tensor) -> int:
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local.data_ptr()


def _refusal(prefix: str, optimizer: Any, what: str) -> UsageError:
    kind = type(optimizer).__name__
    return UsageError(
        f"{prefix} is a {kind} whose state_dict() {what}: snapshots would not have it. Keep it in the optimizer's state or "
        f"param_groups, or in an attribute of the same name; or use an optimizer that does",
        reason="unsupported_optimizer",
    )
