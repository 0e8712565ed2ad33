"""Sources that failed verification: one of this node is quarantined, one of a peer is reported to the coordinator.

Chooses no other source: the coordinator does.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Final

from backstayd.coder.jobs import Corrupt
from backstayd.core.messages.plans import FragmentRecord, Quarantined
from backstayd.node.node_state import NodeState
from backstayd.store import remove
from backstayd.store.paths import ShardRef

logger = logging.getLogger(__name__)

MAX_REMOTE_MARKS: Final = 100  # per run


class BadSources:
    """Owns the marks on sources of peers; each is dropped once its holder has had time to verify the source itself."""

    def __init__(self, node: NodeState) -> None:
        self._node = node
        self._remote: dict[str, list[Quarantined]] = {}

    def marks(self, run: str) -> tuple[Quarantined, ...]:
        """Sources of peers that failed verification here."""
        return tuple(self._remote.get(run, ()))

    def forget_run(self, run: str) -> None:
        self._remote.pop(run, None)

    def quarantine(self, corrupt: Corrupt) -> None:
        """Quarantine a bad source of this node; report a bad one of a peer to the coordinator."""
        is_own = corrupt.node in ("", self._node.identity.bulk_address)
        self._note(corrupt.ref.run, self._quarantine(corrupt) if is_own else self._mark(corrupt))

    def quarantine_parity(self, run: str, fragment: FragmentRecord, reason: str) -> None:
        """Quarantine parity of this node that a peer has proven not to fit its stripe."""
        self._note(run, remove.quarantine_fragment(self._node.store, run, fragment, reason=reason))

    def _note(self, run: str, entry: Quarantined | None) -> None:
        if entry is None:
            return
        self._node.metrics.corrupt.labels(where="shard" if entry.rank >= 0 else "parity").inc()
        self._node.log_event(
            "quarantined", run, f"{entry.what} {('on ' + entry.node) if entry.node else 'here'}: {entry.reason}"
        )
        self._node.changed()

    def _quarantine(self, corrupt: Corrupt) -> Quarantined | None:
        store, shard, fragment = self._node.store, corrupt.shard, corrupt.fragment
        if shard is not None:
            return remove.quarantine_shard(store, shard.run, shard.key, rank=shard.rank, reason=corrupt.detail)
        assert fragment is not None
        place = FragmentRecord(plan_id=fragment.plan_id, stripe=fragment.stripe, index=fragment.index)
        return remove.quarantine_fragment(store, fragment.run, place, reason=corrupt.detail)

    def _mark(self, corrupt: Corrupt) -> Quarantined:
        peers, ref = self._node.peers, corrupt.ref
        holder = next((name for name, address in peers.items() if address == corrupt.node), corrupt.node)
        entry = Quarantined(
            what=str(corrupt), attempt=ref.key.attempt, step=ref.key.step, reason=corrupt.detail, node=holder
        )
        if isinstance(ref, ShardRef):
            entry = replace(entry, rank=ref.rank)
        else:
            entry = replace(entry, plan_id=ref.plan_id, stripe=ref.stripe, index=ref.index, is_misfit=corrupt.is_misfit)
        asyncio.get_running_loop().call_later(max(5.0, 3 * self._node.lease_s), self._forget_mark, ref.run, entry)
        marks = self._remote.setdefault(ref.run, [])
        if entry not in marks:
            marks.append(entry)
            del marks[:-MAX_REMOTE_MARKS]
            self._node.store.corrupt_count += 1
            logger.error("%s on %s is corrupt: %s; trying the next source", entry.what, holder, entry.reason)
        return entry

    def _forget_mark(self, run: str, entry: Quarantined) -> None:
        """The holder has verified the source by now: its own report counts again."""
        marks = self._remote.get(run, [])
        if entry in marks:
            marks.remove(entry)
            self._node.changed()
