"""The tombstone of a run that is over: the only thing by which anything of a run as a whole is deleted. Pure.

Nodes keep it as a file. It names what it covers, as attempts up to one of one world, and never "the run": the name may be used
again at any time, while a node that was away brings back parts of the old histories. Would it cover the name, such a start
would be deleted; were nothing kept, the parts that come back would be restored as if nobody had ended the run.
"""

from __future__ import annotations

import datetime as dt
import enum
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from backstay.errors import UsageError
from backstay.ids import MAX_COUNT, Generation, RunKey, SnapshotKey

MAX_TOMBSTONES = 256  # on one node, and known to one coordinator: all travel in each report
MAX_AGE_S = 30 * 86400.0  # no machine keeps a tmpfs for so long without a reboot, which empties it
MAX_UNIX_S = 1e11  # the year 5138: what lies beyond breaks calendars
MAX_ABSENT = 64  # nodes named in one: it travels in reports, which must not grow with the cluster
MAX_TEXT = 1000  # characters of a name


class Cause(enum.StrEnum):
    FINISHED = "finished"  # every rank called finish()
    FORGOTTEN = "forgotten"  # by an operator: the name is free
    IDLE = "idle"  # no trainer was connected for ``idle_s``
    UNUSED = "unused"  # it never held a snapshot: deleted without being remembered


@dataclass(frozen=True, slots=True, kw_only=True)
class Tombstone:
    """Every history of ``run`` up to ``attempt`` is forgotten, as it was known at ``generation``."""

    run: str
    attempt: int  # the newest one that is covered
    generation: int
    cause: Cause
    world_id: str = ""  # wrote that newest attempt; "" = not known
    step: int = 0  # the newest known; of an idle run nothing above is covered: an unseen trainer may have written it
    unix_s: float = 0.0
    idle_s: float = 0.0
    owner: str = ""  # the user whose run it was, a number
    absent: tuple[str, ...] = ()  # nodes that may hold a part and were away, a few of them: the others are served alike

    @property
    def order(self) -> tuple[int, int, float]:
        """Of two tombstones of one run the higher counts."""
        return self.generation, self.attempt, self.unix_s

    def covers(self, key: SnapshotKey, world_id: str = "") -> bool:
        """Whether the part of ``key`` that ``world_id`` wrote is forgotten."""
        if key.attempt != self.attempt:
            return key.attempt < self.attempt
        is_same = not world_id or not self.world_id or world_id == self.world_id
        return is_same and (self.cause is not Cause.IDLE or key.step <= self.step)

    def covers_decision(self, attempt: int, generation: Generation) -> bool:
        """Whether a decision belongs to a forgotten history; one of a later generation began the run anew."""
        return attempt <= self.attempt and generation.number <= self.generation

    @property
    def is_possible(self) -> bool:
        """Whether a coordinator can calculate with it: a node may report anything."""
        try:
            RunKey.parse(self.run)
        except UsageError:
            return False
        numbers = (self.attempt, self.generation, self.step)
        texts = (self.world_id, self.owner, *self.absent)
        return (
            all(0 <= number < MAX_COUNT for number in numbers)
            and all(0 <= seconds < MAX_UNIX_S for seconds in (self.unix_s, self.idle_s))
            and len(self.absent) <= MAX_ABSENT
            and max(map(len, texts)) <= MAX_TEXT
        )

    def sentence(self) -> str:
        """What became of the run: ``finished at step 12 on 2026-01-31 09:00 UTC``."""
        when = f"{dt.datetime.fromtimestamp(self.unix_s, dt.UTC):%Y-%m-%d %H:%M} UTC"
        if self.cause is Cause.FINISHED:
            return f"finished at step {self.step} on {when}"
        if self.cause is Cause.IDLE:
            return f"was freed at step {self.step} on {when}, after {_duration(self.idle_s)} without a trainer"
        return f"was forgotten by an operator at step {self.step} on {when}"


def trimmed(tombstones: Iterable[Tombstone], *, now_unix_s: float) -> tuple[Tombstone, ...]:
    """Those that are kept, sorted by run.

    Of too many, the user with most loses the oldest, first those for which no node was away.
    """
    kept = {one.run: one for one in tombstones if now_unix_s - one.unix_s < MAX_AGE_S}
    while len(kept) > MAX_TOMBSTONES:
        counts = Counter(one.owner for one in kept.values())
        most = max(counts, key=lambda owner: (counts[owner], owner))
        oldest = min(
            (one for one in kept.values() if one.owner == most), key=lambda one: (bool(one.absent), one.unix_s)
        )
        del kept[oldest.run]
    return tuple(kept[run] for run in sorted(kept))


def _duration(seconds: float) -> str:
    """``36 h`` or ``90 s``."""
    for unit, length_s in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{seconds:.0f} s"
