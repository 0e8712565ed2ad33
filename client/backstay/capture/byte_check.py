"""Checks the fence byte by byte: a snapshot copied in the background is compared with the living tensors.

Discards snapshots that differ, with a reason; must not wait for a capture.
"""

from __future__ import annotations

import logging

import torch

from backstay.capture import cuda_copy
from backstay.capture.capture import Capture
from backstay.capture.fill import Filler
from backstay.capture.shard_plan import Piece
from backstay.trainer import raw_memory

_log = logging.getLogger("backstay")


def check(capture: Capture, filler: Filler) -> bool:
    """Discard ``capture`` where its slot is not what the trainer has; call as :func:`changed_tensors`.

    Returns:
        Whether something is updated without the fence: from now on snapshot() must copy before it returns.
    """
    changed = changed_tensors(capture)
    stale = capture.kept_names(changed)
    if stale:
        filler.copy_everything()
        _log.error(
            "backstay: %s was to be unchanged since an earlier snapshot and is not (%d tensors in all); this snapshot is "
            "discarded, and from now on every snapshot copies everything. Earlier ones may hold these tensors as they were "
            "before; please report this",
            stale[0],
            len(stale),
        )
        capture.discard(f"not copied although changed: {', '.join(stale[:5])}")
    elif changed:
        capture.discard(f"changed before the fence: {', '.join(changed[:5])}")
        _log.warning(
            "backstay: %s changed between snapshot(%d) and the optimizer's step (%d tensors in all): something updates "
            "them without the fence. This snapshot is discarded, and from now on snapshot() copies before it returns; call "
            "keeper.fence() before the update to have it done in the background again",
            changed[0],
            capture.step,
            len(changed),
        )
    capture.verdict.set()
    return bool(changed) and not stale


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
