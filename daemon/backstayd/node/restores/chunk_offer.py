"""What a trainer of another layout was offered, and how far a Fetch of it is: values, shared by session and offers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from backstay.ids import SnapshotKey
from backstayd.core.messages.decisions import Base, ShardSource

CHANGED: Final = "decision_changed"  # ask again: another snapshot, or other sources, may be decided


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """A snapshot that trainers here read chunks of. ``addresses``: for a visit; those of a decision are the node's peers."""

    offer_id: str
    run: str
    base: Base
    sources: tuple[ShardSource, ...]
    addresses: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> SnapshotKey:
        return SnapshotKey(self.base.attempt, self.base.step)


@dataclass(slots=True)
class Totals:
    """Bytes of chunks that trainers of another layout needed on this node, each once, and those that came to it for them."""

    needed_local_bytes: int = 0
    needed_remote_bytes: int = 0
    moved_bytes: int = 0


@dataclass(slots=True)
class Work:
    """One Fetch under way: how much it asked for and how much of that was not here."""

    total_bytes: int = 0
    missing: Callable[[], int] = lambda: 0

    @property
    def done_bytes(self) -> int:
        return self.total_bytes - self.missing()
