"""A snapshot made from whole tensors of anybody: shard files and manifests in a directory, as a trainer would have left them.

Holds one tensor in memory at a time. Writes no completion record: who publishes the snapshot does. Standard library and
crc32c only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from backstay.convert.atomic_files import leaving_nothing, settle
from backstay.errors import InvariantError
from backstay.format import json_records, shard
from backstay.format.digest import Digester
from backstay.format.manifest import CHUNK_BYTES, Manifest
from backstay.format.shard import TensorSpec

DEFAULT_SHARD_BYTES: Final = 8 * 1024**3


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A whole tensor: ``name`` as shards name it, ``torch_dtype`` as ``str(tensor.dtype)``, ``read`` gives its bytes."""

    name: str
    torch_dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    read: Callable[[], memoryview | bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Whose snapshot it becomes."""

    run: str
    attempt: int
    step: int
    writer: str


def write_shards(
    sources: Sequence[Source],
    directory: Path,
    *,
    identity: Identity,
    metadata: Mapping[str, str],
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> list[Manifest]:
    """Write ``sources`` as shards of about ``shard_bytes``; each tensor lies whole in one of them.

    Raises:
        CapacityError: the disk is full; what was written is removed. UsageError: a dtype that cannot be stored.
    """
    groups = _divide(sources, shard_bytes)
    manifests: list[Manifest] = []
    with leaving_nothing("snapshot", directory) as made:
        for rank, group in enumerate(groups):
            stem = f"rank-{rank:05d}-of-{len(groups):05d}"
            path = directory / f"{stem}.safetensors"
            made += [path, directory / f"{stem}.manifest.json"]
            manifest = _write_shard(path, group, identity=identity, metadata=metadata, place=(rank, len(groups)))
            made[-1].write_bytes(json_records.dumps(manifest))
            manifests.append(manifest)
    return manifests


def _divide(sources: Sequence[Source], shard_bytes: int) -> list[list[Source]]:
    groups: list[list[Source]] = [[]]
    size = 0
    for source in sources:
        if groups[-1] and size + source.size_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(source)
        size += source.size_bytes
    return groups


def _write_shard(
    path: Path, group: Sequence[Source], *, identity: Identity, metadata: Mapping[str, str], place: tuple[int, int]
) -> Manifest:
    specs = [TensorSpec.whole(source.name, source.torch_dtype, source.shape) for source in group]
    layout = shard.plan_layout(specs, metadata=metadata)
    by_name = {source.name: source for source in group}
    digester = Digester(layout)
    with path.open("wb") as file:
        out = _Out(file, digester)
        out.write(layout.header)
        for entry in layout.entries:
            data = by_name[entry.name].read()
            if len(memoryview(data).cast("B")) != entry.end - entry.begin:
                raise InvariantError(f"{entry.name} gives {len(data)} bytes, its layout has {entry.end - entry.begin}")
            out.write(data)
        settle(file)
    digests = digester.finish()
    return shard.build_manifest(
        layout,
        run=identity.run,
        attempt=identity.attempt,
        step=identity.step,
        rank=place[0],
        world_size=place[1],
        world_id="imported",
        layout_signature="imported",  # no trainer's: whoever restores it chooses chunks
        chunk_crcs=digests.chunk_crcs,
        tensor_crcs=digests.tensor_crcs,
        writer=identity.writer,
    )


class _Out:
    """Writes in file order and hashes on the way, in pieces that no chunk border cuts."""

    def __init__(self, file: BinaryIO, digester: Digester) -> None:
        self._file, self._digester, self._position = file, digester, 0

    def write(self, data: memoryview | bytes) -> None:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            chunk, offset = divmod(self._position, CHUNK_BYTES)
            piece = view[done : done + CHUNK_BYTES - offset]
            self._file.write(piece)
            self._digester.update(piece, chunk)
            done += len(piece)
            self._position += len(piece)
