"""Which ranks the others wait for: those that have not called restore(), or do not call snapshot(). Pure; decides nothing.

One rank that never calls keeps the world from starting, or every snapshot from becoming complete, and only the coordinator sees
which one it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from backstayd.core.inventory.nodes import natural
from backstayd.core.inventory.run_context import World, is_waiting
from backstayd.core.messages.desired import MissingRanks
from backstayd.core.messages.report import SessionPhase
from backstayd.core.sentences import amount, listed

NAMED = 8  # ranks and nodes named in a sentence
SILENT_LEASES = 2.0  # since its last snapshot: a report is late by less than one
PASSED = 2  # snapshots that the others took meanwhile: a rank may be late for one


@dataclass(frozen=True, slots=True)
class _Offer:
    """The newest step that a rank offered, when that was first seen, and how often the world's newest had grown by then."""

    step: int
    at_s: float
    moves: int


@dataclass(slots=True)
class Missing:
    """Invariant: ``found`` names ranks of one world, for which the others have waited a lease at least."""

    found: MissingRanks | None = None
    _world_id: str = ""
    _asked: set[int] = field(default_factory=set)  # ranks that were seen in restore()
    _since_s: float = 0.0  # when the last of them came
    _newest: int = 0
    _moves: int = 0
    _offers: dict[int, _Offer] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """About ranks that do not call snapshot(); "" if all do."""
        return self.found.sentence if self.found is not None and self.found.is_training else ""

    def look(
        self, worlds: Mapping[str, World], *, training: str, size: int, base_step: int, lease_s: float, now_s: float
    ) -> None:
        """Look at every session. ``training``: the world that trains now, of ``size`` ranks, from ``base_step`` on; or ""."""
        forming = [
            world_id
            for world_id, world in worlds.items()
            if world_id != training
            and not is_waiting(world)
            and any(session.record.phase is SessionPhase.RESTORING for session in world.values())
        ]
        if forming:
            world_id = max(forming, key=lambda name: (len(worlds[name]), name))
            self._turn_to(world_id, now_s)
            self.found = self._unasked(worlds[world_id], lease_s=lease_s, now_s=now_s)
        elif training and len(worlds.get(training, ())) == size:
            self._turn_to(training, now_s)
            self.found = self._unoffered(worlds[training], base_step=base_step, lease_s=lease_s, now_s=now_s)
        else:
            self._turn_to("", now_s)

    def _turn_to(self, world_id: str, now_s: float) -> None:
        if world_id != self._world_id:
            self.found, self._world_id, self._asked, self._since_s = None, world_id, set(), now_s
            self._newest, self._moves, self._offers = 0, 0, {}

    def _unasked(self, world: World, *, lease_s: float, now_s: float) -> MissingRanks | None:
        size = max(session.record.world_size for session in world.values())
        before = len(self._asked)
        self._asked.update(world)  # a rank that gave up at its deadline has called, too
        if len(self._asked) != before:
            self._since_s = now_s
        count = size - len(self._asked)
        if now_s - self._since_s < lease_s or count <= 0:
            return None
        missing = (rank for rank in range(size) if rank not in self._asked)
        ranks = tuple(itertools.islice(missing, NAMED))  # the size is only claimed: no walk over all of it
        sentence = f"{_named(ranks, count)} of {size} {'has' if count == 1 else 'have'} not called restore()"
        return MissingRanks(world_id=self._world_id, ranks=ranks, count=count, sentence=sentence)

    def _unoffered(self, world: World, *, base_step: int, lease_s: float, now_s: float) -> MissingRanks | None:
        offered = {
            rank: max(session.record.last_step, session.record.skipped_step)
            for rank, session in world.items()
            if session.record.phase is SessionPhase.TRAINING
        }
        newest = max(offered.values(), default=0)
        if newest > self._newest:
            self._newest, self._moves = newest, self._moves + 1
        silent = []
        for rank, step in offered.items():
            known = self._offers.get(rank)
            if known is None or known.step != step:
                self._offers[rank] = _Offer(step, now_s, self._moves)
            elif (
                step < newest and self._moves - known.moves >= PASSED and now_s - known.at_s >= SILENT_LEASES * lease_s
            ):
                silent.append(rank)
        if not silent:
            return None
        silent.sort()
        nodes = sorted({world[rank].node for rank in silent}, key=natural)
        since = min(offered[rank] for rank in silent)
        where = f" on {listed(nodes[:NAMED])}" if len(nodes) <= NAMED else ""
        return MissingRanks(
            world_id=self._world_id,
            ranks=tuple(silent[:NAMED]),
            count=len(silent),
            is_training=True,
            sentence=f"{_named(silent[:NAMED], len(silent))}{where} {'has' if len(silent) == 1 else 'have'} taken no snapshot "
            f"since {f'step {since}' if since > base_step else 'restore()'}, so none of the others becomes complete; "
            "call snapshot(step) on every rank, after the same steps",
        )


def _named(ranks: Sequence[int], count: int) -> str:
    """``rank 3``, ``ranks 3 and 4``, ``20 ranks (3, 4, 5, ...)``."""
    if count > len(ranks):
        return f"{amount(count, 'rank')} ({', '.join(map(str, ranks))}, ...)"
    return f"rank{'' if count == 1 else 's'} {listed(ranks)}"
