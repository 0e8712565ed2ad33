"""Snapshots of several ranks as files, and a source that gives their chunks one by one and counts them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from backstay.format import shard
from backstay.format.digest import Digester
from backstay.format.manifest import CHUNK_BYTES, Manifest
from backstay.restore.snapshot import OpenedSnapshot

Stored = tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]]  # local part, offsets, shape of the whole


def whole(tensor: torch.Tensor) -> Stored:
    return tensor, (0,) * tensor.ndim, tuple(tensor.shape)


def write_shard(
    path: Path,
    tensors: Mapping[str, Stored],
    *,
    rank: int = 0,
    world_size: int = 1,
    metadata: Mapping[str, str] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> Manifest:
    """One rank's shard file at ``path``."""
    specs = [shard.TensorSpec(n, str(t.dtype), tuple(t.shape), o, g) for n, (t, o, g) in tensors.items()]
    layout = shard.plan_layout(specs, metadata=metadata, aliases=aliases)
    data = bytearray(layout.header.ljust(layout.size_bytes, b"\0"))
    for entry in layout.entries:
        data[entry.begin : entry.end] = raw_bytes(tensors[entry.name][0])
    digester = Digester(layout)
    digester.update_span(data)
    chunk_crcs, tensor_crcs = digester.finish()
    path.write_bytes(data)
    return shard.build_manifest(
        layout, run="default/r", attempt=1, step=5, rank=rank, world_size=world_size, world_id="w", chunk_crcs=chunk_crcs,
        tensor_crcs=tensor_crcs,
    )  # fmt: skip


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The elements as they lie in row-major memory, for dtypes that torch can hardly do anything with, too."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size())
    numbers = torch.view_as_real(tensor.detach()) if bits is None else tensor.detach().view(bits)
    return numbers.contiguous().numpy().tobytes()


class ChunkSource:
    """Sparse copies that hold the fetched chunks alone; ``fetched``: (rank, chunk) in order."""

    def __init__(self, directory: Path, paths: Sequence[Path]) -> None:
        self._directory, self._paths = directory, paths
        self._fds: dict[int, int] = {}
        self.fetched: list[tuple[int, int]] = []

    def fetch(self, chunks: Mapping[int, Sequence[tuple[int, int]]]) -> None:
        for rank, ranges in chunks.items():
            data = self._paths[rank].read_bytes()
            if rank not in self._fds:
                fd = os.open(self._directory / f"sparse-{rank}", os.O_RDWR | os.O_CREAT)
                os.truncate(fd, len(data))
                self._fds[rank] = fd
            for first, count in ranges:
                for chunk in range(first, first + count):
                    assert chunk * CHUNK_BYTES < len(data)
                    self.fetched.append((rank, chunk))
                    begin = chunk * CHUNK_BYTES
                    os.pwrite(self._fds[rank], data[begin : begin + CHUNK_BYTES], begin)

    def descriptor(self, rank: int) -> int:
        return self._fds[rank]

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


def open_stored(
    directory: Path,
    ranks: Sequence[Mapping[str, Stored]],
    *,
    metadata: Mapping[str, str] | Sequence[Mapping[str, str]] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> tuple[OpenedSnapshot, ChunkSource, list[Path]]:
    """A snapshot of these shards, open for reading through chunks."""
    paths = [directory / f"rank-{rank}" for rank in range(len(ranks))]
    manifests = [
        write_shard(
            path,
            tensors,
            rank=rank,
            world_size=len(ranks),
            aliases=aliases,
            metadata=metadata[rank] if isinstance(metadata, Sequence) else metadata,
        )
        for rank, (path, tensors) in enumerate(zip(paths, ranks, strict=True))
    ]
    source = ChunkSource(directory, paths)
    return OpenedSnapshot(manifests, source, snapshot_id="s" * 64), source, paths
