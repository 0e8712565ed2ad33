"""Device to slot: copies on a side stream straight into registered slot memory.

Inert where there is no GPU: nothing here touches CUDA before a tensor on a GPU is captured.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import torch

from backstay.capture.shard_plan import Piece
from backstay.trainer import raw_memory

_log = logging.getLogger(__name__)
_BOUNCE_BYTES = 16 * 1024 * 1024
_SUM_WORDS = 4 * 1024 * 1024  # one launch of the checksum; its scratch takes three times as many bytes as the words


class DeviceCopier:
    """Copies pieces of one GPU into slots.

    Invariant: a mapping is registered at most once, and unregistered before it is unmapped.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._registered: dict[int, bool] = {}  # address -> whether registration worked
        self._bounce: torch.Tensor | None = None
        self._weights: torch.Tensor | None = None

    def mark_ready(self) -> torch.cuda.Event:
        """An event recorded after everything that was enqueued on the training stream so far."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def copy(self, pieces: Sequence[Piece], slot: raw_memory.Mapping, ready: torch.cuda.Event) -> torch.cuda.Event:
        """Enqueue the copies of ``pieces`` behind ``ready``; the returned event completes when all bytes are in the slot."""
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

    def checksums(self, pieces: Sequence[Piece], ready: torch.cuda.Event) -> list[int]:
        """A checksum of each (contiguous) piece as it is behind ``ready``, computed where it lies; blocking."""
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream), torch.no_grad():
            self._stream.wait_event(ready)
            if self._weights is None:
                self._weights = make_weights(self.device)
            sums = torch.stack([checksum(piece.source, self._weights) for piece in pieces]).cpu()
        return [int(one) for one in sums.tolist()]

    def hold_stream(self, done: torch.cuda.Event) -> None:
        """Make the training stream wait for ``done``; the host does not wait."""
        torch.cuda.current_stream(self.device).wait_event(done)

    def forget(self, slot: raw_memory.Mapping) -> None:
        """Unregister a slot that is about to be unmapped."""
        if self._registered.pop(slot.address, False):
            torch.cuda.cudart().cudaHostUnregister(slot.address)

    def _register(self, slot: raw_memory.Mapping) -> bool:
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

    def _copy_by_bounce(self, piece: Piece, slot: raw_memory.Mapping) -> None:
        """Through pinned memory of our own: a second copy, needed because the slot's pages are not registered."""
        if self._bounce is None:
            self._bounce = torch.empty(_BOUNCE_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
        source = piece.source.contiguous().reshape(-1).view(torch.uint8)
        for begin in range(0, piece.end - piece.begin, _BOUNCE_BYTES):
            part = source[begin : begin + _BOUNCE_BYTES]
            self._bounce[: part.numel()].copy_(part, non_blocking=True)
            self._stream.synchronize()
            raw_memory.copy_bytes(slot.address + piece.begin + begin, self._bounce.data_ptr(), part.numel())


def is_same_on_device(piece: Piece, slot: raw_memory.Mapping) -> bool:
    """Whether the living source still has the bytes that lie in the slot, compared on the source's device."""
    stored = slot.tensor(piece.begin, piece.end, piece.source.dtype, tuple(piece.source.shape)).to(piece.source.device)
    living = piece.source.resolve_conj().resolve_neg()
    left, right = (t.contiguous().reshape(-1).view(torch.uint8) for t in (stored, living))
    return torch.equal(left, right)


def make_weights(device: torch.device, words: int = _SUM_WORDS) -> torch.Tensor:
    """Random 64-bit weights for :func:`checksum`, drawn from a generator of its own."""
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(os.urandom(7)))
    return torch.randint(-(2**63), 2**63 - 1, (words,), dtype=torch.int64, generator=generator, device="cpu").to(device)


def checksum(tensor: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """A 0-dim int64 sum over 32-bit words, each times a random 64-bit weight, modulo 2**64.

    Words differ by less than 2**32, so whatever changed, few in 2**32 draws of the weights give the same sum (multilinear
    hashing: Lemire and Kaser, "Strongly universal string hashing is fast", 2014). Blocks have a random factor each.
    """
    raw = tensor.reshape(-1).view(torch.uint8)
    block_bytes = 4 * weights.numel()
    scratch = torch.empty(min(weights.numel(), -(-raw.numel() // 4)), dtype=torch.int64, device=raw.device)
    sums = []
    for begin in range(0, raw.numel(), block_bytes):
        words = _words(raw[begin : begin + block_bytes])
        products = torch.mul(words, weights[: words.numel()], out=scratch[: words.numel()])
        sums.append(products.sum())
    factors = weights[torch.arange(len(sums), device=raw.device) % weights.numel()] | 1
    return (torch.stack(sums) * factors).sum()


def _words(raw: torch.Tensor) -> torch.Tensor:
    """Bytes as 32-bit words; copied if they do not begin or end with one."""
    if raw.numel() % 4 == 0 and raw.storage_offset() % 4 == 0:
        return raw.view(torch.int32)
    padded = torch.zeros(-(-raw.numel() // 4) * 4, dtype=torch.uint8, device=raw.device)
    padded[: raw.numel()] = raw
    return padded.view(torch.int32)
