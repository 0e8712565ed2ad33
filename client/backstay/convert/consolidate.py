"""One whole model out of the shards of a snapshot: which stored tensors are its parameters, and their bytes, verified.

Reads through a :class:`ShardBytes` of any kind (tmpfs, daemon, storage); holds one tensor in memory at a time. Standard
library and crc32c only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from backstay.errors import IntegrityError, SnapshotNotFoundError
from backstay.format import boxes
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
            place(part, box, memoryview(whole), self.shape, item=_item_bytes(entry))
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
    kinds = {(entry.dtype, entry.torch_dtype, _whole_shape(entry)) for _, entry in found}
    if len(kinds) > 1:
        raise IntegrityError(
            f"{name} is stored in different forms: {sorted(map(str, kinds))}", reason="layout_mismatch"
        )
    dtype, torch_dtype, shape = next(iter(kinds))
    stored = [_stored_box(entry) for _, entry in found]
    parts = tuple((*found[index], stored[index]) for index in choose_cover(name, stored, shape))
    item = max((_item_bytes(entry) for _, entry, _ in parts), default=0)
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


def _stored_box(entry: TensorEntry) -> Box:
    """The box of an entry in its stored form: stored dtypes may have dimensions after the tensor's own."""
    return (*entry.offsets, *(0 for _ in _trailing(entry))), entry.shape


def _whole_shape(entry: TensorEntry) -> tuple[int, ...]:
    """Shape of the whole tensor in its stored form."""
    return (*entry.global_shape, *_trailing(entry))


def _item_bytes(entry: TensorEntry) -> int:
    """Bytes of one stored element; 0 for an empty entry."""
    count = math.prod(entry.shape)
    return (entry.end - entry.begin) // count if count else 0


def place(part: memoryview, box: Box, whole: memoryview, shape: Sequence[int], *, item: int) -> None:
    """Copy the row-major bytes of ``box`` to their places in those of a tensor of ``shape``: one slice for each run."""
    if boxes.count(box[1]) == 0:
        return
    position = 0
    for begin, end in boxes.byte_runs(box, shape, item, gap_bytes=1):
        whole[begin:end] = part[position : position + end - begin]
        position += end - begin


def choose_cover(name: str, parts: Iterable[Box], shape: Sequence[int]) -> list[int]:
    """Indexes of boxes that make up the whole tensor, each element once.

    Raises:
        IntegrityError: elements are missing, or two boxes that differ overlap.
    """
    chosen: list[tuple[int, Box]] = []
    for index, box in enumerate(parts):
        if any(box == other for _, other in chosen) or boxes.count(box[1]) == 0:
            continue
        clash = next((other for _, other in chosen if boxes.intersect(box, other)), None)
        if clash is not None:
            raise IntegrityError(
                f"{name}: the parts at {box[0]} {box[1]} and at {clash[0]} {clash[1]} overlap; not used",
                reason="layout_mismatch",
            )
        chosen.append((index, box))
    count = sum(boxes.count(box[1]) for _, box in chosen)
    if count != math.prod(shape):
        raise IntegrityError(
            f"{name}: the snapshot has {count} of {math.prod(shape)} elements; not used", reason="layout_mismatch"
        )
    return [index for index, _ in chosen]


def _trailing(entry: TensorEntry) -> tuple[int, ...]:
    """Dimensions of the stored form that the tensor itself lacks (a complex number as two floats)."""
    return entry.shape[len(entry.offsets) :]
