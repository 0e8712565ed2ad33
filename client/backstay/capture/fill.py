"""Filling a slot: each byte is copied once and hashed right behind the copy, while it is still in the cache. What did not
change since this slot was filled last is left as it is.

Bound: one thread that copies and hashes reaches 0.61-0.67 of one-thread memcpy; two threads share the windows, so
that with a core to spare a commit runs at memcpy speed or above. Must not talk to the daemon.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from backstay.capture import cuda_copy, unchanged
from backstay.capture.copy_windows import Windows
from backstay.capture.shard_plan import Piece, Plan
from backstay.trainer import raw_memory

WAITING, COPYING, COPIED, DROPPED = "waiting", "copying", "copied", "dropped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Digests:
    chunk_crcs: str
    tensor_crcs: dict[str, int]


class Capture:
    """One snapshot on its way into a slot.

    States: waiting → copying → copied, or waiting → dropped. Only who moves it out of ``waiting`` decides whether it is
    copied; a capture that is ``copied`` or ``dropped`` does not read living tensors any more.
    """

    def __init__(self, plan: Plan, step: int, *, is_checked: bool, ready: torch.cuda.Event | None) -> None:
        self.plan = plan
        self.step = step
        self.is_checked = is_checked
        self.ready = ready
        self.slot: raw_memory.Mapping | None = None
        self.device_done: torch.cuda.Event | None = None
        self.stamps: Sequence[int] = ()  # by piece: the step since which it is unchanged
        self.kept = unchanged.Kept()  # what of it the slot held already
        self.copied_bytes = self.hashed_bytes = 0
        self.drop_reason = ""
        self.is_late = False  # dropped because its slot did not come in time
        self.settled = threading.Event()  # copied or dropped: neither living tensors nor staging are read any more
        self.launched = threading.Event()  # settled, or all that is left to read waits behind ``device_done``
        self.began = threading.Event()  # copying, copied or dropped
        self.verdict = threading.Event()  # the byte check was made (or will not be)
        self._state = WAITING
        self._lock = threading.Lock()
        if not is_checked:
            self.verdict.set()

    @property
    def state(self) -> str:
        return self._state

    def begin(self, slot: raw_memory.Mapping) -> bool:
        """Claim the capture for copying; False if it was dropped meanwhile."""
        with self._lock:
            if self._state != WAITING:
                return False
            self._state, self.slot = COPYING, slot
        self.began.set()
        return True

    def drop(self, reason: str) -> bool:
        """Give up a capture that has not begun; False if it has."""
        with self._lock:
            if self._state != WAITING:
                return False
            self._state, self.drop_reason = DROPPED, reason
        for event in (self.began, self.launched, self.settled, self.verdict):
            event.set()
        return True

    def kept_names(self, names: Sequence[str]) -> list[str]:
        """Those of ``names`` that were not copied because the slot held them already."""
        held = {self.plan.pieces[index].name for index in self.kept.pieces}
        return [name for name in names if name in held]

    def spoil(self, reason: str) -> None:
        """Whatever was copied must not be committed."""
        self.drop_reason = self.drop_reason or reason
        self.verdict.set()

    def mark_copied(self) -> None:
        with self._lock:
            self._state = COPIED
        self.began.set()
        self.launched.set()
        self.settled.set()


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

    def fill(self, capture: Capture, slot: raw_memory.Mapping) -> Digests:
        """Copy into ``slot`` what it does not hold already, and hash that; marks the capture copied as soon as no source is
        read any more."""
        content = self._contents.pop(slot, None)  # from here on the slot holds nothing that is known
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
        capture.kept.tell(windows.digester, capture.plan.layout)
        if capture.device_done is not None:
            capture.device_done.synchronize()
        self._run(windows.work)
        capture.mark_copied()
        chunk_crcs, tensor_crcs = windows.digester.finish()
        capture.copied_bytes = sum(p.end - p.begin for p in pieces)
        capture.hashed_bytes = windows.hashed_bytes
        return Digests(chunk_crcs=chunk_crcs, tensor_crcs=tensor_crcs)

    def vouch(self, capture: Capture, digests: Digests) -> None:
        """The capture was committed: its slot holds it until it is filled again."""
        assert capture.slot is not None
        self._contents[capture.slot] = unchanged.SlotContent(
            layout=capture.plan.layout,
            stamps=tuple(capture.stamps),
            chunk_crcs=digests.chunk_crcs,
            tensor_crcs=digests.tensor_crcs,
        )

    def forget_slots(self) -> None:
        """Nothing is known of what the slots hold."""
        self._contents.clear()

    def fill_whole(self) -> None:
        """For good: a tensor that was to be unchanged was not."""
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


def changed_tensors(capture: Capture) -> list[str]:
    """Names of lazily captured tensors whose living bytes differ from those in the slot: the fence did not hold.

    Call before the optimizer changes anything, on the training thread.
    """
    slot = capture.slot
    assert slot is not None
    if capture.device_done is not None:
        capture.device_done.synchronize()
    return [
        piece.name
        for piece in capture.plan.pieces
        if not piece.is_eager and piece.end > piece.begin and not _is_unchanged(piece, slot)
    ]


def _is_unchanged(piece: Piece, slot: raw_memory.Mapping) -> bool:
    if raw_memory.is_plain_memory(piece.source):
        return raw_memory.is_same_bytes(slot.address + piece.begin, piece.source.data_ptr(), piece.end - piece.begin)
    with torch.no_grad():
        return cuda_copy.is_same_on_device(piece, slot)


def _is_plain(piece: Piece) -> bool:
    return raw_memory.is_plain_memory(piece.source)
