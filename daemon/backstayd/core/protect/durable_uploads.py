"""Copying protected snapshots to durable storage: which one, when, and which node sends which shard. Pure.

One upload at a time for a run. A directory becomes a snapshot only by its completion record, which is ordered once every shard
is reported whole: a restore that finds a record finds every shard. An upload never costs training a slot: under memory
pressure it yields to training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from backstay.ids import SnapshotKey
from backstayd.bounded import drop_oldest
from backstayd.core.inventory.catalog import SnapshotView
from backstayd.core.inventory.durable_names import run_url
from backstayd.core.inventory.nodes import natural
from backstayd.core.inventory.run_context import RunContext, World, phases_of
from backstayd.core.inventory.survey import Surveying
from backstayd.core.messages.decisions import Lineage
from backstayd.core.messages.durable import PersistedSnapshot, StorageDesired, Upload, UploadState, UploadTask
from backstayd.core.messages.report import SessionPhase, SkipCause
from backstayd.core.policy import CorePolicy
from backstayd.core.protect.durable_upkeep import Upkeep
from backstayd.core.sentences import listed
from backstayd.core.timeline import LogEvent

RECORD_RANK = -1  # in Upload.rank: the completion record
FAILED_PAUSE_LEASES = (
    10  # before a snapshot whose upload was given up is tried again: storage that fails fails for a while
)
STALL_LEASES = (
    20  # without a byte before an upload makes way for a newer snapshot; nodes retry several times in that time
)
SAVING_LEASES = 600  # for which a run that ended keeps its memory for its copy: half an hour at the default lease
MAX_PASSED_OVER = 16


@dataclass(slots=True)
class Transfer:
    """The upload of one snapshot. Invariant: a node reported every shard in ``done`` whole; the others get an owner."""

    snapshot: PersistedSnapshot
    is_pinned: bool  # memory has room for one more slot per rank: it is not released meanwhile
    skipped: Mapping[int, int]  # by rank: the newest step it had skipped when this began
    owners: dict[int, str] = field(default_factory=dict)  # by rank: the node that sends its shard
    done: set[int] = field(default_factory=set)
    failed: dict[tuple[int, str], str] = field(default_factory=dict)  # by rank and node: why
    writer: str = ""  # the node that writes the completion record
    seen_bytes: int = 0
    progress_s: float = 0.0  # when that changed

    @property
    def is_whole(self) -> bool:
        return len(self.done) == self.snapshot.world_size


@dataclass(slots=True)
class Persisting:
    """State of one run; a new coordinator makes it again from reports and a survey."""

    run: str
    policy: CorePolicy
    log: LogEvent
    surveying: Surveying = field(init=False)
    transfer: Transfer | None = None
    problem: str = ""  # why the newest snapshot is not persisted yet; "" when nothing is wrong
    overtaken: str = ""  # why this run leaves durable storage to another history; "" while it does not
    last_s: float | None = None  # when the last one was persisted, or the run was first seen
    served: set[tuple[str, int]] = field(default_factory=set)  # worlds and ranks whose wish was met
    passed_over: dict[str, float] = field(default_factory=dict)  # by snapshot id: until when
    upkeep: Upkeep = field(init=False)
    newest_attempt: int = 0  # that is known, on storage or decided
    done_bytes: int = 0
    saving_since_s: float | None = None

    def __post_init__(self) -> None:
        url = run_url(self.policy.persist_url, self.run) if self.policy.persist_url else ""
        self.surveying = Surveying(url=url, lease_s=self.policy.lease_s)
        self.upkeep = Upkeep(self.run, self.policy, self.log, self.surveying)

    @property
    def is_on(self) -> bool:
        return self.surveying.url != ""

    @property
    def pinned(self) -> set[SnapshotKey]:
        """The snapshot that must not be released yet."""
        transfer = self.transfer
        is_needed = transfer is not None and transfer.is_pinned and not transfer.is_whole
        return {transfer.snapshot.key} if transfer is not None and is_needed else set()

    @property
    def newest(self) -> PersistedSnapshot | None:
        """The newest one that is whole and not corrupt, of whatever history."""
        sound = [r for name, r in self.surveying.known.items() if name not in self.surveying.problems]
        return max(sound, key=lambda record: record.key, default=None)

    def update(
        self, context: RunContext, world: World, *, target: int, fence: int, is_busy: bool, is_proving: bool = False
    ) -> None:
        """Go as far as the reports allow.

        Args:
            world: the sessions of the current world.
            target: the spares that a protected snapshot has now.
            fence: the generation of the newest decision: each needs a survey of its own.
            is_busy: a world decides; nothing new is begun.
            is_proving: what was restored is on probation. What is newer may come to be distrusted, so nothing is pruned.
        """
        if not self.is_on:
            return
        if self.last_s is None:
            self.last_s = context.now_s
        if not self.surveying.survey_id or (is_busy and self.surveying.fence != fence):
            self.surveying.ask(self.run, context.nodes, context.generation, fence=fence, now_s=context.now_s)
        self.served &= _wishes(context)
        self._log_unreadable()
        self.upkeep.take(context)
        if self.transfer is not None:
            self._advance(context, world)
        self.overtaken = self._why_overtaken(context) if world and not is_busy else ""
        if self.overtaken:
            self.log("persist_failed", self.overtaken)
        elif self.transfer is None and self.surveying.is_answered and not is_busy:
            self._begin(context, world, target)
        is_waiting = is_busy or is_proving or bool(self.overtaken)
        self.upkeep.choose(context, self._sound(context), kept=self._kept(context), is_waiting=is_waiting)
        head = context.head.attempt if context.head is not None else 0
        own = self.transfer.snapshot.attempt if self.transfer is not None else 0
        self.newest_attempt = max(head, own, context.storage.newest_attempt)

    def _log_unreadable(self) -> None:
        """A copy that cannot be used is kept: a person may be able to repair its record."""
        unreadable = self.surveying.unreadable
        if unreadable:
            newest = max(unreadable)
            more = f" ({len(unreadable)} such copies)" if len(unreadable) > 1 else ""
            self.log(
                "storage_unreadable",
                f"the completion record of step {newest.step} of attempt {newest.attempt} in {self.surveying.url} cannot be "
                f"used: {unreadable[newest]}; the copy is neither restored nor pruned{more}",
            )

    def desired(self, nodes: Collection[str]) -> dict[str, StorageDesired]:
        """What each of ``nodes`` should do with durable storage; nothing without any."""
        if not self.is_on:
            return {}
        newest = self.newest
        common = StorageDesired(
            url=self.surveying.url,
            bandwidth_bytes_per_s=self.policy.persist_bandwidth_bytes_per_s,
            persisted_step=newest.step if newest is not None else 0,
            newest_attempt=self.newest_attempt,
        )
        tasks = self._tasks()
        special = {*tasks, self.upkeep.node, *(node for node in nodes if self.surveying.wants(node))}
        orders = dict.fromkeys(nodes, common)
        for node in special & orders.keys():
            own = replace(common, uploads=tasks.get(node, ()), survey_id=self.surveying.wants(node))
            orders[node] = self.upkeep.ordered(own) if node == self.upkeep.node else own
        return orders

    def incomplete_view(self, context: RunContext) -> SnapshotView | None:
        """The snapshot that is being copied, if a shard of it must be rebuilt first."""
        transfer = self.transfer
        if transfer is None or transfer.is_whole:
            return None
        view = context.view_of(transfer.snapshot.snapshot_id)
        is_wanted = view is not None and view.is_restorable and not set(view.unheld_ranks) <= transfer.done
        return view if is_wanted else None

    def is_saving(self, context: RunContext) -> bool:
        """Whether a run that ended should keep its memory for a while: a copy was asked for, or is under way."""
        if not self.is_on:
            return False
        is_wanted = self.transfer is not None or bool(_wishes(context) - self.served)
        if not is_wanted:
            self.saving_since_s = None
            return False
        if self.saving_since_s is None:
            self.saving_since_s = context.now_s
        return context.now_s - self.saving_since_s < SAVING_LEASES * self.policy.lease_s

    def document(self) -> dict[str, Any] | None:
        """For the status document: what lies on durable storage and what is being copied; None without storage."""
        if not self.is_on:
            return None
        newest, transfer = self.newest, self.transfer
        return {
            "url": self.surveying.url,
            "is_surveyed": self.surveying.is_answered,
            "step": newest.step if newest is not None else 0,
            "attempt": newest.attempt if newest is not None else 0,
            "problem": self.surveying.error or self.overtaken or self.problem,
            "upload": None
            if transfer is None
            else {
                "step": transfer.snapshot.step,
                "attempt": transfer.snapshot.attempt,
                "done_bytes": self.done_bytes,
                "total_bytes": sum(shard.size_bytes for shard in transfer.snapshot.shards),
                "shards_done": len(transfer.done),
                "shards": transfer.snapshot.world_size,
                "is_pinned": transfer.is_pinned,
            },
            "snapshots": [
                {
                    "attempt": record.attempt,
                    "step": record.step,
                    "world_size": record.world_size,
                    "size_bytes": sum(shard.size_bytes for shard in record.shards),
                    "snapshot_id": record.snapshot_id,
                    "serial": record.serial,
                    "unix_s": record.unix_s,
                    "problem": self.surveying.problems.get(name, ""),
                }
                for name, record in sorted(self.surveying.known.items(), key=lambda item: item[1].key, reverse=True)
            ],
            "unreadable": [
                {"attempt": key.attempt, "step": key.step, "problem": f"its completion record cannot be used: {why}"}
                for key, why in sorted(self.surveying.unreadable.items(), reverse=True)
            ],
        }

    def check_invariants(self) -> None:
        """Raise AssertionError for a mistake of ours."""
        transfer = self.transfer
        if transfer is not None:
            assert not set(transfer.owners) & transfer.done
            assert transfer.writer == "" or transfer.is_whole, "the record is ordered last"
        self.upkeep.check_invariants(self.newest)

    # -- one upload ---------------------------------------------------------------------------------------------------

    def _begin(self, context: RunContext, world: World, target: int) -> None:
        view = self._resumable(context) or self._due(context, target)
        if view is None:
            newest = next((view for view in context.live_views if view.is_restorable), None)
            if newest is not None and newest.snapshot_id in self.surveying.known:
                self.served |= _wishes(context)  # what they ask for is there already
            return
        serial = max((record.serial for record in self.surveying.known.values()), default=0) + 1
        snapshot = PersistedSnapshot(
            run=self.run,
            attempt=view.key.attempt,
            step=view.key.step,
            world_size=view.world_size,
            snapshot_id=view.snapshot_id,
            shards=tuple(view.row(rank) for rank in range(view.world_size)),
            lineage=_lineage_of(context, view),
            serial=serial,
            owner=context.owner,
            generation=context.head.generation.number if context.head is not None else context.generation.number,
        )
        self.transfer = Transfer(
            snapshot=snapshot,
            progress_s=context.now_s,
            is_pinned=_has_room(context, view),
            skipped={rank: session.record.skipped_step for rank, session in world.items()},
        )
        self.served |= _wishes(context)
        room = (
            "" if self.transfer.is_pinned else "; memory has no room to keep it meanwhile, so training may overtake it"
        )
        self.log("persisting", f"step {view.key.step} is copied to {self.surveying.url}{room}")
        self._give_owners(context, view)

    def _resumable(self, context: RunContext) -> SnapshotView | None:
        """A snapshot that nodes already upload for a former coordinator."""
        for report in context.reports.values():
            for upload in report.uploads:
                view = context.view_of(upload.snapshot_id)
                if view is not None and self._is_candidate(context, view):
                    return view
        return None

    def _due(self, context: RunContext, target: int) -> SnapshotView | None:
        """The snapshot to copy now, if any is due."""
        sound = [view for view in context.sound_views if view.is_restorable]
        protected = [view for view in sound if view.spares >= target]
        is_idle = not any(phases_of(world) - {SessionPhase.ENDED} for world in context.worlds.values())
        view = next(iter(protected or (sound if is_idle else [])), None)
        if view is None or not self._is_candidate(context, view):
            return None
        if is_idle or _wishes(context) - self.served:
            return view
        policy, newest = self.policy, self._newest_live(context)
        base = context.head.base_step if context.head is not None else 0
        last_step = newest.step if newest is not None else base
        if policy.persist_every_steps and view.key.step - last_step >= policy.persist_every_steps:
            return view
        assert self.last_s is not None
        is_late = policy.persist_every_s > 0 and context.now_s - self.last_s >= policy.persist_every_s
        return view if is_late else None

    def _is_candidate(self, context: RunContext, view: SnapshotView) -> bool:
        """Whether ``view`` is newer than what is persisted, live, sound, and not given up a moment ago."""
        newest = self._newest_live(context)
        is_newer = newest is None or view.key > newest.key
        is_live = any(view is other for other in context.live_views)
        is_fresh = self.passed_over.get(view.snapshot_id, 0.0) <= context.now_s
        is_sound = view.is_restorable and view.key not in context.tainted
        return is_newer and is_live and is_fresh and is_sound and view.snapshot_id not in self.surveying.known

    def _why_overtaken(self, context: RunContext) -> str:
        """Why this run leaves storage alone: a newer history writes there, of another cluster or another job of its name.

        A world that restores begins above that history. One that trains would mix its shards with those of the other.
        """
        if context.head is None or not context.storage.is_ahead_of(context.head):
            return ""
        return (
            f"attempt {context.storage.newest_attempt} in {self.surveying.url} is newer than attempt {context.head.attempt} "
            "of this run: another cluster or job uses its run_id. Nothing is copied or removed there until it is restarted"
        )

    def _kept(self, context: RunContext) -> set[SnapshotKey]:
        """What retention leaves alone: what the world began from, and what is on its way."""
        base = context.head.base if context.head is not None else None
        kept = {SnapshotKey(base.attempt, base.step)} if base is not None else set()
        return kept | ({self.transfer.snapshot.key} if self.transfer is not None else set())

    def _newest_live(self, context: RunContext) -> PersistedSnapshot | None:
        return max(self._sound(context), key=lambda record: record.key, default=None)

    def _sound(self, context: RunContext) -> list[PersistedSnapshot]:
        """Copies of the live history that a restart could use."""
        problems = self.surveying.problems
        return [r for r in context.live_records if r.snapshot_id not in problems and r.key not in context.tainted]

    def _advance(self, context: RunContext, world: World) -> None:
        transfer = self.transfer
        assert transfer is not None
        self._take_uploads(context, transfer)
        if transfer.snapshot.snapshot_id in self.surveying.known:
            self._finish(context, transfer)
            return
        if transfer.snapshot.key in context.tainted:
            self._give_up(context, context.tainted[transfer.snapshot.key])
            return
        if self._is_stalled(context, transfer):
            self._give_up(context, self.problem or "nothing of it was copied for too long")
            return
        view = context.view_of(transfer.snapshot.snapshot_id)
        if not transfer.is_whole and (view is None or not view.is_restorable):
            self._give_up(context, "it was released or lost before every shard was copied")
            return
        if transfer.is_pinned and _is_short(transfer, world):
            transfer.is_pinned = False
            self.log("persisting", f"step {transfer.snapshot.step} may be released: training is short of slots")
        if transfer.is_whole:
            self._order_record(context, transfer)
        elif view is not None:
            self._give_owners(context, view)
        self.problem = self._why_slow(transfer)

    def _is_stalled(self, context: RunContext, transfer: Transfer) -> bool:
        """Whether nothing was copied for long and a newer snapshot could be copied instead."""
        if self.done_bytes != transfer.seen_bytes:
            transfer.seen_bytes, transfer.progress_s = self.done_bytes, context.now_s
        newer = (view for view in context.sound_views if view.is_restorable and view.key > transfer.snapshot.key)
        is_late = context.now_s - transfer.progress_s >= STALL_LEASES * self.policy.lease_s
        return is_late and next(newer, None) is not None

    def _take_uploads(self, context: RunContext, transfer: Transfer) -> None:
        name, sizes = transfer.snapshot.snapshot_id, {s.rank: s.size_bytes for s in transfer.snapshot.shards}
        progress = dict.fromkeys(sizes, 0)
        for node, report in context.reports.items():
            for upload in report.uploads:
                if upload.snapshot_id == name:
                    self._take_upload(node, upload, transfer)
                    if upload.rank in progress:
                        progress[upload.rank] = max(progress[upload.rank], upload.done_bytes)
        self.done_bytes = sum(sizes[rank] if rank in transfer.done else done for rank, done in progress.items())

    def _take_upload(self, node: str, upload: Upload, transfer: Transfer) -> None:
        if upload.rank == RECORD_RANK:
            if upload.state is UploadState.DONE:
                self.surveying.note_written(transfer.snapshot)
            elif upload.state is UploadState.FAILED:
                transfer.failed[RECORD_RANK, node] = upload.reason
        elif upload.state is UploadState.DONE and 0 <= upload.rank < transfer.snapshot.world_size:
            transfer.done.add(upload.rank)
            transfer.owners.pop(upload.rank, None)
            transfer.failed.pop((upload.rank, node), None)
        elif upload.state is UploadState.FAILED:
            transfer.failed[upload.rank, node] = upload.reason

    def _give_owners(self, context: RunContext, view: SnapshotView) -> None:
        """Choose a holder for each shard that is not copied yet, evenly; another where one is gone or has failed."""
        transfer = self.transfer
        assert transfer is not None
        load = Counter(transfer.owners.values())
        for rank in range(view.world_size):
            if rank in transfer.done:
                continue
            holders = [name for name in view.holders.get(rank, ()) if name in context.nodes]
            owner = transfer.owners.get(rank, "")
            able = [name for name in holders if (rank, name) not in transfer.failed] or holders
            if owner in able:
                continue
            transfer.owners.pop(rank, None)
            if able:  # without any, the shard is being rebuilt
                chosen = min(able, key=lambda name: (load[name], natural(name)))
                transfer.owners[rank] = chosen
                load[chosen] += 1

    def _order_record(self, context: RunContext, transfer: Transfer) -> None:
        """Have one node write the record, as all shards are copied; another where that one is gone or has failed."""
        if transfer.writer in context.nodes and (RECORD_RANK, transfer.writer) not in transfer.failed:
            return
        names = sorted(context.reports, key=natural)
        able = [name for name in names if (RECORD_RANK, name) not in transfer.failed]
        if names and not able:
            reason = next(iter(transfer.failed.values()))
            self._give_up(context, f"its completion record could not be written: {reason}")
            if self.surveying.is_answered:  # storage is not as it was when it was listed
                fence = self.surveying.fence
                self.surveying.ask(self.run, context.nodes, context.generation, fence=fence, now_s=context.now_s)
            return
        transfer.writer = able[0] if able else ""

    def _finish(self, context: RunContext, transfer: Transfer) -> None:
        snapshot = transfer.snapshot
        self.log("persisted", f"step {snapshot.step} of attempt {snapshot.attempt} is on durable storage")
        self.transfer, self.problem, self.done_bytes = None, "", 0
        self.last_s = context.now_s

    def _give_up(self, context: RunContext, why: str) -> None:
        transfer = self.transfer
        assert transfer is not None
        name = transfer.snapshot.snapshot_id
        self.passed_over[name] = context.now_s + FAILED_PAUSE_LEASES * self.policy.lease_s
        drop_oldest(self.passed_over, MAX_PASSED_OVER)
        self.problem = f"step {transfer.snapshot.step} was not persisted: {why}"
        self.surveying.partial.setdefault(transfer.snapshot.key, context.now_s)
        self.log("persist_failed", f"{self.problem}; a newer one is tried next")
        self.transfer, self.done_bytes = None, 0

    def _why_slow(self, transfer: Transfer | None) -> str:
        """What nodes report of uploads that fail and are tried again."""
        if transfer is None:
            return self.problem
        reasons = {
            reason for (rank, node), reason in transfer.failed.items() if transfer.owners.get(rank) == node and reason
        }
        problem = listed(sorted(reasons)[:2])
        if problem and problem != self.problem:
            self.log("persist_failed", f"step {transfer.snapshot.step}: {problem}; it is tried again")
        return problem

    def _tasks(self) -> dict[str, tuple[UploadTask, ...]]:
        """Uploads by the node that makes them."""
        transfer = self.transfer
        if transfer is None:
            return {}
        ranks: dict[str, list[int]] = {transfer.writer: []} if transfer.writer else {}
        for rank, owner in sorted(transfer.owners.items()):
            ranks.setdefault(owner, []).append(rank)
        return {
            node: (UploadTask(snapshot=transfer.snapshot, ranks=tuple(of_node), is_last=node == transfer.writer),)
            for node, of_node in ranks.items()
        }


def _wishes(context: RunContext) -> set[tuple[str, int]]:
    """(world, rank) of the trainers that ask for a copy now."""
    return {
        (world_id, rank)
        for world_id, world in context.worlds.items()
        for rank, session in world.items()
        if session.record.wants_persist
    }


def _lineage_of(context: RunContext, view: SnapshotView) -> tuple[Lineage, ...]:
    """The live history up to the attempt of ``view``."""
    places = [index for index, entry in enumerate(context.lineage) if entry.attempt == view.key.attempt]
    return context.lineage[places[0] :] if places else ()


def _has_room(context: RunContext, view: SnapshotView) -> bool:
    """Whether each node can hold one more slot for each shard of ``view`` that it holds."""
    wanted: Counter[str] = Counter()
    for rank, holders in view.holders.items():
        for name in holders:
            wanted[name] += view.sizes.get(rank, 0)
    return all(context.nodes[name].free_bytes >= size for name, size in wanted.items() if name in context.nodes)


def _is_short(transfer: Transfer, world: World) -> bool:
    """Whether a rank skipped a step for want of a slot since the upload began.

    Not ``is_short_of_slots``: nodes do not set that while a slot is held back, as the pinned snapshot of this upload is.
    """
    return any(
        session.record.skipped_step > transfer.skipped.get(rank, 0) and session.record.skip_cause is SkipCause.NO_SLOT
        for rank, session in world.items()
    )
