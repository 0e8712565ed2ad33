"""Decoding one stripe: k fragments are read once, all lost data blocks of it decoded and put to their owners.

A source that fails is replaced by a spare one at the chunk where it failed, when the task names more than k. So is parity that
is wrong although its digests are right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

from backstay import faults
from backstay.errors import BackstayError, IntegrityError, UnavailableError, UnrecoverableError
from backstayd.coder.context import CorruptSourceError, JobContext
from backstayd.coder.jobs import DecodeStripe
from backstayd.coder.parity.chunk_writers import RebuiltBlock, RebuiltRange, open_staged, when_ready
from backstayd.coder.parity.stored_plans import check_plan, fetch_plan
from backstayd.coder.parity.windows import decode_windows, padded
from backstayd.coder.parity.wrong_parity import Fit, Rebuilt, find_fit
from backstayd.coder.verified_reads import (
    LocalFragment,
    LocalShards,
    RemoteFragment,
    RemoteShards,
    ShardRange,
    block_ranges,
)
from backstayd.core.inventory import geometry
from backstayd.core.messages.plans import FragmentSource, Plan, Rebuild, RebuildTask, seal_rebuild
from backstayd.erasure.pyeclib_codec import codec_for
from backstayd.store.paths import FragmentRef
from backstayd.store.record_files import ShardChunks
from backstayd.transport.bulk.client import NOT_READY

Source = LocalShards | RemoteShards | LocalFragment | RemoteFragment


def run_decode(context: JobContext, job: DecodeStripe) -> None:
    """Do ``job``; on return every wanted range of the stripe is staged at its owner. Idempotent."""
    rebuild, plan, task = job.rebuild, job.rebuild.plan, _task(job)
    check_plan(plan, job.stripe)
    if plan.m == 0:
        raise UnrecoverableError(f"plan {plan.plan_id[:8]} has no parity: nothing can be rebuilt from it")
    addresses = [source.bulk_address for source in task.sources if source.node != task.decoder]
    with context.timed("plan"):
        by_digest = fetch_plan(context, plan, addresses)
    wanted = _wanted(rebuild, task, by_digest)
    if not wanted:
        return
    _await_owners(context, wanted)
    last = max(part.end for ranges in wanted.values() for part in ranges)
    chunks = range(min(part.begin for ranges in wanted.values() for part in ranges), last)
    with contextlib.ExitStack() as stack:
        sources = StripeSources(context, plan, task, by_digest, chunks=chunks, unusable=frozenset(wanted))
        stack.callback(sources.close)
        sinks = {index: RebuiltBlock(context, ranges, stripe=task.stripe) for index, ranges in wanted.items()}
        for sink in sinks.values():
            stack.callback(sink.close)

        def on_chunk(chunk: int) -> None:
            context.check()
            if chunk == chunks[len(chunks) // 2]:
                faults.reach("mid_rebuild", step=plan.step, stripe=task.stripe)

        decode_windows(
            plan,
            task.stripe,
            codec_for(plan.k, plan.m),
            chunks=chunks,
            read_chunk=sources.read_chunk,
            search=sources.search,
            sinks=sinks,
            on_chunk=on_chunk,
        )


def _task(job: DecodeStripe) -> RebuildTask:
    if seal_rebuild(job.rebuild).rebuild_id != job.rebuild.rebuild_id:
        raise IntegrityError(f"rebuild {job.rebuild.rebuild_id[:8]} does not have the id of its content")
    for task in job.rebuild.tasks:
        if task.stripe == job.stripe:
            return task
    raise IntegrityError(f"rebuild {job.rebuild.rebuild_id[:8]} has no task for stripe {job.stripe}")


def _wanted(rebuild: Rebuild, task: RebuildTask, by_digest: dict[str, ShardChunks]) -> dict[int, list[RebuiltRange]]:
    """By data fragment index: the ranges of lost shards within its block, in order, with where they go."""
    plan = rebuild.plan
    owners = {(target.member_index, target.rank): target for target in rebuild.targets}
    wanted: dict[int, list[RebuiltRange]] = {}
    for index, member in enumerate(geometry.data_members(task.stripe, n=len(plan.members), m=plan.m)):
        begin = 0
        for shard in block_ranges(plan, member, geometry.block_range(plan, task.stripe, member), by_digest):
            owner = owners.get((member, shard.chunks.rank))
            if owner is not None:
                address = "" if owner.node == task.decoder else owner.bulk_address
                wanted.setdefault(index, []).append(RebuiltRange(shard, begin, address))
            begin += shard.chunk_count
    return wanted


def _await_owners(context: JobContext, wanted: Mapping[int, list[RebuiltRange]]) -> None:
    """Wait until every owner prepared its staging, before any source is asked to send."""
    for ranges in wanted.values():
        for part in ranges:
            if not part.address:
                open_staged(context, part.shard).close()
                continue
            client = context.client(part.address)
            when_ready(context, lambda client=client, part=part: _require_staged(client.is_staged(part.shard.ref)))  # type: ignore[misc]
            context.release(client)


def _require_staged(is_staged: bool) -> None:
    if not is_staged:
        raise UnavailableError("the owner has not prepared its staging yet", reason=NOT_READY)


class StripeSources:
    """k open fragments of a stripe that are read chunk by chunk, and the spare ones.

    Data fragments whose block is empty are zeros: they need no source. Invariant: ``k`` fragments are active or
    :meth:`read_chunk` raises.
    """

    def __init__(
        self,
        context: JobContext,
        plan: Plan,
        task: RebuildTask,
        by_digest: dict[str, ShardChunks],
        *,
        chunks: range,
        unusable: frozenset[int],
    ) -> None:
        self._context = context
        self._plan = plan
        self._task = task
        self._by_digest = by_digest
        self._stop = chunks.stop
        self._members = geometry.data_members(task.stripe, n=len(plan.members), m=plan.m)
        self._counts = {i: len(geometry.block_range(plan, task.stripe, m)) for i, m in enumerate(self._members)}
        empty = {i for i, count in self._counts.items() if count <= chunks.start} - unusable
        self._zeros = tuple(sorted(empty)[: plan.k])
        self._active: dict[int, Source | None] = dict.fromkeys(self._zeros)
        self._sources = [s for s in _local_first(task) if s.index not in empty and s.index not in unusable]
        self._spare = list(self._sources)
        self._buffers: dict[int, memoryview] = {}
        self._failures: list[BackstayError] = []
        self._fill(chunks.start)

    def read_chunk(self, chunk: int, length: int) -> dict[int, memoryview]:
        """The next chunk of k fragments, cut or padded to ``length``; a failing source is replaced.

        Raises:
            UnrecoverableError, or what the last source failed with: fewer than k sources are left.
        """
        found: dict[int, memoryview] = {}
        with self._context.timed("read"):
            while len(found) < self._plan.k:
                for index in [i for i in self._active if i not in found]:
                    view = self._read(index, chunk, length)
                    if view is not None:
                        found[index] = view
                if len(found) < self._plan.k:
                    self._fill(chunk)
        return found

    def search(self, chunk: int, length: int, wanted: Sequence[int], is_right: Callable[[Rebuilt], bool]) -> Rebuilt:
        """What k fragments decode to is wrong, though each passed its digests: read all anew and find k that decode to what
        is right. Parity that does not fit these is named for good, and not read again.

        Raises:
            IntegrityError: no k do; all parity of the stripe is named, until its holders have looked.
        """
        available = self._read_every(chunk, length)
        codec = codec_for(self._plan.k, self._plan.m)
        fit = find_fit(codec, available, wanted, length=length, is_right=is_right)
        place = f"chunk {chunk} of stripe {self._task.stripe}"
        if fit is None:
            detail = (
                f"{place} does not decode to what the manifests say with it, nor with any other parity that is left"
            )
            for index in [index for index in available if index >= self._plan.k]:
                self._blame(index, detail, is_misfit=False)
            raise IntegrityError(
                f"{place} cannot be decoded: no {self._plan.k} of {len(available)} fragments give what the manifests say; "
                "nothing was rebuilt from it",
                reason="bad_rebuild",
            )
        for index in fit.wrong:
            self._blame(index, f"{place} passes its digest, and does not fit the other fragments", is_misfit=True)
        if not fit.wrong:
            self._context.flipped_in_flight += 1
        self._keep(fit)
        return fit.rebuilt

    def _read_every(self, chunk: int, length: int) -> dict[int, memoryview]:
        """This chunk of every fragment that can be read, over new connections."""
        self.close()
        self._active = dict.fromkeys(self._zeros)
        for source in list(self._sources):
            try:
                self._active[source.index] = self._open(source, chunk)
            except BackstayError as error:
                self._fail(source.index, error)
        with self._context.timed("read"):
            found = {index: self._read(index, chunk, length) for index in list(self._active)}
        available = {index: view for index, view in found.items() if view is not None}
        if len(available) < self._plan.k:
            raise self._too_few()
        return available

    def _blame(self, index: int, detail: str, *, is_misfit: bool) -> None:
        source = next(source for source in self._sources if source.index == index)
        node = "" if source.node == self._task.decoder else source.bulk_address
        self._context.blame(self._fragment(source), node=node, detail=detail, is_misfit=is_misfit)

    def _keep(self, fit: Fit) -> None:
        """Go on with ``fit``; what else is right is a spare again."""
        for index in self._active.keys() - set(fit.used):
            source = self._active.pop(index)
            if source is not None:
                source.close()
        self._sources = [source for source in self._sources if source.index not in fit.wrong]
        self._spare = [source for source in self._sources if source.index not in fit.used]

    def close(self) -> None:
        for source in self._active.values():
            if source is not None:
                source.close()
        self._active = {}

    def _read(self, index: int, chunk: int, length: int) -> memoryview | None:
        source = self._active[index]
        has_chunk = chunk < self._counts.get(index, self._stop)
        buffer = self._buffers.setdefault(index, memoryview(bytearray(self._plan.chunk_bytes)))
        try:
            return padded(source if has_chunk else None, buffer, length)
        except BackstayError as error:
            self._drop(index, error)
            return None

    def _drop(self, index: int, error: BackstayError) -> None:
        self._fail(index, error)
        source = self._active.pop(index)
        if source is not None:
            source.close()

    def _fail(self, index: int, error: BackstayError) -> None:
        """That source is not tried again."""
        self._context.check()
        self._failures.append(error)
        self._sources = [source for source in self._sources if source.index != index]

    def _fill(self, chunk: int) -> None:
        """Open spare sources from ``chunk`` on until k are active."""
        while len(self._active) < self._plan.k:
            if not self._spare:
                raise self._too_few()
            spare = self._spare.pop(0)
            if spare.index in self._active:
                continue
            try:
                self._active[spare.index] = self._open(spare, chunk)
            except BackstayError as error:
                self._fail(spare.index, error)

    def _too_few(self) -> BackstayError:
        for error in self._failures:
            if isinstance(error, CorruptSourceError):
                return error
        if self._failures:
            return self._failures[-1]
        return UnrecoverableError(
            f"cannot decode stripe {self._task.stripe}: {len(self._active)} of {self._plan.k} fragments named as sources"
        )

    def _fragment(self, source: FragmentSource) -> FragmentRef:
        return FragmentRef.of(self._plan, self._task.stripe, source.index - self._plan.k)

    def _open(self, source: FragmentSource, chunk: int) -> Source:
        plan, stripe = self._plan, self._task.stripe
        is_local = source.node == self._task.decoder
        if source.index >= plan.k:
            ref = self._fragment(source)
            if is_local:
                return LocalFragment(self._context, ref, first_chunk=chunk)
            count = self._stop - chunk
            return RemoteFragment(self._context, source.bulk_address, ref, first_chunk=chunk, chunk_count=count)
        member = self._members[source.index]
        block = geometry.block_range(plan, stripe, member)[chunk : self._stop]
        ranges: list[ShardRange] = block_ranges(plan, member, block, self._by_digest)
        if is_local:
            return LocalShards(self._context, ranges)
        return RemoteShards(self._context, source.bulk_address, ranges)


def _local_first(task: RebuildTask) -> list[FragmentSource]:
    return sorted(task.sources, key=lambda source: source.node != task.decoder)
