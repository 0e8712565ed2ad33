"""The plan of a shard: which pieces of which tensors this rank writes, and where each byte goes.

Made once and kept while nothing moves; a step only moves bytes. Replicas divide what they declared to share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from backstay.capture.rank_state import Place
from backstay.format import shard
from backstay.trainer import raw_memory
from backstay.trainer.local_tensors import Holdings, LocalTensor, layout_signature, model_signature

SPLIT_BYTES: Final = 64 * 1024  # a replicated tensor below this is written whole by one replica
JSON_GRAIN_BYTES: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Bytes ``begin`` to ``end`` of the shard come from ``source`` (a box of a living tensor, or of its eager copy)."""

    name: str
    begin: int
    end: int
    source: torch.Tensor
    is_eager: bool
    is_frozen: bool = False  # nothing is meant to change it


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where everything goes.

    Invariant: ``pieces`` are in file order and cover the shard after its header. Eager pieces have their ``source`` in
    ``staging`` (by name), which :meth:`stage` fills.
    """

    holdings: Holdings
    layout: shard.Layout
    specs: tuple[shard.TensorSpec, ...]
    pieces: tuple[Piece, ...]
    staging: dict[str, torch.Tensor]
    eager: tuple[tuple[torch.Tensor, torch.Tensor], ...]  # living source, its staging
    state_name: str
    state_bytes: int
    signature: str  # of the model as it is now
    layout_signature: str  # of which parts of it this rank holds

    def stage(self, dynamic: Mapping[str, torch.Tensor], state: bytes) -> None:
        """Copy now what may change before the next fence: a second copy of these bytes, because no slot may be free yet."""
        for source, copy in self.eager:
            copy.copy_(source, non_blocking=True)
        for name, tensor in dynamic.items():
            self.staging[name].copy_(tensor, non_blocking=True)
        raw_memory.view_at(self.staging[self.state_name].data_ptr(), self.state_bytes)[:] = state.ljust(
            self.state_bytes
        )

    def fits(self, dynamic: Mapping[str, torch.Tensor], state: bytes) -> bool:
        """Whether extras still have the tensors they had, and the JSON fits."""
        if len(state) > self.state_bytes or len(dynamic) + len(self.eager) + 1 != len(self.staging):
            return False
        return all(
            name in self.staging and self.staging[name].shape == tensor.shape
            and self.staging[name].dtype == tensor.dtype and self.staging[name].device == tensor.device
            for name, tensor in dynamic.items()
        )  # fmt: skip


def build(
    holdings: Holdings,
    *,
    rank: int,
    dynamic: Mapping[str, torch.Tensor],
    state: bytes,
    metadata: Mapping[str, str],
    places: Mapping[str, Place] | None = None,
    previous: Plan | None = None,
) -> Plan:
    """Plan the shard of ``rank``.

    Args:
        holdings: The tensors found.
        dynamic: Tensors that are read for each snapshot (extras, generators), by name.
        state: The JSON bytes now; capacity is reserved with room to grow.
        metadata: Own keys of the shard's header.
        places: Where those of ``dynamic`` lie that are parts of a whole.
        previous: The plan before; its layout is kept if it still fits.
    """
    boxes = own_boxes(holdings.tensors, rank=rank)
    state_name = f"rank-{rank:05d}.state.json"
    capacity = (
        previous.state_bytes if previous is not None and len(state) <= previous.state_bytes else _capacity(len(state))
    )
    staging: dict[str, torch.Tensor] = {state_name: torch.empty(capacity, dtype=torch.uint8, device="cpu")}
    specs, sources, eager = [], {}, []
    frozen = {tensor.name for tensor, _, _ in boxes if tensor.is_frozen}
    for tensor, box, offsets in boxes:
        specs.append(_spec(tensor, box, offsets))
        sources[tensor.name] = box
        if tensor.is_eager and box.numel():
            copy = torch.empty(box.shape, dtype=box.dtype, device=box.device)
            staging[tensor.name] = sources[tensor.name] = copy
            eager.append((box, copy))
    for name, value in dynamic.items():
        staging[name] = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    for name in (state_name, *dynamic):
        sources[name] = staging[name]
        offsets, whole = (places or {}).get(name) or ((0,) * staging[name].ndim, tuple(staging[name].shape))
        specs.append(
            shard.TensorSpec(name, str(staging[name].dtype), tuple(staging[name].shape), tuple(offsets), tuple(whole))
        )
    is_same = previous is not None and previous.specs == tuple(specs) and previous.layout.metadata == dict(metadata)
    aliases = holdings.aliases
    if previous is not None and is_same and previous.holdings.aliases == aliases:
        layout = previous.layout
    else:
        layout = shard.plan_layout(specs, metadata=metadata, aliases=aliases)
    pieces = tuple(
        Piece(
            name=e.name,
            begin=e.begin,
            end=e.end,
            source=sources[e.name],
            is_eager=e.name in staging,
            is_frozen=e.name in frozen,
        )
        for e in layout.entries
    )
    return Plan(
        holdings=holdings,
        layout=layout,
        specs=tuple(specs),
        pieces=pieces,
        staging=staging,
        eager=tuple(eager),
        state_name=state_name,
        state_bytes=capacity,
        signature=model_signature(holdings),
        layout_signature=layout_signature(holdings),
    )


def own_boxes(tensors: Sequence[LocalTensor], *, rank: int) -> list[tuple[LocalTensor, torch.Tensor, tuple[int, ...]]]:
    """What ``rank`` writes: (tensor, its box, offsets of the box in the whole tensor).

    Every replica computes the same division: rows of large tensors, small tensors whole, each to who has least so far.
    """
    loads: dict[tuple[int, ...], list[int]] = {}
    boxes = []
    for tensor in tensors:
        if len(tensor.replicas) == 1:
            boxes.append((tensor, tensor.local, tensor.offsets))
            continue
        load = loads.setdefault(tensor.replicas, [0] * len(tensor.replicas))
        begin, end = _divide(tensor.local, load)[tensor.replicas.index(rank)]
        if tensor.local.ndim == 0:
            if end > begin:
                boxes.append((tensor, tensor.local, tensor.offsets))
        elif end > begin or (tensor.local.numel() == 0 and begin == -1):
            box = tensor.local.narrow(0, begin, end - begin) if end > begin else tensor.local
            first = max(begin, 0)
            boxes.append((tensor, box, (tensor.offsets[0] + first, *tensor.offsets[1:])))
    return boxes


def _divide(local: torch.Tensor, load: list[int]) -> list[tuple[int, int]]:
    """Row ranges of each replica, empty as (0, 0); adds their bytes to ``load``. A zero-size tensor's owner gets (-1, -1)."""
    count, size = len(load), raw_memory.byte_count(local)
    by_load = sorted(range(count), key=lambda index: (load[index], index))
    rows = local.shape[0] if local.ndim else 1
    if size == 0:
        return [(-1, -1) if index == by_load[0] else (0, 0) for index in range(count)]
    if size < SPLIT_BYTES or rows < count:
        load[by_load[0]] += size
        return [(0, rows) if index == by_load[0] else (0, 0) for index in range(count)]
    base, extra = divmod(rows, count)
    lengths = [base] * count
    for index in by_load[:extra]:
        lengths[index] += 1
    ranges, begin = [], 0
    for index, length in enumerate(lengths):
        ranges.append((begin, begin + length))
        load[index] += length * (size // rows)
        begin += length
    return ranges


def _spec(tensor: LocalTensor, box: torch.Tensor, offsets: tuple[int, ...]) -> shard.TensorSpec:
    return shard.TensorSpec(
        tensor.name, str(box.dtype), tuple(box.shape), offsets, tensor.global_shape, tensor.is_frozen
    )


def _capacity(size: int) -> int:
    """Room for the JSON to grow by half before the layout must change."""
    return -(-(size + size // 2 + 1024) // JSON_GRAIN_BYTES) * JSON_GRAIN_BYTES
