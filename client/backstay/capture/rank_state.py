"""What a snapshot captures besides the tensors of model and optimizers: extras, generators, hyper-parameters.

Read for each snapshot, on the training thread. Must not draw from a generator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.distributed.tensor import DTensor

from backstay.trainer import distributed_tensors, local_tensors, optimizer_state, rng
from backstay.trainer.state import json_codec

HEAVY_JSON_BYTES: Final = 1 << 20  # about 0.1 s of the training thread
VALUES_PATH: Final = "keeper.values"

Place = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, shape of the whole


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    """JSON bytes, and tensors by stored name; ``places``: where those that are parts lie in their whole.

    ``parts``: what the JSON is made of, by the name of the extra that gave it.
    """

    document: bytes
    tensors: Mapping[str, torch.Tensor]
    places: Mapping[str, Place]
    parts: Mapping[str, Any]

    def heaviest(self) -> tuple[str, int]:
        """The part with most JSON, and its bytes; writes all of it again, so not for every step."""
        sizes = {name: len(json_codec.dumps(part)) for name, part in self.parts.items()}
        return max(sizes.items(), key=lambda item: item[1])


def read(
    optimizers: Sequence[torch.optim.Optimizer],
    extra: Mapping[str, Any],
    holdings: local_tensors.Holdings,
    *,
    rank: int,
    values: Mapping[str, Any] | None = None,
) -> RankState:
    """Read it now; the tensors are the living ones, not copies."""
    found: dict[str, torch.Tensor] = {}
    encoded = optimizer_state.read_values(optimizers, holdings, found)
    extras = {name: json_codec.encode(stateful.state_dict(), name, found) for name, stateful in extra.items()}
    kept = json_codec.encode(dict(values or {}), VALUES_PATH, found)
    distributed = [path for path, tensor in found.items() if isinstance(tensor, DTensor)]
    plain, generators = rng.read()
    document = {
        "format": json_codec.STATE_FORMAT,
        "optimizers": encoded,
        "extra": extras,
        "values": kept,
        "distributed": distributed,
        "rng": json_codec.encode(plain, "rng", found),
    }
    prefix = f"rank-{rank:05d}."
    tensors: dict[str, torch.Tensor] = {}
    places: dict[str, Place] = {}
    for path, tensor in found.items():
        if isinstance(tensor, DTensor):
            local, offsets, whole, _, home = distributed_tensors.place_distributed(path, tensor, holdings.members)
            name = local_tensors.private_name(f"extra.{path}", home)
            tensors[name], places[name] = local, (offsets, whole)
        else:
            tensors[f"{prefix}extra.{path}"] = tensor
    tensors.update({f"{prefix}rng.{kind}": tensor for kind, tensor in generators.items()})
    parts = {
        **{f"extra {name!r}": part for name, part in extras.items()},
        VALUES_PATH: kept,
        "optimizer state": encoded,
    }
    return RankState(document=json_codec.dumps(document), tensors=tensors, places=places, parts=parts)
