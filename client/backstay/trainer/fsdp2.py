"""Parameters that FSDP2 shows unsharded at the moment: after an evaluation, or between forward and backward.

Their memory is FSDP2's, which frees it when it reshards; the state is in the sharded ones behind them. Must not reshard while
a step is under way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

Place = tuple[dict[Any, Any], Any]


def sharded_places(model: nn.Module) -> dict[int, Place]:
    """By the id of a parameter that is shown unsharded: the dictionary and the key where the sharded one lies."""
    places: dict[int, Place] = {}
    for _, group in _unsharded_groups(model):
        for parameter in group.fsdp_params:
            info = parameter._module_info
            places[id(getattr(info.module, info.param_name))] = (parameter.__dict__, "sharded_param")
    return places


def reshard(model: nn.Module) -> None:
    """Let go of all unsharded parameters: what is then written into the sharded ones is what the next forward sees."""
    for module, _ in list(_unsharded_groups(model)):
        module.reshard()


def _unsharded_groups(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    for module in model.modules():
        find: Any = getattr(module, "_get_fsdp_state", None)
        if find is None:
            continue
        state = find()
        # one group in older releases of torch
        groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
        for group in groups:
            if group is not None and not group.is_sharded:
                yield module, group
