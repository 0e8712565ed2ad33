"""Which stored tensor a rank's tensor is read from, when copies of one name live on several ranks.

Shared things may be taken from any copy if all copies have the same bytes; what is a rank's own goes by logical rank. Must not
guess: parameters that differ from rank to rank are refused where it is not clear which one is meant.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from backstay.format.digest import combine
from backstay.format.manifest import TensorEntry
from backstay.restore.snapshot import OpenedSnapshot
from backstay.trainer.local_tensors import split_name


class Naming:
    """Finds stored names for the rank ``rank`` of a world of ``world_size``."""

    def __init__(self, opened: OpenedSnapshot, *, rank: int, world_size: int) -> None:
        self._opened, self._rank = opened, rank
        self._is_same_size = world_size == opened.world_size
        self._copies: dict[str, dict[int, str]] = {}  # bare name -> home -> stored name
        self._contents: dict[str, Hashable] = {}
        for name in opened.names():
            home, bare = split_name(name)
            self._copies.setdefault(bare, {})[home] = name
        for alias, name in opened.aliases().items():
            home, bare = split_name(alias)
            self._copies.setdefault(bare, {}).setdefault(home, name)

    def rename(self, names: Mapping[str, str]) -> None:
        """Look up each name under the other as well."""
        for name, stored in names.items():
            self._copies.setdefault(split_name(name)[1], {}).update(self.copies(stored))

    def copies(self, name: str) -> Mapping[int, str]:
        """Home rank → stored name, for all copies of a name with or without home."""
        return self._copies.get(split_name(name)[1], {})

    def bare_names(self) -> set[str]:
        """All stored names and aliases without their homes."""
        return set(self._copies)

    def find(self, name: str, *, is_own: bool) -> str | None:
        """The stored name to read ``name`` from; None if there is none or it is not clear which (see :meth:`why_not`).

        Args:
            is_own: A thing of this very rank, such as a buffer: of another copy, that of the logical rank is taken.
        """
        home, _ = split_name(name)
        copies = self.copies(name)
        own = copies.get(home)
        if not self._opened.is_whole:
            return own
        if own is not None and (is_own or self._is_same_size):
            return own
        if copies and self.is_one(copies):
            return min(copies.values(), key=self._distance)
        if is_own and copies:
            homes = sorted(copies)
            logical = self._rank % self._opened.world_size
            return copies[logical] if logical in copies else copies[homes[self._rank % len(homes)]]
        return None

    def why_not(self, name: str) -> str:
        """A sentence about a name that :meth:`find` has nothing for."""
        copies = self.copies(name)
        if not copies:
            return f"{split_name(name)[1]} is not in the snapshot"
        homes = sorted(copies)
        shown = ", ".join(map(str, homes[:5])) + (f" and {len(homes) - 5} more" if len(homes) > 5 else "")
        return f"{split_name(name)[1]} differs between ranks {shown}, and none of them is clearly this rank's"

    def is_one(self, copies: Mapping[int, str]) -> bool:
        """Whether all copies have the same bytes."""
        return len(copies) == 1 or len({self.content(stored) for stored in copies.values()}) == 1

    def content(self, stored: str) -> Hashable:
        """Equal for stored tensors that are equal byte for byte (by crc32c)."""
        if stored not in self._contents:
            entries = [entry for _, entry in self._opened.entries(stored)]
            first = entries[0]
            self._contents[stored] = (first.torch_dtype, first.global_shape, _digest(entries))
        return self._contents[stored]

    def _distance(self, stored: str) -> tuple[int, int]:
        """Copies that are on this node come first; others are spread over the ranks that ask."""
        entries = self._opened.entries(stored)
        return max(self._opened.cost(rank) for rank, _ in entries), (
            entries[0][0] - self._rank
        ) % self._opened.world_size


def _digest(entries: list[TensorEntry]) -> Hashable:
    """The crc of the whole tensor if it was stored in runs of rows, else those of its boxes."""
    by_place = {(entry.offsets, entry.shape): entry for entry in entries}
    ordered = [by_place[place] for place in sorted(by_place)]
    row = 0
    crc = 0
    for entry in ordered:
        own = len(entry.offsets)
        is_run = own > 0 and entry.shape[1:own] == entry.global_shape[1:] and entry.offsets[0] == row
        if not is_run:
            return tuple((e.offsets, e.shape, e.crc) for e in ordered)
        row += entry.shape[0]
        crc = combine(crc, entry.crc, entry.end - entry.begin)
    return crc
