"""State that belongs to one rank alone (its JSON, extras and generators), read from the snapshot for the rank that
continues it.

Streams and positions are keyed by logical rank: rank r continues where rank r of the snapshot stopped. Must not touch the
trainer's objects.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from backstay.errors import IntegrityError
from backstay.restore.snapshot import OpenedSnapshot, ReadTarget
from backstay.restore.stored_names import Naming
from backstay.trainer import distributed_tensors, local_tensors
from backstay.trainer.state import json_codec


class StateReader:
    """JSON states of a snapshot's ranks, read once each, and the tensors they refer to."""

    def __init__(self, opened: OpenedSnapshot, naming: Naming, members: tuple[int, ...] = ()) -> None:
        """``members``: of the world that restores, by rank what torch.distributed calls it; (): the same."""
        self._opened, self._naming, self._members = opened, naming, members
        self._documents: dict[int, dict[str, Any] | None] = {}

    def find(self, rank: int) -> dict[str, Any] | None:
        """The state of ``rank``; None if the snapshot has none (it was imported)."""
        if rank not in self._documents:
            document = self._opened.read_state(rank)
            if document is not None and document.get("format") != json_codec.STATE_FORMAT:
                raise IntegrityError(
                    f"{self._opened.label}: state of rank {rank} has a format that this version does not read; nothing was "
                    "loaded",
                    reason="bad_state",
                )
            self._documents[rank] = document
        return self._documents[rank]

    def document(self, rank: int) -> dict[str, Any]:
        """As :meth:`find`; raises IntegrityError if there is none."""
        found = self.find(rank)
        if found is None:
            raise IntegrityError(
                f"{self._opened.label} has no state of rank {rank}; nothing was loaded", reason="missing_tensor"
            )
        return found

    def decode(
        self,
        rank: int,
        encoded: Any,
        templates: Mapping[str, torch.Tensor] | None = None,
        *,
        named: Mapping[str, torch.Tensor] | None = None,
    ) -> Any:
        """A value of the state of ``rank``, with its tensors.

        Args:
            rank: Whose state it is.
            encoded: A part of its document.
            templates: By path, tensors that are DTensors here: what is stored is cut like them.
            named: By name, what it may refer to besides its own tensors.
        """
        distributed = set(self.document(rank)["distributed"])
        tensors: dict[str, torch.Tensor] = {}
        targets: list[ReadTarget] = []
        for path in sorted(json_codec.tensor_paths(encoded)):
            tensors[path] = self._target(rank, path, path in distributed, (templates or {}).get(path), targets)
        self._opened.read(targets)
        return json_codec.decode(encoded, tensors, named)

    def generators(self, rank: int) -> dict[str, torch.Tensor]:
        """Generator states of ``rank`` by kind."""
        start = f"rank-{rank:05d}.rng."
        return {
            name.removeprefix(start): self._opened.read_tensor(name)
            for name in self._opened.names()
            if name.startswith(start)
        }

    def _target(
        self, rank: int, path: str, is_distributed: bool, template: torch.Tensor | None, targets: list[ReadTarget]
    ) -> torch.Tensor:
        """Memory for one tensor; what to read into it is added to ``targets``."""
        if isinstance(template, DTensor):
            local, offsets, _, _, home = distributed_tensors.place_distributed(path, template, self._members)
            name = self._stored_name(rank, path, home if is_distributed else None)
            made = local.detach()  # if nothing of it lies here, this rank's shard does not name it
            if local.numel() or self._opened.entries(name):
                whole = self._opened.tensor(name)
                if whole.shape != tuple(template.shape):
                    raise IntegrityError(
                        f"extra {path} has shape {whole.shape} in the snapshot, {tuple(template.shape)} here; nothing was "
                        "loaded",
                        reason="wrong_extras",
                    )
                made = torch.empty(local.shape, dtype=whole.dtype, device=local.device)
                targets.append(ReadTarget(name=name, tensor=made, offsets=offsets))
            return DTensor.from_local(
                made, template.device_mesh, template.placements, run_check=False, shape=template.shape,
                stride=template.stride(),
            )  # fmt: skip
        if is_distributed and template is None:
            raise IntegrityError(
                f"extra {path} is a DTensor in the snapshot, and its state_dict() here has none to cut it like; nothing was "
                "loaded",
                reason="wrong_extras",
            )
        name = self._stored_name(rank, path, rank if is_distributed else None)
        whole = self._opened.tensor(name)
        made = torch.empty(whole.shape, dtype=whole.dtype, device="cpu")
        targets.append(ReadTarget(name=name, tensor=made, offsets=(0,) * made.ndim))
        return made

    def _stored_name(self, rank: int, path: str, home: int | None) -> str:
        found = (
            None if home is None else self._naming.find(local_tensors.private_name(f"extra.{path}", home), is_own=True)
        )
        return found or f"rank-{rank:05d}.extra.{path}"


def derived_streams(snapshot_id: str, rank: int, *, has_cuda: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Generator states, as ``trainer.rng`` has them, of a logical rank that the snapshot had none of: the same each time."""
    seed = hashlib.sha256(f"backstay stream {snapshot_id} {rank}".encode()).digest()
    number = int.from_bytes(seed[:8], "big")
    plain: dict[str, Any] = {"python": random.Random(number).getstate()}  # noqa: S311 - a stream to train with
    if "numpy.random" in sys.modules:
        import numpy as np

        plain["numpy"] = np.random.RandomState(number % 2**32).get_state(legacy=False)
    generators = {"torch": torch.Generator().manual_seed(number % 2**63).get_state()}
    if has_cuda and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        generators["cuda"] = torch.Generator(device).manual_seed(number % 2**63).get_state()
    return plain, generators
