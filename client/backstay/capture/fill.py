"""Filling a slot: each byte is copied once and hashed right behind the copy, while it is still in the cache. What did not
change since this slot was filled last is left as it is.

Bound: one thread that copies and hashes reaches 0.61-0.67 of one-thread memcpy; two threads share the windows, so
that with a core to spare a commit runs at memcpy speed or above. Must not communicate with the daemon.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from weakref import WeakKeyDictionary

import torch

from backstay.capture import cuda_copy, unchanged
from backstay.capture.capture import Capture
from backstay.capture.copy_windows import Windows
from backstay.capture.shard_plan import Piece
from backstay.format.digest import Digests
from backstay.trainer import raw_memory


class Filler:
    """Copies captures into slots with up to two threads: the caller's and one of its own."""

    def __init__(self, *, rank: int, thread_count: int | None = None) -> None:
        cores = len(os.sched_getaffinity(0))
        self._rank = rank
        self._thread_count = min(2, cores) if thread_count is None else thread_count
        self._pool: ThreadPoolExecutor | None = None
        self.copiers: dict[torch.device, cuda_copy.DeviceCopier] = {}
        self._tracker = unchanged.Tracker()
        self._contents: WeakKeyDictionary[raw_memory.Mapping, unchanged.SlotContent] = WeakKeyDictionary()

    def copier(self, device: torch.device) -> cuda_copy.DeviceCopier:
        if device not in self.copiers:
            self.copiers[device] = cuda_copy.DeviceCopier(device)
        return self.copiers[device]

    def forget(self, slot: raw_memory.Mapping) -> None:
        """The slot is about to be unmapped."""
        for copier in self.copiers.values():
            copier.forget(slot)

    def fill(self, capture: Capture, slot: raw_memory.Mapping) -> Digests:
        """Copy into ``slot`` what it does not hold already, and hash that; marks the capture copied as soon as no source is
        needed."""
        content = self._contents.pop(slot, None)  # from here on the slot's content is unknown
        pieces = self._changed_pieces(capture, content)
        device_pieces = [p for p in pieces if p.source.device.type == "cuda" and p.end > p.begin]
        if device_pieces:
            assert capture.ready is not None
            capture.device_done = self.copier(device_pieces[0].source.device).copy(device_pieces, slot, capture.ready)
        with torch.no_grad():
            for piece in pieces:
                if piece.source.device.type == "cpu" and not _is_plain(piece) and piece.end > piece.begin:
                    target = slot.tensor(piece.begin, piece.end, piece.source.dtype, tuple(piece.source.shape))
                    target.copy_(piece.source)
        plain = [p for p in pieces if p.end > p.begin and _is_plain(p)]
        if capture.device_done is not None and all(p.is_eager for p in plain):
            for piece in plain:  # small, and at once: the next snapshot may stage over them after the fence
                raw_memory.copy_bytes(slot.address + piece.begin, piece.source.data_ptr(), piece.end - piece.begin)
            plain = []
            capture.launched.set()  # the fence makes the training stream wait for device_done
        windows = Windows(capture, slot, plain, rank=self._rank)
        capture.kept.copy_digests(windows.digester, capture.plan.layout)
        if capture.device_done is not None:
            capture.device_done.synchronize()
        self._run(windows.work)
        capture.mark_copied()
        digests = windows.digester.finish()
        capture.copied_bytes = sum(p.end - p.begin for p in pieces)
        capture.hashed_bytes = windows.hashed_bytes
        return digests

    def note_committed(self, capture: Capture, digests: Digests) -> None:
        """The capture was committed: its slot holds these bytes until it is filled again."""
        assert capture.slot is not None
        self._contents[capture.slot] = unchanged.SlotContent(
            layout=capture.plan.layout,
            stamps=tuple(capture.stamps),
            chunk_crcs=digests.chunk_crcs,
            tensor_crcs=digests.tensor_crcs,
        )

    def forget_slots(self) -> None:
        """What the slots hold counts as unknown from now on."""
        self._contents.clear()

    def copy_everything(self) -> None:
        """From now on: a tensor that was assumed unchanged was not."""
        self._tracker.is_enabled = False  # by another thread than the one that uses it: that one closes it

    def close(self) -> None:
        self._tracker.close()
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None

    def _changed_pieces(self, capture: Capture, content: unchanged.SlotContent | None) -> list[Piece]:
        """Decide what is copied."""
        plan = capture.plan
        capture.stamps = self._tracker.look(plan, capture.step, lambda pieces: self._device_sums(pieces, capture))
        capture.kept = unchanged.kept(plan, capture.stamps, content)
        return [piece for index, piece in enumerate(plan.pieces) if index not in capture.kept.pieces]

    def _device_sums(self, pieces: Sequence[Piece], capture: Capture) -> list[int]:
        if not pieces:
            return []
        assert capture.ready is not None
        return self.copier(pieces[0].source.device).checksums(pieces, capture.ready)

    def _run(self, work: Callable[[], None]) -> None:
        if self._thread_count == 1:
            work()
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=self._thread_count - 1, thread_name_prefix="backstay-copy")
        futures: list[Future[None]] = []
        with contextlib.suppress(RuntimeError):  # the interpreter is ending: no new threads then, this one does it all
            futures += [self._pool.submit(work) for _ in range(self._thread_count - 1)]
        try:
            work()
        finally:
            for future in futures:
                future.result()


def _is_plain(piece: Piece) -> bool:
    return raw_memory.is_plain_memory(piece.source)
