"""What lies on durable storage for one run: from surveys that nodes make, kept up to date with what was written since. Pure.

Invariant: a run is called new, and what is in memory the newest, only after a node has listed the run's directory for that very
decision. An older list does not do: another cluster may have written there since. Decides nothing about copies or pruning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from backstay.errors import UsageError
from backstay.ids import Generation, SnapshotKey, snapshot_id
from backstayd.core.inventory.catalog import Inventory, SnapshotView
from backstayd.core.inventory.durable_names import snapshot_url
from backstayd.core.inventory.lineage import is_live, is_live_place
from backstayd.core.inventory.nodes import Liveness, NodeState, natural
from backstayd.core.messages.decisions import Decision, Distrusted, Lineage
from backstayd.core.messages.durable import PersistedSnapshot, Survey
from backstayd.core.messages.report import RunReport

WAIT_LEASES = 10  # for a survey where memory has nothing to restore: there is no other source
SHORT_WAIT_LEASES = 3  # where memory has: an outage of storage must not hold up a restart for long
SURVEY_DEADLINE_S = 60.0  # after which a node gives one up; until then a world without memory waits for it
KEPT_PROBLEMS = 64
MAX_NUMBER = 1 << 62  # of what a record counts: the wire has 64 bits, and decisions count on from there
MAX_USER = 1 << 32


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageState:
    """What a decision knows of durable storage."""

    url: str = ""  # the run's directory; "" = no durable storage
    is_ready: bool = True  # it was listed, or waiting longer would not help
    error: str = ""  # why it could not be listed for this decision; "" if it was
    is_known: bool = False  # something of the run lies there, whole or not
    records: tuple[PersistedSnapshot, ...] = ()  # newest first
    problems: Mapping[str, str] = field(default_factory=dict)  # by snapshot id: why it cannot be read
    newest_attempt: int = 0  # of all that lies there, whole or not
    unreadable: Mapping[SnapshotKey, str] = field(default_factory=dict)  # by snapshot: why its record cannot be used

    @property
    def newest_generation(self) -> int:
        return max((record.generation for record in self.records), default=0)

    def is_ahead_of(self, head: Decision | None) -> bool:
        """Whether attempts lie there that began after ``head``, the newest decision that a node remembers."""
        return self.newest_attempt > (head.attempt if head is not None else 0)

    def url_of(self, record: PersistedSnapshot) -> str:
        """Its directory; "" if what lies there is corrupt."""
        return "" if record.snapshot_id in self.problems else snapshot_url(self.url, record.key)

    def problem_at(self, key: SnapshotKey) -> str:
        """Why what lies there for ``key`` cannot be read; "" if it can, or nothing does."""
        if key in self.unreadable:
            return f"its completion record in {snapshot_url(self.url, key)} cannot be used: {self.unreadable[key]}"
        return next(
            (self.problems[r.snapshot_id] for r in self.records if r.key == key and r.snapshot_id in self.problems), ""
        )

    def unreadable_above(self, key: SnapshotKey, lineage: Sequence[Lineage]) -> SnapshotKey | None:
        """The newest snapshot after ``key`` that may be of the live history and whose record cannot be used."""
        newest = lineage[0].attempt if lineage else 0
        return max(
            (k for k in self.unreadable if k > key and (k.attempt > newest or is_live_place(k, lineage))), default=None
        )


def why_no_snapshot(record: PersistedSnapshot, *, run: str, key: SnapshotKey) -> str:
    """What is wrong with a completion record found in the directory of ``key``; "" for a sound one."""
    if record.run != run:
        return f"it is of run {record.run}"
    if record.key != key:
        return f"it is of step {record.step} of attempt {record.attempt}"
    if not record.shards or len(record.shards) != record.world_size:  # before anything grows with a claimed size
        return f"it names {len(record.shards)} shards of {record.world_size} ranks"
    if [shard.rank for shard in record.shards] != list(range(len(record.shards))):
        return "its shards are not listed in the order of ranks"
    try:
        found = snapshot_id(
            key=key, world_size=record.world_size, shard_digests=[shard.digest for shard in record.shards]
        )
    except UsageError as error:
        return str(error)
    if found != record.snapshot_id:
        return "its snapshot id is not that of its digests"
    return _why_no_numbers(record)


def _why_no_numbers(record: PersistedSnapshot) -> str:
    """Numbers in it that would break whoever calculates with them, nodes and coordinator alike; "" if none would."""
    lineage = (number for one in record.lineage for number in (one.attempt, one.base_attempt, one.base_step))
    sizes = (shard.size_bytes for shard in record.shards)
    numbers = (record.attempt, record.step, record.serial, record.generation, *lineage, *sizes)
    wrong = [number for number in numbers if not 0 <= number < MAX_NUMBER]
    if wrong:
        return f"it counts {wrong[0]}, outside 0 to {MAX_NUMBER - 1}"
    owner = record.owner
    if owner and not (owner.isascii() and owner.isdecimal() and len(owner) <= 10 and int(owner) < MAX_USER):
        return f"its owner {owner[:40]!r} is not a user's number"
    return ""


def with_urls(views: Sequence[SnapshotView], storage: StorageState) -> tuple[SnapshotView, ...]:
    """``views``, with the URLs of those that also lie on durable storage."""
    urls = {record.snapshot_id: storage.url_of(record) for record in storage.records}
    return tuple(replace(v, url=urls[v.snapshot_id]) if urls.get(v.snapshot_id) else v for v in views)


def live_records(storage: StorageState, lineage: Sequence[Lineage]) -> tuple[PersistedSnapshot, ...]:
    """Those of the live history, newest first."""
    return tuple(record for record in storage.records if is_live(view_of_record(record), lineage))


def stored_views(
    views: Sequence[SnapshotView], records: Sequence[PersistedSnapshot], storage: StorageState, inventory: Inventory
) -> tuple[SnapshotView, ...]:
    """``records`` that are not among ``views``, with the nodes that still hold some of their shards."""
    in_memory = {view.snapshot_id for view in views}
    found = []
    for record in records:
        if record.snapshot_id not in in_memory:
            holders = {
                shard.rank: tuple(sorted(inventory.holders(record.key, shard.rank, shard.digest), key=natural))
                for shard in record.shards
            }
            spares = {rank: len(nodes) - 1 for rank, nodes in holders.items()}
            url = storage.url_of(record)
            found.append(replace(view_of_record(record), holders=holders, rank_spares=spares, url=url))
    return tuple(found)


def view_of_record(record: PersistedSnapshot) -> SnapshotView:
    """The snapshot of a completion record, without where it lies."""
    own = next((entry for entry in record.lineage if entry.attempt == record.attempt), None)
    return SnapshotView(
        key=record.key,
        world_size=record.world_size,
        snapshot_id=record.snapshot_id,
        world_id=own.world_id if own is not None else "",
        digests={shard.rank: shard.digest for shard in record.shards},
        sizes={shard.rank: shard.size_bytes for shard in record.shards},
        layouts={shard.rank: shard.layout for shard in record.shards},
        holders={},
        plans=(),
        rank_spares={},
    )


@dataclass(slots=True)
class Surveying:
    """State of one run. Invariant: ``known`` holds sound records only, each filed under its snapshot id."""

    url: str
    lease_s: float
    survey_id: str = ""
    fence: int = -1  # the generation of the decision that the newest survey is for
    serial: int = 0
    asked_s: float = 0.0
    asked: dict[tuple[str, str], str] = field(default_factory=dict)  # by node and incarnation: its error so far
    is_answered: bool = False
    is_known: bool = False
    known: dict[str, PersistedSnapshot] = field(default_factory=dict)
    written: dict[str, PersistedSnapshot] = field(default_factory=dict)  # since the newest survey was asked for
    partial: dict[SnapshotKey, float] = field(default_factory=dict)  # directories without a record: when first seen
    unreadable: dict[SnapshotKey, str] = field(default_factory=dict)  # those with one that cannot be used: why
    problems: dict[str, str] = field(default_factory=dict)  # by snapshot id: why it cannot be read
    marks: dict[str, Distrusted] = field(default_factory=dict)  # of distrust, by snapshot id
    marked: dict[str, Distrusted] = field(default_factory=dict)  # since the newest survey was asked for
    struck: set[str] = field(default_factory=set)  # removed since then

    @property
    def error(self) -> str:
        """Why the newest survey has no answer yet."""
        if self.is_answered or not self.survey_id:
            return ""
        return next((error for error in self.asked.values() if error), "no node has listed it yet")

    def ask(
        self, run: str, nodes: Mapping[str, NodeState], generation: Generation, *, fence: int, now_s: float
    ) -> None:
        """Want a fresh survey."""
        self.serial += 1
        self.survey_id = f"{generation.incarnation[:8]}-{self.serial}"
        self.fence, self.asked_s = fence, now_s
        self.asked, self.is_answered, self.written = {}, False, {}
        self.marked, self.struck = {}, set()
        self._choose_surveyors(run, nodes)

    def take(self, run: str, nodes: Mapping[str, NodeState], now_s: float) -> None:
        """Look for the answer, and for what readers found corrupt."""
        for name, node in sorted(nodes.items()):
            report = node.runs.get(run)
            if report is None:
                continue
            self._take_problems(report)
            survey = report.survey
            if survey is None or survey.survey_id != self.survey_id or survey.url != self.url or self.is_answered:
                continue
            if survey.error:
                self.asked[name, node.identity.incarnation] = survey.error
            elif survey.is_done:
                self._take_answer(survey, now_s)
        self._choose_surveyors(run, nodes)

    def wants(self, node: str) -> str:
        """The survey that ``node`` should make; "" for none."""
        return self.survey_id if not self.is_answered and any(name == node for name, _ in self.asked) else ""

    def state(self, *, fence: int, has_memory: bool, now_s: float) -> StorageState:
        """What the decision under generation ``fence`` may build on."""
        if not self.url:
            return StorageState()
        is_asked = self.survey_id != "" and self.fence == fence
        is_late = now_s - self.asked_s >= self._limit_s(has_memory=has_memory)
        has_failed = bool(self.asked) and all(self.asked.values())
        return StorageState(
            url=self.url,
            is_ready=is_asked and (self.is_answered or is_late or (has_failed and has_memory)),
            error=self.error,
            is_known=self.is_known,
            records=tuple(sorted(self.known.values(), key=lambda record: record.key, reverse=True)),
            problems=dict(self.problems),
            newest_attempt=max((key.attempt for key in self._keys()), default=0),
            unreadable=dict(self.unreadable),
        )

    def _limit_s(self, *, has_memory: bool) -> float:
        """How long a decision waits for the survey."""
        if has_memory:
            return SHORT_WAIT_LEASES * self.lease_s
        is_listing = any(not error for error in self.asked.values())
        return max(WAIT_LEASES * self.lease_s, SURVEY_DEADLINE_S + self.lease_s if is_listing else 0.0)

    def _keys(self) -> list[SnapshotKey]:
        return [*self.partial, *self.unreadable, *(record.key for record in self.known.values())]

    def note_written(self, record: PersistedSnapshot) -> None:
        """Its completion record lies there now."""
        self.known[record.snapshot_id] = self.written[record.snapshot_id] = record
        self.partial.pop(record.key, None)
        self.problems.pop(record.snapshot_id, None)
        self.is_known = True

    def note_marked(self, mark: Distrusted) -> None:
        """The mark lies there now."""
        self.marks[mark.snapshot_id] = self.marked[mark.snapshot_id] = mark
        self.struck.discard(mark.snapshot_id)

    def note_struck(self, snapshot_id: str) -> None:
        """Its mark lies there no more."""
        self.marks.pop(snapshot_id, None)
        self.marked.pop(snapshot_id, None)
        self.struck.add(snapshot_id)

    def note_pruned(self, key: SnapshotKey) -> None:
        """Nothing lies there any more."""
        self.partial.pop(key, None)
        for table in (self.known, self.written):
            for snapshot in [name for name, record in table.items() if record.key == key]:
                del table[snapshot]

    def _take_answer(self, survey: Survey, now_s: float) -> None:
        self.is_answered = True
        self.known = {record.snapshot_id: record for record in survey.snapshots} | self.written
        self.is_known = survey.is_known or bool(self.known)
        self.partial = {key: self.partial.get(key, now_s) for key in survey.partial}
        self.unreadable = {item.key: item.reason for item in survey.unreadable}
        found = {item.snapshot_id: item for item in survey.distrusted if item.snapshot_id not in self.struck}
        self.marks = found | self.marked
        self.problems = {name: why for name, why in self.problems.items() if name in self.known}

    def _take_problems(self, report: RunReport) -> None:
        """A reader found a shard there missing or corrupt."""
        for mark in report.quarantined:
            for name, record in self.known.items():
                is_there = mark.node == snapshot_url(self.url, record.key) and mark.rank >= 0
                if is_there and name not in self.problems and len(self.problems) < KEPT_PROBLEMS:
                    self.problems[name] = f"the shard of rank {mark.rank} in {mark.node} is corrupt: {mark.reason}"

    def _choose_surveyors(self, run: str, nodes: Mapping[str, NodeState]) -> None:
        """Ask one node; another one where it cannot, or where its daemon has ended and with it the order."""
        if not self.survey_id or self.is_answered:
            return
        present = {(name, node.identity.incarnation) for name, node in nodes.items()}
        self.asked = {asked: error for asked, error in self.asked.items() if asked in present}
        if self.asked and not all(self.asked.values()):
            return
        able = [asked for asked in present - set(self.asked) if run in nodes[asked[0]].runs]
        if able:
            is_late = lambda asked: (nodes[asked[0]].liveness is not Liveness.LIVE, natural(asked[0]))  # noqa: E731
            self.asked[min(able, key=is_late)] = ""
