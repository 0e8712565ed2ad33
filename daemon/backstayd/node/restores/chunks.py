"""Snapshots of another layout: offers their manifests to trainers here, and fetches the chunks these ask for, each once.

Fetched chunks lie in sparse staging, shared by all trainers of the node, until nobody restores from them. Decides neither what
is restored nor which chunks are needed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from backstay.errors import ERROR_CLASSES, BackstayError, CapacityError, UnavailableError, UsageError
from backstay.format.manifest import CHUNK_BYTES
from backstay.protocol import framing, messages
from backstayd.coder.jobs import Corrupt, FetchChunks, FetchManifests, JobResult
from backstayd.core.messages.decisions import Decision, ShardSource, SourceKind
from backstayd.node.coders import Coders
from backstayd.node.deadlines import deadline_s, storage_deadline_s
from backstayd.node.node_state import NodeState
from backstayd.node.session import Offered
from backstayd.store.directory import remove_empty
from backstayd.store.index import RunIndex
from backstayd.store.published import find_manifest, open_for_trainer
from backstayd.store.record_files import ShardChunks, parse_manifest
from backstayd.store.staging import missing_runs, prepare_sparse, read_marks, remove_sparse, run_bytes

logger = logging.getLogger(__name__)

CHANGED: Final = "decision_changed"  # ask again: another snapshot, or other sources, may be decided
FIRST_PAUSE_S: Final = 0.05
LAST_PAUSE_S: Final = 0.5
MAX_DEADLINE_S: Final = 3600.0


@dataclass(slots=True)
class _Part:
    """Chunks of one shard. ``asked`` and ``verified`` hold a byte per chunk: a trainer needs it; it was verified in place."""

    chunks: ShardChunks
    asked: bytearray
    verified: bytearray
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    offer_ids: set[str] = field(default_factory=set)
    is_prepared: bool = False
    present_bytes: int = 0


@dataclass(slots=True)
class Totals:
    """Bytes of chunks that trainers of another layout needed on this node, each counted once, and of those it fetched."""

    needed_local_bytes: int = 0
    needed_remote_bytes: int = 0
    moved_bytes: int = 0


@dataclass(slots=True)
class Work:
    """Progress of one Fetch: the bytes it asked for, and how many of them are still missing here."""

    total_bytes: int = 0
    missing: Callable[[], int] = lambda: 0

    @property
    def done_bytes(self) -> int:
        return self.total_bytes - self.missing()


class Chunks:
    """Invariant: a chunk is fetched by one job at a time, and by none once its mark is there.

    Args:
        quarantine: Takes a source that failed verification out of use.
    """

    def __init__(self, node: NodeState, coders: Coders, quarantine: Callable[[Corrupt], None]) -> None:
        self._node = node
        self._coders = coders
        self._quarantine = quarantine
        self._manifests: dict[tuple[str, str], bytes] = {}  # (run, digest)
        self._parts: dict[tuple[str, str], _Part] = {}
        self._visits: set[str] = set()
        self._totals: dict[str, Totals] = {}

    def totals(self, run: str) -> Totals:
        """What was needed and what was fetched for one run, since this daemon started."""
        return self._totals.setdefault(run, Totals())

    def begin_visit(self, offered: Offered) -> None:
        """Allow to fetch chunks of it until :meth:`end_visit`."""
        self._visits.add(offered.offer_id)

    def end_visit(self, offered: Offered) -> None:
        self._visits.discard(offered.offer_id)

    # -- offering ------------------------------------------------------------------------------------------------------

    def of_decision(self, decision: Decision) -> Offered:
        """The offer of a decision that has a base."""
        assert decision.base is not None
        return Offered(
            offer_id=decision.decision_id,
            run=decision.run,
            base=decision.base,
            sources=decision.sources,
        )

    async def offer(self, offered: Offered) -> messages.Offer:
        """The message for a trainer, with every manifest checked against its digest.

        Raises:
            UnavailableError: a manifest is not available yet.
        """
        missing = await asyncio.to_thread(self._look_here, offered)
        if missing:
            stored = [source for source in missing if source.kind is SourceKind.PERSISTED]
            await self._fetch_manifests(offered, [source for source in missing if source not in stored])
            await self._fetch_manifests(offered, stored, url=offered.base.url)
            missing = await asyncio.to_thread(self._look_here, offered)
        if missing:
            raise UnavailableError(f"{len(missing)} manifests were removed meanwhile", reason="gone")
        here = self._digests_here(offered.run)
        manifests = await asyncio.to_thread(self._parse, offered)
        return messages.Offer(
            decision_id=offered.offer_id,
            step=offered.base.step,
            base_attempt=offered.base.attempt,
            base_world_size=len(offered.sources),
            snapshot_id=offered.base.snapshot_id,
            manifests=manifests,
            kinds=tuple(
                SourceKind.LOCAL.value if source.digest in here else source.kind.value for source in offered.sources
            ),
            details=tuple(
                offered.base.url if source.kind is SourceKind.PERSISTED else ", ".join(source.holders)
                for source in offered.sources
            ),
        )

    def _parse(self, offered: Offered) -> tuple[dict[str, Any], ...]:
        return tuple(json.loads(self._manifests[offered.run, source.digest]) for source in offered.sources)

    def _look_here(self, offered: Offered) -> list[ShardSource]:
        """Load the manifests that this node has; returns the sources whose manifest is missing."""
        paths, missing = self._node.store.paths(offered.run), []
        for source in offered.sources:
            if (offered.run, source.digest) in self._manifests:
                continue
            try:
                raw = find_manifest(paths, offered.ref(source))
            except BackstayError:
                missing.append(source)
                continue
            self._manifests[offered.run, source.digest] = raw
        return missing

    async def _fetch_manifests(self, offered: Offered, missing: Sequence[ShardSource], *, url: str = "") -> None:
        if not missing:
            return
        named = [holder for source in missing for holder in source.holders]
        job = FetchManifests(
            shards=tuple(map(offered.ref, missing)),
            addresses=self._addresses(offered, [*named, *self._peers(offered)]),
            url=url,
            deadline_s=storage_deadline_s(0) if url else deadline_s(0),
        )
        _raise_failure(await self._coders.run(job))

    def _peers(self, offered: Offered) -> Mapping[str, str]:
        return offered.addresses if offered.offer_id in self._visits else self._node.peers

    def _addresses(self, offered: Offered, names: Iterable[str]) -> tuple[str, ...]:
        """Bulk addresses of those nodes that are up, without this one."""
        peers, own = self._peers(offered), self._node.identity.name
        return tuple(peers[name] for name in dict.fromkeys(names) if name != own and name in peers)

    # -- fetching ------------------------------------------------------------------------------------------------------

    async def fetch(
        self, offered: Offered, request: messages.Fetch, work: Work
    ) -> tuple[messages.Fetched, tuple[int, ...]]:
        """Bring the chunks of ``request`` here; returns the answer and its descriptors, which the caller closes.

        Raises:
            UnavailableError: not within the deadline, or (``decision_changed``) the coordinator decides anew.
            CapacityError: there is no room for them. UsageError: the request is malformed.
        """
        if len(request.shards) > framing.MAX_FDS:
            raise UsageError(
                f"a request for chunks of {len(request.shards)} shards; ask for at most {framing.MAX_FDS} at a time",
                reason="bad_fetch",
            )
        wanted = {ranges.rank: self._runs(offered, ranges) for ranges in request.shards}
        parts = {rank: self._part(offered, offered.sources[rank]) for rank in wanted}
        self._count(offered, wanted, parts)
        work.total_bytes = sum(run_bytes(parts[rank].chunks, runs) for rank, runs in wanted.items())
        work.missing = lambda: sum(
            run_bytes(parts[rank].chunks, self._missing(offered.run, parts[rank], runs))
            for rank, runs in wanted.items()
        )
        limit_s = min(request.deadline_s, MAX_DEADLINE_S)
        try:
            async with asyncio.timeout(limit_s), asyncio.TaskGroup() as group:
                for rank, runs in wanted.items():
                    group.create_task(self._bring(offered, offered.sources[rank], runs))
        except TimeoutError:
            raise UnavailableError(
                f"fetched only {work.done_bytes} of {work.total_bytes} bytes of step {offered.base.step} in {limit_s:g} s",
                reason="deadline",
            ) from None
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return self._open(offered, parts)

    def _runs(self, offered: Offered, ranges: messages.ChunkRanges) -> list[range]:
        if not 0 <= ranges.rank < len(offered.sources) or len(ranges.firsts) != len(ranges.counts):
            raise UsageError(f"the snapshot has no shard of rank {ranges.rank}", reason="bad_fetch")
        runs = [range(first, first + count) for first, count in zip(ranges.firsts, ranges.counts, strict=True)]
        end = -(-offered.sources[ranges.rank].size_bytes // CHUNK_BYTES)
        position = 0
        for run in runs:
            if not position <= run.start < run.stop <= end:
                raise UsageError(
                    f"chunks {run.start} to {run.stop} of rank {ranges.rank}: not ascending, or past its {end} chunks",
                    reason="bad_fetch",
                )
            position = run.stop
        return runs

    def _part(self, offered: Offered, source: ShardSource) -> _Part:
        place = (offered.run, source.digest)
        if place not in self._parts:
            if place not in self._manifests:
                raise UnavailableError("the offer has expired; restore again", reason=CHANGED)
            chunks = parse_manifest(self._manifests[place], digest=source.digest)
            self._parts[place] = _Part(chunks, bytearray(chunks.chunk_count), bytearray(chunks.chunk_count))
        self._parts[place].offer_ids.add(offered.offer_id)
        return self._parts[place]

    def _count(self, offered: Offered, wanted: Mapping[int, Sequence[range]], parts: Mapping[int, _Part]) -> None:
        """Count the bytes that trainers here need, each chunk once, by where they are."""
        here = self._digests_here(offered.run)
        for rank, runs in wanted.items():
            part = parts[rank]
            fresh = missing_runs(part.asked, runs)
            for run in fresh:
                part.asked[run.start : run.stop] = b"\x01" * len(run)
            place, size = "local" if part.chunks.digest in here else "remote", run_bytes(part.chunks, fresh)
            self._node.metrics.reshard_needed_bytes.of(offered.run, place=place).inc(size)
            totals = self.totals(offered.run)
            totals.needed_local_bytes += size if place == "local" else 0
            totals.needed_remote_bytes += size if place == "remote" else 0

    async def _bring(self, offered: Offered, source: ShardSource, runs: Sequence[range]) -> None:
        """Bring the chunks of one shard here, verified; retries a source that fails for a while."""
        part = self._part(offered, source)
        pause_s, failing_since = FIRST_PAUSE_S, 0.0
        clock = self._node.clock
        async with part.lock:
            while True:
                self.check(offered)
                missing = self._missing(offered.run, part, runs)
                if not missing:
                    return
                result = await self._run(offered, source, part, missing)
                if not result.error_class:
                    continue
                failing_since = failing_since or clock.monotonic_s()
                is_over = clock.monotonic_s() - failing_since > 2 * self._node.lease_s
                is_awaited = source.kind in (SourceKind.REBUILD, SourceKind.PERSISTED)
                if result.corrupt or (is_over and not is_awaited):
                    self._give_up(offered, source, result)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LAST_PAUSE_S)

    def check(self, offered: Offered) -> None:
        """Raise UnavailableError (``decision_changed``) once something else is to be restored."""
        is_visit = offered.offer_id in self._visits
        if not is_visit and not self._node.is_current(offered.run, offered.offer_id):
            raise UnavailableError(f"run {offered.run}: the coordinator decides anew; restore again", reason=CHANGED)

    def _missing(self, run: str, part: _Part, runs: Sequence[range]) -> list[range]:
        if part.chunks.digest in self._digests_here(run):
            return missing_runs(part.verified, runs)
        marks = read_marks(self._node.store.paths(run), part.chunks) if part.is_prepared else bytes(len(part.asked))
        return missing_runs(marks, runs)

    async def _run(self, offered: Offered, source: ShardSource, part: _Part, missing: Sequence[range]) -> JobResult:
        size = run_bytes(part.chunks, missing)
        is_here = source.digest in self._digests_here(offered.run)
        store = self._node.store
        url = offered.base.url if source.kind is SourceKind.PERSISTED and not is_here else ""
        if not is_here:
            self._prepare(offered, source, part, size)
        job = FetchChunks(
            shard=offered.ref(source),
            firsts=tuple(run.start for run in missing),
            counts=tuple(len(run) for run in missing),
            addresses=self._addresses(offered, source.holders),
            is_here=is_here,
            url=url,
            deadline_s=storage_deadline_s(size) if url else deadline_s(size),
        )
        store.fetching_bytes += 0 if is_here else size
        try:
            result = await self._coders.run(job)
        finally:
            store.fetching_bytes -= 0 if is_here else size
            self._recount(offered.run, part)
        self._note(offered, part, missing, result, is_here=is_here)
        return result

    def _prepare(self, offered: Offered, source: ShardSource, part: _Part, size_bytes: int) -> None:
        store = self._node.store
        store.require_room(
            size_bytes,
            f"run {offered.run}: chunks of rank {source.rank} of step {offered.base.step} for another layout",
        )
        if not part.is_prepared:
            raw = self._manifests[offered.run, source.digest]
            incarnation = self._node.identity.incarnation
            prepare_sparse(store.paths(offered.run), raw, digest=source.digest, incarnation=incarnation)
            part.is_prepared = True

    def _note(self, offered: Offered, part: _Part, runs: Sequence[range], result: JobResult, *, is_here: bool) -> None:
        metrics = self._node.metrics
        for corrupt in result.corrupt:
            self._quarantine(corrupt)
        if not is_here:
            metrics.reshard_moved_bytes.of(offered.run).inc(result.done_bytes)
            self.totals(offered.run).moved_bytes += result.done_bytes
        elif not result.error_class:
            for run in runs:
                part.verified[run.start : run.stop] = b"\x01" * len(run)
        if result.error_class == CapacityError.__name__:
            _raise_failure(result)

    def _give_up(self, offered: Offered, source: ShardSource, result: JobResult) -> None:
        """The sources of the shard have failed."""
        reason = f"rank {source.rank} of step {offered.base.step}: {result.message}"
        if offered.offer_id in self._visits:
            _raise_failure(result)
        self._node.fail_decision(offered.run, offered.offer_id, reason)
        raise UnavailableError(f"run {offered.run}: {reason}; the coordinator decides anew", reason=CHANGED)

    def _open(self, offered: Offered, parts: Mapping[int, _Part]) -> tuple[messages.Fetched, tuple[int, ...]]:
        """Read-only descriptors: of the published shard where it lies here, else of the sparse file."""
        store, here, fds = self._node.store, self._digests_here(offered.run), list[int]()
        shards: list[messages.FetchedShard] = []
        try:
            for rank, part in parts.items():
                chunks = part.chunks
                if chunks.digest in here:
                    fd, _ = open_for_trainer(store.index(offered.run), store.paths(offered.run), offered.key, rank=rank)
                else:
                    path = store.paths(offered.run).sparse(rank, chunks.world_size, chunks.digest)
                    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                fds.append(fd)
                shards.append(messages.FetchedShard(rank=rank, fd_index=len(fds) - 1))
        except (BackstayError, OSError) as error:
            for fd in fds:
                os.close(fd)
            raise UnavailableError(f"fetched chunks are gone: {error}; restore again", reason=CHANGED) from error
        return messages.Fetched(shards=tuple(shards)), tuple(fds)

    # -- the end -------------------------------------------------------------------------------------------------------

    def tidy(self, wanted: Mapping[str, set[str]]) -> None:
        """Remove chunks and manifests that nobody restores from; ``wanted``: by run, the digests of shards in use."""
        for run, digest in list(self._parts):
            part = self._parts[run, digest]
            is_visited = bool(part.offer_ids & self._visits)
            if is_visited or part.lock.locked() or digest in wanted.get(run, ()):
                continue
            del self._parts[run, digest]
            self._node.store.fetched_bytes -= part.present_bytes
            self._remove(run, part.chunks)
        for run, digest in list(self._manifests):
            if (run, digest) not in self._parts and digest not in wanted.get(run, ()) and not self._visits:
                raw = self._manifests.pop((run, digest))
                self._remove(run, parse_manifest(raw, digest=digest))
        for run in [run for run in self._totals if run not in self._node.store.runs and not self._visits]:
            del self._totals[run]

    def _remove(self, run: str, chunks: ShardChunks) -> None:
        store, paths = self._node.store, self._node.store.paths(run)
        remove_sparse(paths, chunks.ref)
        if run not in store.runs:  # it was only read in a visit
            for directory in (paths.staging, paths.root, paths.root.parent):
                remove_empty(directory)

    def _recount(self, run: str, part: _Part) -> None:
        if not part.is_prepared:
            return
        try:
            marks = read_marks(self._node.store.paths(run), part.chunks)
        except BackstayError:  # removed with its run
            marks = b""
        whole = [range(len(marks))]  # run_bytes knows that a shard's last chunk is shorter
        present = run_bytes(part.chunks, whole) - run_bytes(part.chunks, missing_runs(marks, whole))
        self._node.store.fetched_bytes += present - part.present_bytes
        part.present_bytes = present

    def _digests_here(self, run: str) -> set[str]:
        index = self._node.store.runs.get(run) or RunIndex(run=run)
        return {held.record.digest for held in index.shards.values()}


def _raise_failure(result: JobResult) -> None:
    if result.error_class:
        raise ERROR_CLASSES.get(result.error_class, UnavailableError)(result.message, reason=result.reason)
