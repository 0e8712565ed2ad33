"""Which part of a distributed tensor this rank holds: DTensors, and the sharded parameters behind those that FSDP2 shows whole.

FSDP2 shows parameters unsharded after an evaluation, or between forward and backward. That memory is FSDP2's; the state lies
in the sharded ones. Must not guess: a placement whose local part is not one box of the whole is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from backstay.errors import UsageError
from backstay.trainer import raw_memory
from backstay.trainer.process_group import within

_STRIDED: Final = "_StridedShard"

Place = tuple[dict[Any, Any], Any]  # a dictionary and the key where a tensor lies


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


class LocalPart(NamedTuple):
    """The part of a DTensor that this rank holds: a box at ``offsets`` of a tensor of shape ``whole``.

    ``replicas``: the ranks that hold the same box, ascending. ``home``: the lowest rank of the mesh.
    """

    local: torch.Tensor
    offsets: tuple[int, ...]
    whole: tuple[int, ...]
    replicas: tuple[int, ...]
    home: int


def refuse_unsupported(name: str, tensor: torch.Tensor) -> None:
    is_lazy = isinstance(tensor, (torch.nn.parameter.UninitializedParameter, torch.nn.parameter.UninitializedBuffer))
    problem = "is not initialised yet: run a forward pass first" if is_lazy else ""
    problem = problem or raw_memory.why_not_stored(tensor)
    if problem:
        raise UsageError(f"{name} {problem}", reason="unsupported_tensor")


def place_distributed(name: str, tensor: DTensor, members: tuple[int, ...] = ()) -> LocalPart:
    """This rank's part of a DTensor, by DCP's own arithmetic.

    Raises:
        UsageError: the part is not one box, or not certainly this one, by ``name``.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _refuse_placements(name, tensor)
    mesh, placements = tensor.device_mesh, tensor.placements
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise UsageError(f"{name} is a DTensor on a mesh that does not contain this rank", reason="unsupported_tensor")
    _refuse_disorder(name, tensor, coordinate)
    refuse_unsupported(name, tensor._local_tensor)
    local = tensor._local_tensor.detach()
    shape, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    if tuple(local.shape) != tuple(shape):
        raise UsageError(
            f"{name}: the local part has shape {tuple(local.shape)}, its placements {placements} say {tuple(shape)}",
            reason="unsupported_tensor",
        )
    index = tuple(
        slice(None) if isinstance(placement, Replicate) else coordinate[dim] for dim, placement in enumerate(placements)
    )
    replicas = tuple(sorted(within(members, map(int, mesh.mesh[index].flatten().tolist()), what=name)))
    if 0 in shape and 0 not in tensor.shape:
        offsets = tuple(min(o, g - s) for o, g, s in zip(offsets, tensor.shape, shape, strict=True))
    return LocalPart(local, tuple(offsets), tuple(tensor.shape), replicas, mesh_ranks(tensor, members)[0])


def mesh_ranks(tensor: DTensor, members: tuple[int, ...]) -> tuple[int, ...]:
    """The ranks of the world that hold parts or copies of ``tensor``, ascending."""
    ranks = map(int, tensor.device_mesh.mesh.flatten().tolist())
    return tuple(sorted(within(members, ranks, what="a DTensor")))


def _refuse_disorder(name: str, tensor: DTensor, coordinate: Sequence[int]) -> None:
    """Process groups sort their ranks: FSDP2 cuts by the place in the group, DTensor's arithmetic by that in the mesh."""
    ranks = tensor.device_mesh.mesh
    for dim, placement in enumerate(tensor.placements):
        line = ranks[tuple(slice(None) if d == dim else at for d, at in enumerate(coordinate))].tolist()
        if not isinstance(placement, Replicate) and line != sorted(line):
            raise UsageError(
                f"{name} is sharded over the ranks {line[:8]} of a mesh, in this order; torch's process group has them sorted, "
                "so that it is not certain which part this rank holds; build the mesh with ascending ranks in each dimension",
                reason="unsupported_tensor",
            )


def _refuse_placements(name: str, tensor: DTensor) -> None:
    """Only placements whose local part is one box of the whole."""
    sizes = tensor.device_mesh.shape
    for dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Partial):
            raise UsageError(
                f"{name} is a DTensor with a partial placement; it has no state of its own", reason="unsupported_tensor"
            )
        if type(placement).__name__ == _STRIDED:
            shard_dim = placement.dim  # type: ignore[attr-defined]
            same = [d for d, p in enumerate(tensor.placements) if getattr(p, "dim", None) == shard_dim]
            parts = 1
            for d in same:
                parts *= sizes[d]
            later = 1
            for d in same:
                later *= sizes[d] if d > dim else 1
            if tensor.shape[shard_dim] % parts or placement.split_factor != later:  # type: ignore[attr-defined]
                raise UsageError(
                    f"{name} is sharded by {tensor.placements}: dimension {shard_dim} of {tensor.shape[shard_dim]} does not "
                    f"divide into {parts} equal parts, so a rank's part is not one block; pad it to a multiple of {parts}",
                    reason="unsupported_tensor",
                )
