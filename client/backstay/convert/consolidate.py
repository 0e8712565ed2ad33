"""One whole model out of the shards of a snapshot: which stored tensors are its parameters, and their bytes, verified.

Reads through a :class:`ShardBytes` of any kind (tmpfs, daemon, storage); holds one tensor in memory at a time. Standard
library and crc32c only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from backstay.convert.assemble import choose_cover, item_bytes, place, stored_box, whole_shape
from backstay.errors import IntegrityError, SnapshotNotFoundError
from backstay.format.boxes import Box
from backstay.format.digest import verify_chunks
from backstay.format.manifest import Manifest, TensorEntry

MODEL_PREFIX = "model."
READ_BYTES = 8 * 1024 * 1024
_HOME = re.compile(r"rank-(\d{5,})\.")


class ShardBytes(Protocol):
    """Read access to one shard file; what comes is checked by who reads."""

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the file's bytes from ``offset`` on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    manifest: Manifest
    bytes: ShardBytes


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeTensor:
    """A tensor of the model: ``name`` without prefix, dtype and shape as stored, and where its parts lie."""

    name: str
    dtype: str
    torch_dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    parts: tuple[tuple[Shard, TensorEntry, Box], ...]

    def read(self) -> bytearray:
        """The row-major bytes of the whole tensor.

        Raises:
            IntegrityError: a chunk does not have its digest.
        """
        whole = bytearray(self.size_bytes)
        for shard, entry, box in self.parts:
            if entry.end - entry.begin == self.size_bytes:
                read_entry(shard, entry, memoryview(whole))
                continue
            part = memoryview(bytearray(entry.end - entry.begin))
            read_entry(shard, entry, part)
            place(part, box, memoryview(whole), self.shape, item=item_bytes(entry))
        return whole


def whole_tensors(shards: Sequence[Shard], *, prefix: str = MODEL_PREFIX) -> Iterator[WholeTensor]:
    """The tensors under ``prefix``, in the order of their names, each of which is whole.

    Copies that several ranks keep with bytes of their own (buffers under DDP) are given as the lowest rank has them;
    :func:`differing_copies` names them.

    Raises:
        SnapshotNotFoundError: nothing lies under ``prefix``. IntegrityError: a tensor is not whole.
    """
    copies = _copies(shards, prefix)
    if not copies:
        raise SnapshotNotFoundError(f"the snapshot holds nothing under {prefix!r}", reason="no_tensors")
    for name in sorted(copies):
        yield _whole(name, copies[name][min(copies[name])])


def differing_copies(shards: Sequence[Shard], *, prefix: str = MODEL_PREFIX) -> dict[str, tuple[int, ...]]:
    """Tensors of which ranks keep copies that differ: name to the ranks that have one; of these the lowest is taken."""
    differing = {}
    for name, copies in _copies(shards, prefix).items():
        contents = {frozenset((entry.offsets, entry.crc) for _, entry in found) for found in copies.values()}
        if len(contents) > 1:
            differing[name] = tuple(sorted(copies))
    return differing


def aliases_of(shards: Sequence[Shard], *, prefix: str = MODEL_PREFIX) -> dict[str, str]:
    """Tied tensors: name to the name of the stored one, both without prefix."""
    found: dict[str, str] = {}
    for shard in shards:
        for alias, target in shard.manifest.aliases.items():
            bare, bare_target = _HOME.sub("", alias, count=1), _HOME.sub("", target, count=1)
            if bare.startswith(prefix) and bare_target.startswith(prefix):
                found[bare.removeprefix(prefix)] = bare_target.removeprefix(prefix)
    return dict(sorted(found.items()))


def read_entry(shard: Shard, entry: TensorEntry, view: memoryview) -> None:
    """Fill ``view`` with the bytes of one entry, every chunk they lie in verified in the buffer it was read into."""
    manifest, size = shard.manifest, shard.manifest.chunk_bytes
    span = READ_BYTES // size * size
    position = entry.begin // size * size
    while position < entry.end:
        stop = min(position + span, manifest.size_bytes, -(-entry.end // size) * size)
        buffer = memoryview(bytearray(stop - position))
        shard.bytes.read_into(position, buffer)
        verify_chunks(buffer, manifest, position // size)
        low, high = max(position, entry.begin), min(stop, entry.end)
        view[low - entry.begin : high - entry.begin] = buffer[low - position : high - position]
        position = stop


def _copies(shards: Sequence[Shard], prefix: str) -> dict[str, dict[int, list[tuple[Shard, TensorEntry]]]]:
    """The parts of every tensor under ``prefix``, by name without it and by the lowest rank that shares the copy."""
    copies: dict[str, dict[int, list[tuple[Shard, TensorEntry]]]] = {}
    for shard in shards:
        for entry in shard.manifest.tensors:
            match = _HOME.match(entry.name)
            bare = entry.name[match.end() :] if match else entry.name
            if bare.startswith(prefix):
                home = int(match[1]) if match else 0
                copies.setdefault(bare.removeprefix(prefix), {}).setdefault(home, []).append((shard, entry))
    return copies


def _whole(name: str, found: Sequence[tuple[Shard, TensorEntry]]) -> WholeTensor:
    kinds = {(entry.dtype, entry.torch_dtype, whole_shape(entry)) for _, entry in found}
    if len(kinds) > 1:
        raise IntegrityError(
            f"{name} is stored in different forms: {sorted(map(str, kinds))}", reason="layout_mismatch"
        )
    dtype, torch_dtype, shape = next(iter(kinds))
    boxes = [stored_box(entry) for _, entry in found]
    parts = tuple((*found[index], boxes[index]) for index in choose_cover(name, boxes, shape))
    item = max((item_bytes(entry) for _, entry, _ in parts), default=0)
    return WholeTensor(
        name=name, dtype=dtype, torch_dtype=torch_dtype, shape=shape, size_bytes=math.prod(shape) * item, parts=parts
    )


def check_manifests(manifests: Mapping[int, Manifest]) -> None:
    """Raise IntegrityError unless the manifests are those of one snapshot, one for each rank."""
    kinds = {(m.run, m.attempt, m.step, m.world_size) for m in manifests.values()}
    sizes = {m.world_size for m in manifests.values()}
    if len(kinds) != 1 or sorted(manifests) != list(range(next(iter(sizes), -1))):
        raise IntegrityError(
            f"shards of ranks {sorted(manifests)} are of {len(kinds)} snapshots: {sorted(map(str, kinds))[:3]}; not used",
            reason="mixed_snapshots",
        )
