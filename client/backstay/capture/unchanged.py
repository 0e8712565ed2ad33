"""Since which capture each frozen tensor has had the bytes it has now, so that what a slot holds already is not copied again.

Trusts the kernel's page marks, else a checksum of the source; never ``_version``, which fused optimizers do not raise.
Whatever cannot be proven unchanged counts as changed. Must not copy anything into a slot.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from crc32c import crc32c
from torch.distributed.tensor import DTensor

from backstay.capture.shard_plan import Piece, Plan
from backstay.format.digest import Digester
from backstay.format.manifest import CHUNK_BYTES, UnchangedRange
from backstay.format.shard import Layout
from backstay.trainer import raw_memory
from backstay.trainer.local_tensors import Holdings
from backstay.trainer.page_tracking import PAGE_BYTES, PageWatch, Range, inner_pages

_log = logging.getLogger("backstay")

WATCHED_BYTES: Final = 4 * PAGE_BYTES  # a smaller piece is compared with a copy of it
# A tensor that changed in so many captures in a row is trained after all, whatever its requires_grad: watching it would cost a
# page fault per page and save nothing. The first captures of a plan always count as changed.
RESTLESS: Final = 4
NEVER: Final = -1  # the stamp of a piece that cannot be proven unchanged
MAX_STATED: Final = 256  # ranges in a manifest
# Snapshots for which parameters must have stayed frozen before they are worth a new plan and the whole copies that follow it:
# what is frozen and thawed in turns then costs at most one new plan in so many snapshots.
STEADY: Final = 8

Fingerprint = Callable[[Sequence[Piece]], list[int]]


@dataclass(slots=True)
class Freezing:
    """Decides when parameters that were frozen in mid-run are worth a new plan."""

    _seen: int = 0

    def is_due(self, holdings: Holdings) -> bool:
        """Whether the plan is to be rebuilt; called once for each snapshot."""
        self._seen = self._seen + 1 if holdings.has_frozen_more() else 0
        if self._seen < STEADY:
            return False
        self._seen = 0
        return True


@dataclass(slots=True)
class _Frozen:
    """One frozen piece: ``inner`` are its watched pages, ``edges`` a copy of the bytes around them."""

    index: int
    piece: Piece
    since: int = NEVER
    inner: Range | None = None
    edges: bytes = b""
    checksum: int | None = None
    is_recent: bool = True  # changed at the look before
    changes: int = 0


@dataclass(slots=True)
class Tracker:
    """Looks at the frozen pieces of one plan at each capture. For the session's thread; once ``is_enabled`` is False,
    everything counts as changed.

    Invariant: two looks that give a piece the same stamp saw the same bytes, and so did every look between them. A stamp is
    the step of the capture that first saw them.
    """

    is_enabled: bool = True
    _plan: Plan | None = None
    _frozen: list[_Frozen] = field(default_factory=list)
    _watch: PageWatch | None = None
    _is_refused: bool = False  # the kernel gives no marks
    _is_warned: bool = False

    def look(self, plan: Plan, step: int, device_sums: Fingerprint) -> list[int]:
        """The stamp of each piece of ``plan``; copy what changed only after this.

        Args:
            device_sums: Checksums of pieces that lie on a GPU.
        """
        stamps = [NEVER] * len(plan.pieces)
        if not self.is_enabled:
            self.close()
            return stamps
        try:
            self._look(plan, step, stamps, device_sums)
        except (OSError, RuntimeError) as error:  # such as a full GPU: then this costs more than it saves
            _log.warning("backstay: %s; from now on every snapshot copies frozen tensors too", error)
            self.is_enabled = False
            return [NEVER] * len(plan.pieces)
        return stamps

    def _look(self, plan: Plan, step: int, stamps: list[int], device_sums: Fingerprint) -> None:
        if plan is not self._plan:
            self._begin(plan)
        sums = self._checksums(device_sums)
        for one in self._frozen:
            is_changed = self._is_changed(one, sums.get(one.index))
            one.changes = one.changes + 1 if is_changed else 0
            # Once more after a change: memory that a device writes to was marked when the transfer began, not when it ended.
            if is_changed or one.is_recent:
                one.since = step
            one.is_recent = is_changed
            stamps[one.index] = one.since
        self._drop_restless()

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self._watch, self._plan, self._frozen = None, None, []

    def _begin(self, plan: Plan) -> None:
        """Another plan: what was known of the former one's memory no longer holds."""
        self._plan = plan
        self._frozen = [
            _Frozen(index, piece)
            for index, piece in enumerate(plan.pieces)
            if piece.is_frozen and piece.end > piece.begin and _can_be_looked_at(piece.source)
        ]
        wanted: dict[int, Range] = {}
        for one in self._frozen:
            source = one.piece.source
            size = one.piece.end - one.piece.begin
            if source.device.type == "cpu" and size >= WATCHED_BYTES and not _is_pinned(source):
                wanted[one.index] = inner_pages(source.data_ptr(), size)
        watched = self._watch_pages(list(wanted.values()))
        for one in self._frozen:
            inner = wanted.get(one.index)
            one.inner = inner if inner in watched else None

    def _watch_pages(self, ranges: list[Range]) -> set[Range]:
        if self._watch is None and ranges and not self._is_refused:
            try:
                self._watch = PageWatch()
            except OSError as error:
                self._is_refused = True
                _log.info("backstay: no page marks (%s): frozen tensors are checksummed for each snapshot", error)
        return set() if self._watch is None else self._watch.watch(ranges)

    def _checksums(self, device_sums: Fingerprint) -> dict[int, int]:
        """Of the pieces that are neither watched nor small, before anything of them is copied."""
        on_device = [one for one in self._frozen if one.piece.source.device.type != "cpu"]
        sums = dict(zip((one.index for one in on_device), device_sums([one.piece for one in on_device]), strict=True))
        for one in self._frozen:
            size = one.piece.end - one.piece.begin
            if one.piece.source.device.type == "cpu" and one.inner is None and size >= WATCHED_BYTES:
                sums[one.index] = crc32c(raw_memory.view_at(one.piece.source.data_ptr(), size))
        return sums

    def _is_changed(self, one: _Frozen, checksum: int | None) -> bool:
        if checksum is not None:
            former, one.checksum = one.checksum, checksum
            return checksum != former
        is_clean = True
        if one.inner is not None:
            assert self._watch is not None
            is_clean = self._watch.is_clean(one.inner)
            if not is_clean and not self._watch.protect(one.inner):
                one.inner = None  # not the memory that was registered: checksums from now on
        edges, one.edges = one.edges, _edges(one)
        return not is_clean or edges != one.edges

    def _drop_restless(self) -> None:
        """Watching what changes all the time costs a fault per page and gains nothing."""
        restless = [one for one in self._frozen if one.changes >= RESTLESS]
        if not restless:
            return
        self._warn_of_replicas({one.piece.name for one in restless})
        self._frozen = [one for one in self._frozen if one.changes < RESTLESS]
        if self._watch is not None:
            self._watch.watch([one.inner for one in self._frozen if one.inner is not None])

    def _warn_of_replicas(self, names: set[str]) -> None:
        """Of what replicas share each rank writes a part; DDP keeps only that the same which has gradients."""
        assert self._plan is not None
        tensors = [t for t in self._plan.holdings.tensors if t.name in names and len(t.replicas) > 1]
        shared = [tensor.name for tensor in tensors if not isinstance(tensor.living, DTensor)]
        if shared and not self._is_warned:
            self._is_warned = True
            _log.warning(
                "backstay: %s needs no gradient, so DDP does not synchronize it, and it changes (%d tensors in all). That is "
                "correct if all ranks change it alike, such as a teacher. If each rank changes it by its own data, such as a "
                "codebook, a snapshot mixes ranks: make it a buffer, or have DDP ignore it",
                shared[0],
                len(shared),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotContent:
    """What a committed capture left in its slot: stamps by piece of ``layout``, and the digests it was committed with."""

    layout: Layout
    stamps: tuple[int, ...]
    chunk_crcs: str
    tensor_crcs: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What of a slot stays as it is: pieces by index, and the chunks that lie wholly within them (and the header)."""

    pieces: frozenset[int] = frozenset()
    chunks: tuple[range, ...] = ()
    content: SlotContent | None = None

    def copy_digests(self, digester: Digester, layout: Layout) -> None:
        """Give the digests of what is kept to ``digester``."""
        if self.content is not None:
            crcs, names = self.content.chunk_crcs, [layout.entries[index].name for index in self.pieces]
            for chunks in self.chunks:
                digester.assume(chunks, crcs[8 * chunks.start : 8 * chunks.stop])
            digester.assume_tensors({name: self.content.tensor_crcs[name] for name in names})


def kept(plan: Plan, stamps: Sequence[int], content: SlotContent | None) -> Kept:
    """What a slot with ``content`` holds already of a capture with these stamps."""
    if content is None or content.layout is not plan.layout:
        return Kept()
    same = [now != NEVER and now == then for now, then in zip(stamps, content.stamps, strict=True)]
    pieces = frozenset(index for index, is_same in enumerate(same) if is_same)
    if not pieces:
        return Kept()
    chunks = tuple(inside for inside, value in _runs(plan, [int(is_same) for is_same in same], header=1) if value)
    return Kept(pieces=pieces, chunks=chunks, content=content)


def unchanged(plan: Plan, stamps: Sequence[int], step: int) -> tuple[UnchangedRange, ...]:
    """What the manifest of ``step`` states as unchanged; the longest ranges, if there are too many."""
    found = [
        UnchangedRange(first_chunk=inside.start, chunk_count=len(inside), since_step=stamp)
        for inside, stamp in _runs(plan, stamps, header=NEVER)
        if NEVER < stamp < step
    ]
    longest = sorted(found, key=lambda one: -one.chunk_count)[:MAX_STATED]
    return tuple(sorted(longest, key=lambda one: one.first_chunk))


def _runs(plan: Plan, values: Sequence[int], *, header: int) -> Iterator[tuple[range, int]]:
    """Chunks that lie wholly within neighbours of one value, with that value."""
    size = plan.layout.size_bytes
    begin, value = 0, header
    ends = [(piece.begin, values[index]) for index, piece in enumerate(plan.pieces) if piece.end > piece.begin]
    for end, following in [*ends, (size, None)]:
        if following == value:
            continue
        last = -(-end // CHUNK_BYTES) if end == size else end // CHUNK_BYTES
        inside = range(-(-begin // CHUNK_BYTES), last)
        if inside:
            yield inside, value
        begin = end
        if following is not None:
            value = following


def _edges(one: _Frozen) -> bytes:
    begin, size = one.piece.source.data_ptr(), one.piece.end - one.piece.begin
    if one.inner is None:
        return bytes(raw_memory.view_at(begin, size)) if size < WATCHED_BYTES else b""
    head, tail = one.inner[0] - begin, begin + size - one.inner[1]
    return bytes(raw_memory.view_at(begin, head)) + bytes(raw_memory.view_at(one.inner[1], tail))


def _can_be_looked_at(source: torch.Tensor) -> bool:
    return (
        source.is_cuda and source.is_contiguous() if source.device.type != "cpu" else raw_memory.is_plain_memory(source)
    )


def _is_pinned(source: torch.Tensor) -> bool:
    """Whether a GPU may write there behind the kernel's back; asks only a CUDA that the trainer began to use."""
    return torch.cuda.is_available() and torch.cuda.is_initialized() and source.is_pinned()
