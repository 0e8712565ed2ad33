"""The snapshot that a world began from, read tensor by tensor: every byte verified in the memory it is used from.

Must not decide what to restore, and must not write.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

import torch

from backstay import local, record, shard
from backstay.errors import IntegrityError
from backstay.manifest import Manifest, TensorEntry
from backstay.restore.load import OpenShard, load, true_dtype, true_shape
from backstay.trainer.sources import LocalTensor


class Source:
    """All shards of one snapshot, as this node has them.

    Invariant: ``manifests`` are those of every rank that wrote it.
    """

    def __init__(self, shards: Sequence[OpenShard], *, step: int, own_rank: int) -> None:
        self.step = step
        # The own rank's first: of what several ranks hold under one name, each rank gets its own.
        self._shards = sorted(shards, key=lambda s: (s.manifest.rank != own_rank, s.manifest.rank))

    @property
    def manifests(self) -> list[Manifest]:
        """The own rank's first, then by rank."""
        return [s.manifest for s in self._shards]

    def entries(self) -> Iterator[tuple[str, int, TensorEntry]]:
        """Name, rank that wrote it and place of every stored tensor; an alias is one more name of its tensor."""
        for manifest in self.manifests:
            by_name = {entry.name: entry for entry in manifest.tensors}
            for name, entry in by_name.items():
                yield name, manifest.rank, entry
            for alias, name in manifest.aliases.items():
                if name in by_name:
                    yield alias, manifest.rank, by_name[name]

    def load(self, targets: Sequence[LocalTensor]) -> None:
        """Fill boxes of tensors from whatever shards hold parts of them.

        Raises:
            IntegrityError: a box is not covered, of another dtype, or its bytes are wrong.
        """
        load(self._shards, targets, {})

    def read_whole(self, rank: int, name: str) -> torch.Tensor:
        """One stored tensor of one rank's shard."""
        held = next(s for s in self._shards if s.manifest.rank == rank)
        entry = next(e for e in held.manifest.tensors if e.name == name)
        tensor = torch.empty(true_shape(entry), dtype=true_dtype(entry))
        load([held], [], {name: tensor})
        return tensor

    def read_bytes(self, rank: int, name: str) -> bytearray:
        """One stored uint8 tensor of one rank's shard."""
        held = next(s for s in self._shards if s.manifest.rank == rank)
        entry = next(e for e in held.manifest.tensors if e.name == name)
        data = bytearray(entry.end - entry.begin)
        if data:
            load([held], [], {name: torch.frombuffer(data, dtype=torch.uint8)})
        return data

    def close(self) -> None:
        """Let go of the descriptors. Idempotent."""
        shards, self._shards = self._shards, []
        for held in shards:
            os.close(held.fd)


def open_restored(restored: local.Restored, fds: Sequence[int], *, run: str, own_rank: int) -> Source:
    """The shards that came with a decision; takes the descriptors over.

    Raises:
        IntegrityError: one of them is not what was decided, or is missing.
    """
    try:
        shards = [_open(restored, fds[item.fd_index], item.manifest, run) for item in restored.shards]
        world_size = restored.base_world_size or (shards[0].manifest.world_size if shards else 0)
        missing = sorted(set(range(world_size)) - {s.manifest.rank for s in shards})
        if missing or not shards:
            raise IntegrityError(
                f"step {restored.step} of {run}: the daemon sent no shard of ranks {missing}", reason="missing_shard"
            )
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return Source(shards, step=restored.step, own_rank=own_rank)


def box(name: str, tensor: torch.Tensor, *, offsets: Sequence[int], global_shape: Sequence[int]) -> LocalTensor:
    """``tensor`` as the box at ``offsets`` of a stored tensor, for :meth:`Source.load`."""
    return LocalTensor(
        name=name, living=tensor, local=tensor, offsets=tuple(offsets), global_shape=tuple(global_shape), replicas=(0,),
        is_eager=False, owner={}, key=None,
    )  # fmt: skip


def _open(restored: local.Restored, fd: int, body: Mapping[str, object], run: str) -> OpenShard:
    manifest = record.from_json(Manifest, dict(body))
    found = (manifest.run, manifest.attempt, manifest.step)
    expected = (run, restored.base_attempt, restored.step)
    if found != expected:
        raise IntegrityError(
            f"shard of rank {manifest.rank} is of (run, attempt, step) {found}, decided was {expected}; nothing was loaded",
            reason="wrong_identity",
        )
    shard.check_file(fd, manifest)
    return OpenShard(manifest=manifest, fd=fd)
