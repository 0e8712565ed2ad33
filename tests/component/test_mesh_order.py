"""Meshes whose ranks do not ascend: FSDP2 cuts by the place in the process group, DTensor's arithmetic by that in the mesh."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from backstay.errors import UsageError
from backstay.trainer import local_tensors


def look(rank: int, directory: str, order: list[int]) -> None:
    """What one rank says that it holds of the rows 0 to 3."""
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    model = nn.Linear(1, 4, bias=False)
    model.weight.data = torch.arange(4.0).view(4, 1)
    fully_shard(model, mesh=DeviceMesh("cpu", torch.tensor(order)))
    try:
        (tensor,) = local_tensors.collect(model, [], rank=rank).tensors
        answer = f"{tensor.offsets[0]}: {tensor.local.flatten().tolist()}"
    except UsageError as error:
        answer = str(error)
    Path(directory, f"answer-{rank}").write_text(answer)
    dist.destroy_process_group()


def answers(directory: Path, order: list[int]) -> list[str]:
    multiprocessing.spawn(look, (str(directory), order), nprocs=2)
    return [(directory / f"answer-{rank}").read_text() for rank in range(2)]


def test_rows_are_named_by_their_place_where_ranks_ascend(tmp_path: Path) -> None:
    assert answers(tmp_path, [0, 1]) == ["0: [0.0, 1.0]", "2: [2.0, 3.0]"]


def test_a_mesh_whose_ranks_do_not_ascend_is_refused_and_never_stored_under_wrong_rows(tmp_path: Path) -> None:
    for answer in answers(tmp_path, [1, 0]):
        assert "model.weight is sharded over the ranks [1, 0] of a mesh" in answer
        assert "build the mesh with ascending ranks" in answer
