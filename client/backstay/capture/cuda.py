"""Device to slot: copies on a side stream straight into registered slot memory.

Inert where there is no GPU: nothing here touches CUDA before a tensor on a GPU is captured.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from backstay.capture.plan import Piece
from backstay.trainer import memory

_log = logging.getLogger(__name__)
_BOUNCE_BYTES = 16 * 1024 * 1024


class DeviceCopier:
    """Copies pieces of one GPU into slots.

    Invariant: a mapping is registered at most once, and unregistered before it is unmapped.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._registered: dict[int, bool] = {}  # address -> whether registration worked
        self._bounce: torch.Tensor | None = None

    def mark_ready(self) -> torch.cuda.Event:
        """An event behind everything the training stream was given so far."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def copy(self, pieces: Sequence[Piece], slot: memory.Mapping, ready: torch.cuda.Event) -> torch.cuda.Event:
        """Enqueue the copies of ``pieces`` behind ``ready``; the event returned says that all bytes are in the slot."""
        is_registered = self._register(slot)
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream), torch.no_grad():
            self._stream.wait_event(ready)
            for piece in pieces:
                if is_registered:
                    target = slot.tensor(piece.begin, piece.end, piece.source.dtype, tuple(piece.source.shape))
                    target.copy_(piece.source, non_blocking=True)
                else:
                    self._copy_by_bounce(piece, slot)
            done = torch.cuda.Event()
            done.record(self._stream)
        return done

    def hold_stream(self, done: torch.cuda.Event) -> None:
        """Make the training stream wait for ``done``; the host goes on."""
        torch.cuda.current_stream(self.device).wait_event(done)

    def forget(self, slot: memory.Mapping) -> None:
        """Unregister a slot that is about to be unmapped."""
        if self._registered.pop(slot.address, False):
            torch.cuda.cudart().cudaHostUnregister(slot.address)

    def _register(self, slot: memory.Mapping) -> bool:
        if slot.address not in self._registered:
            code = int(torch.cuda.cudart().cudaHostRegister(slot.address, slot.size_bytes, 0))
            self._registered[slot.address] = code == 0
            if code != 0:
                _log.warning(
                    "CUDA does not register a slot of %d bytes (cudaHostRegister: error %d; is the memlock limit too low?); "
                    "copying through a pinned buffer instead, which costs one more copy",
                    slot.size_bytes,
                    code,
                )
        return self._registered[slot.address]

    def _copy_by_bounce(self, piece: Piece, slot: memory.Mapping) -> None:
        """Through pinned memory of our own: a second copy, needed because the slot's pages are not registered."""
        if self._bounce is None:
            self._bounce = torch.empty(_BOUNCE_BYTES, dtype=torch.uint8, pin_memory=True)
        source = piece.source.contiguous().reshape(-1).view(torch.uint8)
        for begin in range(0, piece.end - piece.begin, _BOUNCE_BYTES):
            part = source[begin : begin + _BOUNCE_BYTES]
            self._bounce[: part.numel()].copy_(part, non_blocking=True)
            self._stream.synchronize()
            memory.copy_bytes(slot.address + piece.begin + begin, self._bounce.data_ptr(), part.numel())


def is_same_on_device(piece: Piece, slot: memory.Mapping) -> bool:
    """Whether the living source still has the bytes that lie in the slot, compared on the source's device."""
    stored = slot.tensor(piece.begin, piece.end, piece.source.dtype, tuple(piece.source.shape)).to(piece.source.device)
    left, right = (t.contiguous().reshape(-1).view(torch.uint8) for t in (stored, piece.source))
    return torch.equal(left, right)
