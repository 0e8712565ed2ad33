"""A snapshot that can be read: its manifests, and verified bytes of its tensors in any cut.

Made from an Offer (chunks are fetched to this node first) or from whole shards. What is read is verified in the memory it is
used from. Must not know models or optimizers, nor which snapshot to read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, Self

import torch

from backstay.errors import IntegrityError, SnapshotNotFoundError
from backstay.format import boxes, json_records, shard
from backstay.format.boxes import Box, Range
from backstay.format.digest import verify_chunks
from backstay.format.manifest import CHUNK_BYTES, Manifest, TensorEntry
from backstay.protocol import framing, messages
from backstay.protocol.connection import DaemonConnection, OnProgress
from backstay.restore.read_plan import Part, Reading, chunk_ranges, true_dtype, true_shape
from backstay.trainer import raw_memory

MAX_SHARDS_PER_FETCH: Final = 64  # descriptors that one frame may carry, with room
SOURCE_ORDER: Final = ("local", "peer", "persisted", "rebuild")  # cheapest first


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReadTarget:
    """The box of ``tensor``'s shape at ``offsets`` of the stored tensor ``name`` is to be read into ``tensor``.

    ``tensor`` is detached and of the stored dtype, on any device, with any strides; it is written in place.
    """

    name: str
    tensor: torch.Tensor
    offsets: tuple[int, ...]


class ShardSource(Protocol):
    """Where shards come from."""

    def fetch(self, chunks: Mapping[int, Sequence[Range]]) -> None:
        """Have these (first chunk, count) ranges, by rank, on this node."""

    def descriptor(self, rank: int) -> int:
        """A file in which all chunks lie that were fetched of this shard; stays the source's."""

    def close(self) -> None:
        """Close all descriptors. Idempotent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A stored tensor as a whole, whatever parts it lies in."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class OpenedSnapshot:
    """One snapshot, open for reading; a context manager that closes its descriptors.

    ``manifests`` is by rank; it has all ranks (:attr:`is_whole`) unless the daemon gave this rank's shards alone.
    ``is_offered``: chunks are fetched; else whole shards of the same layout are here. ``fetched_bytes`` and ``needed_bytes``
    add up over all reads.
    """

    def __init__(
        self,
        manifests: Iterable[Manifest],
        source: ShardSource,
        *,
        snapshot_id: str = "",
        kinds: Mapping[int, str] | None = None,
        details: Mapping[int, str] | None = None,
        is_offered: bool = True,
    ) -> None:
        self.is_offered = is_offered
        self.manifests = {manifest.rank: manifest for manifest in manifests}
        first = next(iter(self.manifests.values()))
        self.run, self.attempt, self.step = first.run, first.attempt, first.step
        self.world_size = first.world_size
        self.snapshot_id = snapshot_id
        self.kinds = dict(kinds or {})
        self.details = dict(details or {})
        self.fetched_bytes = self.needed_bytes = 0
        self.used_ranks: set[int] = set()
        self._source = source
        self._here: dict[int, set[int]] = {}  # chunks that were fetched
        self._headers: dict[int, shard.Layout] = {}
        self._entries: dict[str, list[tuple[int, TensorEntry]]] = {}
        self._aliases: dict[str, str] = {}
        for rank, manifest in sorted(self.manifests.items()):
            for entry in manifest.tensors:
                self._entries.setdefault(entry.name, []).append((rank, entry))
            for alias, name in manifest.aliases.items():
                self._aliases.setdefault(alias, name)

    @classmethod
    def from_offer(
        cls, connection: DaemonConnection, offer: messages.Offer, *, run: str, deadline: float, on_progress: OnProgress
    ) -> Self:
        """Open what the daemon offers over ``connection``.

        Args:
            run: The run that was asked for; another one is refused.
            deadline: A time of ``time.monotonic`` that all fetching together keeps.
        """
        manifests = [json_records.from_json(Manifest, dict(body)) for body in offer.manifests]
        expected = [
            (run, offer.base_attempt, offer.step, offer.base_world_size, r) for r in range(offer.base_world_size)
        ]
        _check_identity(manifests, expected)
        source = _FetchingSource(connection, offer.decision_id, deadline, on_progress)
        kinds, details = dict(enumerate(offer.kinds)), dict(enumerate(offer.details))
        return cls(manifests, source, snapshot_id=offer.snapshot_id, kinds=kinds, details=details)

    @classmethod
    def from_shards(cls, restored: messages.Restored, fds: Sequence[int], *, run: str, world_size: int) -> Self:
        """Open whole shards of the daemon's answer; their descriptors belong to the result from now on, also if this raises."""
        try:
            manifests = [json_records.from_json(Manifest, dict(item.manifest)) for item in restored.shards]
            expected = [(run, restored.base_attempt, restored.step, world_size, item.rank) for item in restored.shards]
            _check_identity(manifests, expected)
            descriptors = {item.rank: fds[item.fd_index] for item in restored.shards}
            for manifest in manifests:
                shard.check_file(descriptors[manifest.rank], manifest)
        except BaseException:
            framing.close_fds(list(fds))
            raise
        return cls(
            manifests,
            _WholeSource(fds, descriptors),
            snapshot_id=restored.snapshot_id,
            kinds={item.rank: item.source for item in restored.shards},
            details={item.rank: item.detail for item in restored.shards},
            is_offered=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptors. Idempotent."""
        self._source.close()

    # ---- what there is

    @property
    def is_whole(self) -> bool:
        """Whether the shards of all ranks can be read."""
        return len(self.manifests) == self.world_size

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"snapshot of step {self.step} (attempt {self.attempt}, {self.world_size} ranks) of {self.run}"

    def names(self) -> tuple[str, ...]:
        """Names of all stored tensors, without aliases, sorted."""
        return tuple(sorted(self._entries))

    def aliases(self) -> dict[str, str]:
        """Tied weights: name → name of the stored tensor."""
        return dict(self._aliases)

    def entries(self, name: str) -> Sequence[tuple[int, TensorEntry]]:
        """(rank, entry) of all parts of a stored tensor or of the target of an alias; empty if there is none."""
        return self._entries.get(name) or self._entries.get(self._aliases.get(name, ""), [])

    def tensor(self, name: str) -> StoredTensor:
        """Dtype and whole shape of a stored tensor; raises SnapshotNotFoundError."""
        found = self.entries(name)
        if not found:
            raise SnapshotNotFoundError(
                f"{self.label} has no tensor {name!r} among its {len(self._entries)}", reason="no_tensor"
            )
        entry = found[0][1]
        return StoredTensor(name=name, dtype=true_dtype(entry), shape=tuple(entry.global_shape))

    def source_of(self, rank: int) -> str:
        """Where the shard of ``rank`` comes from: kind and nodes."""
        return f"{self.kinds.get(rank, '')} {self.details.get(rank, '')}".strip()

    # ---- reading

    def fetch(self, ranges: Mapping[int, Sequence[Range]]) -> None:
        """Have (first chunk, count) ranges by rank on this node; what was fetched before is not fetched again."""
        missing: dict[int, list[Range]] = {}
        for rank, wanted in ranges.items():
            here = self._here.setdefault(rank, set())
            new = [chunk for first, count in wanted for chunk in range(first, first + count) if chunk not in here]
            if new:
                missing[rank] = [(a, b - a) for a, b in boxes.merge((chunk, chunk + 1) for chunk in new)]
        if not missing:
            return
        self._source.fetch(missing)
        for rank, chunks in missing.items():
            manifest = self.manifests[rank]
            self.used_ranks.add(rank)
            for chunk in (c for first, count in chunks for c in range(first, first + count)):
                self._here[rank].add(chunk)
                self.fetched_bytes += manifest.chunk_length(chunk)

    def plan(self, targets: Iterable[ReadTarget]) -> Reading:
        """Decide which bytes of which shards fill ``targets``, without reading any.

        Raises:
            IntegrityError: naming the tensors of which something is missing or which are not what they are here.
        """
        parts: list[Part] = []
        problems: list[str] = []
        for target in targets:
            found = self._plan_target(target)
            if isinstance(found, str):
                problems.append(found)
            else:
                parts += found
        if problems:
            shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise IntegrityError(
                f"the {self.label} does not fit this model: {shown}; nothing was loaded", reason="layout_mismatch"
            )
        return Reading(parts, self.manifests)

    def run_plan(self, reading: Reading) -> None:
        """Fetch what a plan needs and fill its targets."""
        self.fetch(reading.chunks)
        self.needed_bytes += reading.needed_bytes
        reading.run({rank: self._source.descriptor(rank) for rank in reading.chunks})

    def read(self, targets: Iterable[ReadTarget]) -> None:
        """Fill ``targets``; raises IntegrityError before the first byte is written if something does not fit."""
        self.run_plan(self.plan(targets))

    def read_tensor(self, name: str) -> torch.Tensor:
        """A stored tensor as a whole, in CPU memory."""
        stored = self.tensor(name)
        result = torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
        self.read([ReadTarget(name=name, tensor=result, offsets=(0,) * result.ndim)])
        return result

    def metadata(self, rank: int) -> dict[str, str]:
        """Own keys of the header of ``rank``'s shard, from verified bytes."""
        return self._header(rank).metadata

    def read_state(self, rank: int) -> dict[str, Any] | None:
        """The JSON state of a rank as it was stored; None if it has none (an imported snapshot)."""
        name = f"rank-{rank:05d}.state.json"
        if not self._entries.get(name):
            return None
        data = self.read_tensor(name)
        try:
            document = json.loads(raw_memory.read_bytes(data) or b"{}")
        except ValueError as error:
            raise IntegrityError(
                f"{self.label}: state of rank {rank} is not JSON: {error}; nothing was loaded", reason="bad_state"
            ) from error
        if not isinstance(document, dict):
            raise IntegrityError(
                f"{self.label}: state of rank {rank} is no object; nothing was loaded", reason="bad_state"
            )
        return document

    def _header(self, rank: int) -> shard.Layout:
        if rank not in self._headers:
            manifest = self.manifests[rank]
            chunks = chunk_ranges([(0, manifest.header_bytes)])
            self.fetch({rank: chunks})
            end = min(manifest.size_bytes, sum(chunks[-1]) * CHUNK_BYTES)
            data = shard.read_range(self._source.descriptor(rank), 0, end)
            verify_chunks(memoryview(data), manifest, 0)
            layout = shard.parse_header(data[: manifest.header_bytes], size_bytes=manifest.size_bytes)
            self._headers[rank] = dataclasses.replace(layout, header=b"")
        return self._headers[rank]

    def _plan_target(self, target: ReadTarget) -> list[Part] | str:
        """The parts that make up ``target``, none of them twice, or a sentence about why they do not."""
        here = target.tensor
        found = self.entries(target.name)
        if not found:
            return f"{target.name} is not in the snapshot"
        whole = tuple(found[0][1].global_shape)
        if found[0][1].torch_dtype != str(here.dtype):
            return f"{target.name} is {found[0][1].torch_dtype} in the snapshot, {here.dtype} here"
        own: Box = (tuple(target.offsets), tuple(here.shape))
        if len(whole) != here.ndim or any(o + n > w for o, n, w in zip(*own, whole, strict=True)):
            return f"{target.name} has shape {whole} in the snapshot; {own[1]} elements at {own[0]} are wanted here"
        missing = [own] if here.numel() else []
        parts: list[Part] = []
        for rank, entry in sorted(found, key=lambda item: (self.cost(item[0]), item[0])):
            if tuple(entry.global_shape) != whole or entry.torch_dtype != found[0][1].torch_dtype:
                return (
                    f"{target.name} is {tuple(entry.global_shape)} {entry.torch_dtype} in the shard of rank {rank}, "
                    f"{whole} {found[0][1].torch_dtype} in that of rank {found[0][0]}"
                )
            left: list[Box] = []
            for box in missing:
                common = boxes.intersect((entry.offsets, true_shape(entry)), box)
                if common is None:
                    left.append(box)
                    continue
                left += boxes.subtract(box, common)
                parts.append(Part(rank=rank, entry=entry, box=common, destination=here, origin=own[0]))
            missing = left
        if missing:
            count = sum(boxes.count(shape) for _, shape in missing)
            return f"{target.name}: {count} of the {here.numel()} elements at {own[0]} of {whole} are in no shard"
        return parts

    def cost(self, rank: int) -> int:
        """How far away the shard of ``rank`` is; less is nearer."""
        kind = self.kinds.get(rank, "")
        return SOURCE_ORDER.index(kind) if kind in SOURCE_ORDER else len(SOURCE_ORDER)


class _WholeSource:
    """Shards that are here in full."""

    def __init__(self, fds: Sequence[int], descriptors: Mapping[int, int]) -> None:
        self._fds = list(fds)
        self._descriptors = descriptors

    def fetch(self, chunks: Mapping[int, Sequence[Range]]) -> None:
        pass

    def descriptor(self, rank: int) -> int:
        return self._descriptors[rank]

    def close(self) -> None:
        framing.close_fds(self._fds)


class _FetchingSource:
    """Sparse files of the daemon, in which fetched chunks lie."""

    def __init__(
        self, connection: DaemonConnection, decision_id: str, deadline: float, on_progress: OnProgress
    ) -> None:
        self._connection, self._decision_id = connection, decision_id
        self._deadline, self._on_progress = deadline, on_progress
        self._descriptors: dict[int, int] = {}

    def fetch(self, chunks: Mapping[int, Sequence[Range]]) -> None:
        wanted = sorted(rank for rank, ranges in chunks.items() if ranges)
        for begin in range(0, len(wanted), MAX_SHARDS_PER_FETCH):
            self._fetch(wanted[begin : begin + MAX_SHARDS_PER_FETCH], chunks)

    def descriptor(self, rank: int) -> int:
        return self._descriptors[rank]

    def _fetch(self, ranks: Sequence[int], chunks: Mapping[int, Sequence[Range]]) -> None:
        shards = tuple(
            messages.ChunkRanges(
                rank=rank,
                firsts=tuple(first for first, _ in chunks[rank]),
                counts=tuple(count for _, count in chunks[rank]),
            )
            for rank in ranks
        )
        left_s = max(0.1, self._deadline - time.monotonic())
        request = messages.Fetch(decision_id=self._decision_id, shards=shards, deadline_s=left_s)
        reply, fds = self._connection.fetch(request, self._on_progress)
        came = {item.rank: item.fd_index for item in reply.shards}
        if sorted(came) != list(ranks) or sorted(came.values()) != list(range(len(fds))):
            framing.close_fds(fds)
            raise IntegrityError(
                f"the daemon was asked for chunks of the shards of ranks {list(ranks)[:5]} and sent some of "
                f"{sorted(came)[:5]}; not used",
                reason="bad_reply",
            )
        for rank, index in came.items():
            self._close(rank)
            self._descriptors[rank] = fds[index]

    def close(self) -> None:
        for rank in list(self._descriptors):
            self._close(rank)

    def _close(self, rank: int) -> None:
        fd = self._descriptors.pop(rank, -1)
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)


def _check_identity(manifests: Sequence[Manifest], expected: Sequence[tuple[str, int, int, int, int]]) -> None:
    if not manifests or len(manifests) != len(expected):
        raise IntegrityError(
            f"the daemon gave {len(manifests)} manifests for {len(expected)} shards; nothing was loaded",
            reason="missing_shard",
        )
    for manifest, identity in zip(manifests, expected, strict=True):
        found = (manifest.run, manifest.attempt, manifest.step, manifest.world_size, manifest.rank)
        if found != identity:
            raise IntegrityError(
                f"shard of rank {manifest.rank} is of (run, attempt, step, world size, rank) {found}, decided was {identity}; "
                "nothing was loaded",
                reason="wrong_identity",
            )
        manifest.check()
