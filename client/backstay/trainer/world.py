"""The set of processes that train together, as torch.distributed knows it.

Its name is the one collective of backstay: rank 0 makes it, everybody gets it, once per restore().
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from backstay import ids
from backstay.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    rank: int
    size: int
    collective_timeout_s: float = 0.0  # 0: not known


def current() -> World:
    """This process's place; a world of one without torch.distributed.

    Raises:
        UsageError: if a launcher started several processes: each would take the run for its own, and end the others' part.
    """
    if not (dist.is_available() and dist.is_initialized()):
        started = os.environ.get("WORLD_SIZE", "1")
        if started.isdecimal() and int(started) > 1:
            raise UsageError(
                f"this process is one of {started} (WORLD_SIZE), but torch.distributed is not initialised: call "
                "torch.distributed.init_process_group() first; where each process is a run of its own, unset WORLD_SIZE",
                reason="no_process_group",
            )
        return World(rank=0, size=1)
    return World(rank=dist.get_rank(), size=dist.get_world_size(), collective_timeout_s=_collective_timeout_s())


def agree_on_id(world: World) -> str:
    """A fresh world id, the same on all ranks: 16 hex digits. A collective when the world has more than one rank."""
    own = ids.new_incarnation()
    if world.size == 1:
        return own
    data = torch.tensor(list(bytes.fromhex(own)), dtype=torch.uint8, device=_collective_device())
    dist.broadcast(data, src=0)  # a tensor and not broadcast_object_list, which pickles
    return bytes(data.tolist()).hex()


def _collective_device() -> torch.device:
    backend = str(dist.get_backend())
    if "nccl" in backend and "gloo" not in backend:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _collective_timeout_s() -> float:
    group = dist.group.WORLD
    if group is None:
        return 0.0
    options = getattr(group._get_backend(_collective_device()), "options", None)
    timeout = getattr(options, "_timeout", None)
    return float(timeout.total_seconds()) if timeout is not None else 0.0
