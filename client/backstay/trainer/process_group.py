"""The world: the processes that train together, as torch.distributed knows them.

Rank 0 sends its id to all ranks, once per restore(): the only message of backstay between ranks.
"""

from __future__ import annotations

import datetime as dt
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist

from backstay import ids
from backstay.errors import UnavailableError, UsageError

DEFAULT_DEADLINE_S: Final = 600.0
_TAG: Final = 0xB5  # of the message with the world's name
_sent: list[Any] = []  # what rank 0 sent last: it must live until everybody has it


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """``group``: None is all of torch.distributed. ``members``: by rank what torch.distributed calls it; (): the same."""

    rank: int
    size: int
    collective_timeout_s: float = 0.0  # 0: not known
    group: Any = None
    members: tuple[int, ...] = ()


def current_world(group: Any = None) -> World:
    """This process's place in ``group``, or in torch.distributed; a world of one without it.

    Raises:
        UsageError: if a launcher started several processes: each would take the run for its own, and end the others' part.
            Also if this process is not of ``group``.
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
    if group is None:
        return World(
            rank=dist.get_rank(), size=dist.get_world_size(), collective_timeout_s=_collective_timeout_s(group)
        )
    members = tuple(dist.get_process_group_ranks(group))
    if dist.get_rank() not in members:
        raise UsageError(
            f"process_group is of the ranks {_few(members)}; this process is rank {dist.get_rank()} and not one of them",
            reason="not_in_group",
        )
    return World(
        rank=members.index(dist.get_rank()), size=len(members), collective_timeout_s=_collective_timeout_s(group),
        group=group, members=members,
    )  # fmt: skip


def within(members: tuple[int, ...], ranks: Iterable[int], *, what: str) -> tuple[int, ...]:
    """``ranks`` of torch.distributed as ranks of the world with these ``members`` (of all processes: (), the same).

    Raises:
        UsageError: ``what`` is on ranks that are not of the world.
    """
    if not members:
        return tuple(ranks)
    places = {global_rank: rank for rank, global_rank in enumerate(members)}
    ranks = tuple(ranks)
    outside = [rank for rank in ranks if rank not in places]
    if outside:
        raise UsageError(
            f"{what} is spread over ranks {_few(ranks)} of torch.distributed, and process_group has only {_few(members)}: "
            "give Snapshotter a group that holds all ranks of the model",
            reason="not_in_group",
        )
    return tuple(places[rank] for rank in ranks)


def agree_on_id(world: World, *, deadline_s: float = DEFAULT_DEADLINE_S) -> str:
    """A fresh world id, the same on all ranks: 16 hex digits. Every rank of a world of more than one calls it.

    Waits for rank 0, and with gloo for no other rank: each gets a message of its own, so that one rank that never calls
    keeps no other from reaching its daemon, which knows who is missing.

    Raises:
        UnavailableError: rank 0 did not send it within ``deadline_s``, or is gone.
    """
    own = ids.new_incarnation()
    if world.size == 1:
        return own
    data = torch.tensor(list(bytes.fromhex(own)), dtype=torch.uint8, device=_collective_device(world.group))
    begin_s = time.monotonic()
    try:
        if "gloo" in str(dist.get_backend(world.group)):
            _tell(world, data, deadline_s)
        else:
            work = dist.broadcast(data, src=_global(world, 0), group=world.group, async_op=True)
            assert work is not None
            work.wait(dt.timedelta(seconds=deadline_s))
    except RuntimeError as error:  # what torch raises for a time that is over, and for a peer that is gone
        waited_s = time.monotonic() - begin_s
        is_over = waited_s >= 0.9 * deadline_s
        why = "it has not called restore()" if is_over else f"{str(error).splitlines()[0][:200]}"
        raise UnavailableError(
            f"rank {world.rank} of {world.size} heard nothing from rank 0 for {waited_s:.1f} s: {why}; "
            "every rank must call restore(), and after this error all of them restart",
            reason="deadline" if is_over else "peer_gone",
        ) from error
    return bytes(data.tolist()).hex()  # a tensor and not broadcast_object_list, which pickles


def _tell(world: World, data: torch.Tensor, deadline_s: float) -> None:
    """Rank 0 sends ``data`` to each other rank, which waits for it; rank 0 waits for nobody."""
    if world.rank > 0:
        work = dist.irecv(data, src=_global(world, 0), group=world.group, tag=_TAG)
        assert work is not None
        work.wait(dt.timedelta(seconds=deadline_s))
        return
    _sent[:] = [data.clone()]
    for rank in range(1, world.size):
        _sent.append(dist.isend(_sent[0], dst=_global(world, rank), group=world.group, tag=_TAG))


def _global(world: World, rank: int) -> int:
    return world.members[rank] if world.members else rank


def _few(ranks: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, ranks[:8]))}{', ...' if len(ranks) > 8 else ''}"


def _collective_device(group: Any = None) -> torch.device:
    backend = str(dist.get_backend(group))
    if "nccl" in backend and "gloo" not in backend:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _collective_timeout_s(group: Any) -> float:
    group = group if group is not None else dist.group.WORLD
    if group is None:
        return 0.0
    options = getattr(group._get_backend(_collective_device(group)), "options", None)
    timeout = getattr(options, "_timeout", None)
    return float(timeout.total_seconds()) if timeout is not None else 0.0
