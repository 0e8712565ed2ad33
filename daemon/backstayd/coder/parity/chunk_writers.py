"""Writers of chunks: parity to this node or a peer, rebuilt blocks to the staging of their owners.

A rebuilt chunk is checked against its manifest before it is put anywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from crc32c import crc32c

from backstay import faults
from backstay.errors import InvariantError, UnavailableError
from backstay.format.manifest import CHUNK_BYTES
from backstayd.coder.context import JobContext
from backstayd.coder.jobs import CoderEvent
from backstayd.coder.parity.reuse import OlderFragment
from backstayd.coder.verified_reads import ShardRange
from backstayd.store.fragments import FragmentWriter
from backstayd.store.paths import FragmentRef
from backstayd.store.staging import StagedShard
from backstayd.transport.bulk.client import NOT_READY, BulkClient

RETRY_S = 0.05


class OwnParity:
    """Parity of one stripe on this node; the chunks ``kept`` of it are copied from an older fragment, each in its turn."""

    def __init__(
        self,
        context: JobContext,
        writer: FragmentWriter,
        *,
        older: OlderFragment | None = None,
        kept: Sequence[range] = (),
    ) -> None:
        self._context = context
        self._writer = writer
        self._older = older
        self._kept = itertools.chain.from_iterable(kept)
        self._next = next(self._kept, None)
        self._buffer = memoryview(bytearray(CHUNK_BYTES))

    def write(self, chunk: int, pieces: Sequence[memoryview]) -> None:
        self._copy_below(chunk)
        self._context.moved["encoded"] += sum(map(len, pieces))
        with self._context.timed("write"):
            self._writer.write(crc_of(pieces), pieces)

    def finish(self) -> None:
        """Copy what is kept behind the chunk written last."""
        self._copy_below(self._writer.chunk_count)

    def close(self) -> None:
        if self._older is not None:
            self._older.close()

    def _copy_below(self, limit: int) -> None:
        if self._older is None:
            return
        with self._context.timed("keep"):
            while self._next is not None and self._next < limit:
                self._context.check()
                crc, view = self._older.read_into(self._next, self._buffer)
                self._writer.write(crc, [view])
                self._context.moved["kept"] += len(view)
                self._next = next(self._kept, None)


class ForwardSink:
    """A parity fragment streamed to the member that holds it."""

    def __init__(
        self,
        context: JobContext,
        address: str,
        ref: FragmentRef,
        *,
        size_bytes: int,
        chunk_count: int,
        older: tuple[FragmentRef, Sequence[range]] | None = None,
    ) -> None:
        """Blocks until the peer stored the plan and takes the fragment, within the job's deadline.

        Args:
            older: A fragment of the peer and the chunks that it takes from there: they are not written here.
        """
        self._context = context
        self._ref = ref
        self._middle = chunk_count // 2
        self._client = context.client(address)
        when_ready(context, lambda: self._begin(size_bytes, older))

    def write(self, chunk: int, pieces: Sequence[memoryview]) -> None:
        if chunk == self._middle:
            faults.reach("mid_forward", step=self._ref.key.step, stripe=self._ref.stripe)
        with self._context.timed("put"):
            self._client.put_chunk(crc_of(pieces), pieces)

    def finish(self) -> None:
        """Wait until the peer published the fragment."""
        with self._context.timed("put"):
            self._client.end_put()

    def close(self) -> None:
        self._context.release(self._client)

    def _begin(self, size_bytes: int, older: tuple[FragmentRef, Sequence[range]] | None) -> None:
        if older is None:
            self._client.begin_put_fragment(self._ref, size_bytes=size_bytes)
        else:
            self._client.begin_renew_fragment(self._ref, size_bytes=size_bytes, older=older[0], kept=older[1])


@dataclass(frozen=True, slots=True)
class RebuiltRange:
    """A range of a lost shard within a block: chunks ``begin``.. of the fragment; ``address`` "" = staged on this node."""

    shard: ShardRange
    begin: int
    address: str

    @property
    def end(self) -> int:
        return self.begin + self.shard.chunk_count


class RebuiltBlock:
    """Takes the chunks of one lost data block, verifies each and puts those of wanted shards to their owners."""

    def __init__(self, context: JobContext, ranges: Sequence[RebuiltRange], *, stripe: int) -> None:
        self._context = context
        self._stripe = stripe
        self._ranges = list(ranges)
        self._crc = -1  # of what was looked at last
        self._client: BulkClient | None = None
        self._staged: StagedShard | None = None

    def is_right(self, chunk: int, pieces: Sequence[memoryview]) -> bool:
        """Whether its manifest says so of these bytes; what nobody lacks is not looked at."""
        if not self._ranges or chunk < self._ranges[0].begin:
            return True
        shard = self._ranges[0].shard
        self._crc = crc_of(pieces)
        return self._crc == shard.chunks.chunk_crc(shard.first_chunk + chunk - self._ranges[0].begin)

    def write(self, chunk: int, pieces: Sequence[memoryview]) -> None:
        """Take what :meth:`is_right` has just found right."""
        if not self._ranges or chunk < self._ranges[0].begin:
            return  # of a shard that nobody lacks
        current = self._ranges[0]
        shard = current.shard
        shard_chunk = shard.first_chunk + chunk - current.begin
        crc = self._crc
        if crc != shard.chunks.chunk_crc(shard_chunk):
            raise InvariantError(
                f"rebuilt chunk {shard_chunk} of rank {shard.chunks.rank} does not match its crc in the manifest"
            )
        if chunk == current.begin:
            self._begin(current)
        with self._context.timed("put"):
            if self._staged is not None:
                self._staged.write_verified(shard_chunk, pieces)
            elif self._client is not None:
                self._client.put_chunk(crc, pieces)
        self._context.done_bytes += shard.chunks.chunk_length(shard_chunk)
        if chunk == current.end - 1:
            self._end()

    def _begin(self, current: RebuiltRange) -> None:
        ref = current.shard.ref
        if not current.address:
            self._staged = open_staged(self._context, current.shard)
            return
        client = self._client = self._context.client(current.address)
        when_ready(
            self._context,
            lambda: client.begin_put_shard(
                ref, first_chunk=current.shard.first_chunk, chunk_count=current.shard.chunk_count, stripe=self._stripe
            ),
        )

    def _end(self) -> None:
        self._ranges.pop(0)
        if self._staged is not None:
            self._staged.mark(self._stripe)
            self._context.emit(CoderEvent(kind="stripe_staged", shard=self._staged.chunks.ref))
            self._staged.close()
            self._staged = None
        if self._client is not None:
            with self._context.timed("put"):
                self._client.end_put()
            self._context.release(self._client)
            self._client = None

    def close(self) -> None:
        if self._staged is not None:
            self._staged.close()
            self._staged = None


def open_staged(context: JobContext, shard: ShardRange) -> StagedShard:
    """This node's staging of a shard, once it was prepared; within the job's deadline."""
    ref = shard.ref
    found: list[StagedShard] = []
    when_ready(context, lambda: found.append(StagedShard(context.paths(ref.run), ref)))
    return found[0]


def when_ready(context: JobContext, attempt: Callable[[], None]) -> None:
    """Try until the owner is ready; bounded by the job's deadline. Raises whatever is not ``not_ready``."""
    pause_s = RETRY_S / 8
    while True:
        context.check()
        try:
            attempt()
        except UnavailableError as error:
            if error.reason != NOT_READY:
                raise
        else:
            return
        with context.timed("wait"):
            context.wait(pause_s)
        pause_s = min(2 * pause_s, 4 * RETRY_S)


def crc_of(pieces: Sequence[memoryview]) -> int:
    """crc32c of ``pieces`` one after another."""
    crc = 0
    for piece in pieces:
        crc = crc32c(piece, crc)
    return crc
