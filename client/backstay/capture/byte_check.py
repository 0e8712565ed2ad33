"""The fence, checked by bytes: what a snapshot copied in the background is compared with what the trainer has now.

Discards snapshots and says why; must not wait for a capture.
"""

from __future__ import annotations

import logging

from backstay.capture.fill import Capture, Filler, changed_tensors

_log = logging.getLogger("backstay")


def check(capture: Capture, filler: Filler) -> bool:
    """Discard ``capture`` where its slot is not what the trainer has; call as :func:`filling.changed_tensors`.

    Returns:
        Whether something is updated without the fence: from now on snapshot() must copy before it returns.
    """
    changed = changed_tensors(capture)
    stale = capture.kept_names(changed)
    if stale:
        filler.fill_whole()
        _log.error(
            "backstay: %s was to be unchanged since an earlier snapshot and is not (%d tensors in all); this snapshot is "
            "discarded, and from now on every snapshot copies everything. Earlier ones may hold these tensors as they were "
            "before; please report this",
            stale[0],
            len(stale),
        )
        capture.spoil(f"not copied although changed: {', '.join(stale[:5])}")
    elif changed:
        capture.spoil(f"changed before the fence: {', '.join(changed[:5])}")
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
