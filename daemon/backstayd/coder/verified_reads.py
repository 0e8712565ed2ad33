"""Readers of verified chunks: of shards and parity fragments, on this node or on a peer.

A chunk that fails its crc is read once more over another connection. Right then: it was flipped in flight, and counted.
Wrong again while its source is still published: the source is corrupt. Source withdrawn: nobody is blamed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from crc32c import crc32c

from backstay.errors import IntegrityError, UnavailableError
from backstay.format.manifest import CHUNK_BYTES
from backstayd.coder.context import JobContext
from backstayd.core.inventory import geometry
from backstayd.core.messages.plans import Plan
from backstayd.store.paths import FragmentRef, ShardRef
from backstayd.store.published import open_fragment, open_shard
from backstayd.store.record_files import ShardChunks, StoredFragment

RANGES_AHEAD: Final = 8  # requests that a peer has before it is asked for more: a round trip costs nothing then
_SUSPICIOUS = ("wrong_identity", "truncated", "bad_record", "bad_manifest", "bad_format")


@dataclass(frozen=True, slots=True)
class ShardRange:
    """``chunk_count`` chunks of a shard from ``first_chunk`` on."""

    chunks: ShardChunks
    first_chunk: int
    chunk_count: int

    @property
    def ref(self) -> ShardRef:
        return self.chunks.ref


def block_ranges(plan: Plan, member: int, chunks: range, by_digest: dict[str, ShardChunks]) -> list[ShardRange]:
    """The shard ranges behind volume chunks ``chunks`` of ``member``, in order."""
    digests = {shard.rank: shard.digest for shard in plan.members[member].shards}
    return [
        ShardRange(by_digest[digests[segment.rank]], segment.first_chunk, segment.chunk_count)
        for segment in geometry.segments(plan, member, chunks)
    ]


class LocalShards:
    """Chunks of this node's shards, range after range, each file locked while it is read."""

    def __init__(self, context: JobContext, ranges: Sequence[ShardRange]) -> None:
        self._context = context
        self._items = _items(ranges)
        self._open = contextlib.ExitStack()
        self._current: ShardRange | None = None
        self._fd = -1

    def read_into(self, view: memoryview) -> int:
        shard, chunk = next(self._items)
        if shard is not self._current:
            self._begin(shard)
        view = view[: shard.chunks.chunk_length(chunk)]
        _pread(self._fd, view, chunk)
        if crc32c(view) != shard.chunks.chunk_crc(chunk):
            self._begin(shard)  # raises when it was withdrawn meanwhile
            _pread(self._fd, view, chunk)
            _judge(self._context, view, expected=shard.chunks.chunk_crc(chunk), ref=shard.ref, node="", chunk=chunk)
        return len(view)

    def _begin(self, shard: ShardRange) -> None:
        self._open.close()
        ref = shard.ref
        try:
            self._fd, _chunks = self._open.enter_context(open_shard(self._context.paths(ref.run), ref))
        except IntegrityError as error:
            raise self._context.blame(ref, node="", detail=str(error)) from error
        self._current = shard

    def close(self) -> None:
        self._open.close()


class RemoteShards:
    """Chunks of a peer's shards, range after range, over one connection. The next ranges are asked for ahead."""

    def __init__(self, context: JobContext, address: str, ranges: Sequence[ShardRange]) -> None:
        self._context = context
        self._address = address
        self._items = _items(ranges)
        self._ahead = iter(ranges)
        self._current: ShardRange | None = None
        self._client = context.client(address)
        for _ in range(RANGES_AHEAD):
            self._ask()

    def read_into(self, view: memoryview) -> int:
        shard, chunk = next(self._items)
        if shard is not self._current:
            self._begin(shard)
        view = view[: shard.chunks.chunk_length(chunk)]
        self._client.receive_into(view)
        if crc32c(view) != shard.chunks.chunk_crc(chunk):
            self._look_again(shard, chunk, view)
        return len(view)

    def _ask(self) -> None:
        for shard in self._ahead:
            self._client.request(shard.ref, first_chunk=shard.first_chunk, chunk_count=shard.chunk_count)
            return

    def _begin(self, shard: ShardRange) -> None:
        try:
            self._client.begin_answer()
        except IntegrityError as error:
            if error.reason in _SUSPICIOUS:
                raise self._context.blame(shard.ref, node=self._address, detail=str(error)) from error
            raise
        self._current = shard
        self._ask()

    def _look_again(self, shard: ShardRange, chunk: int, view: memoryview) -> None:
        client = self._context.client(self._address)
        try:
            client.read(shard.ref, first_chunk=chunk, chunk_count=1, view=view)
        except IntegrityError as error:
            raise self._context.blame(shard.ref, node=self._address, detail=str(error)) from error
        finally:
            self._context.release(client)
        expected = shard.chunks.chunk_crc(chunk)
        _judge(self._context, view, expected=expected, ref=shard.ref, node=self._address, chunk=chunk)

    def close(self) -> None:
        self._context.release(self._client)


class LocalFragment:
    """Chunks of a parity fragment on this node, from ``first_chunk`` on."""

    def __init__(self, context: JobContext, ref: FragmentRef, *, first_chunk: int) -> None:
        self._context = context
        self._ref = ref
        self._chunk = first_chunk
        self._open = contextlib.ExitStack()
        self._begin()

    @property
    def size_bytes(self) -> int:
        """Of the whole fragment, as its record says."""
        return self._stored.size_bytes

    def read_into(self, view: memoryview) -> int:
        chunk, self._chunk = self._chunk, self._chunk + 1
        view = view[: self._stored.chunk_length(chunk)]
        _pread(self._fd, view, chunk)
        if crc32c(view) != self._stored.chunk_crc(chunk):
            self._begin()
            _pread(self._fd, view, chunk)
            expected = self._stored.chunk_crc(chunk)
            _judge(self._context, view, expected=expected, ref=self._ref, node="", chunk=chunk)
        return len(view)

    def _begin(self) -> None:
        self._open.close()
        ref = self._ref
        try:
            self._fd, self._stored = self._open.enter_context(open_fragment(self._context.paths(ref.run), ref))
            check_fragment(self._stored, ref)
        except IntegrityError as error:
            raise self._context.blame(ref, node="", detail=str(error)) from error

    def close(self) -> None:
        self._open.close()


class RemoteFragment:
    """Chunks of a parity fragment on a peer, with the crcs its record holds; asked for at once."""

    def __init__(
        self, context: JobContext, address: str, ref: FragmentRef, *, first_chunk: int, chunk_count: int
    ) -> None:
        self._context = context
        self._address = address
        self._ref = ref
        self._first = self._chunk = first_chunk
        self._crcs = ""
        self._size_bytes = -1
        self._client = context.client(address)
        self._client.request(ref, first_chunk=first_chunk, chunk_count=chunk_count)

    def read_into(self, view: memoryview) -> int:
        if self._size_bytes < 0:
            self._begin()
        chunk, self._chunk = self._chunk, self._chunk + 1
        view = view[: min(CHUNK_BYTES, self._size_bytes - chunk * CHUNK_BYTES)]
        self._client.receive_into(view)
        expected = self._crc(chunk)
        if crc32c(view) != expected:
            self._look_again(chunk, view, expected)
        return len(view)

    def _begin(self) -> None:
        try:
            reply = self._client.begin_answer()
        except IntegrityError as error:
            raise self._context.blame(self._ref, node=self._address, detail=str(error)) from error
        self._crcs = reply.chunk_crcs
        self._size_bytes = reply.total_bytes

    def _crc(self, chunk: int) -> int:
        begin = 8 * (chunk - self._first)
        try:
            return int(self._crcs[begin : begin + 8], 16)
        except ValueError as error:
            raise self._context.blame(self._ref, node=self._address, detail="its record lacks crcs") from error

    def _look_again(self, chunk: int, view: memoryview, expected: int) -> None:
        client = self._context.client(self._address)
        try:
            client.read(self._ref, first_chunk=chunk, chunk_count=1, view=view)
        except IntegrityError as error:
            raise self._context.blame(self._ref, node=self._address, detail=str(error)) from error
        finally:
            self._context.release(client)
        _judge(self._context, view, expected=expected, ref=self._ref, node=self._address, chunk=chunk)

    def close(self) -> None:
        self._context.release(self._client)


def check_fragment(stored: StoredFragment, ref: FragmentRef) -> None:
    """Raise IntegrityError unless ``stored`` is a sound record of ``ref``."""
    if stored.ref != ref:
        raise IntegrityError("its record is of another fragment", reason="wrong_identity")
    if len(stored.chunk_crcs) != 8 * stored.chunk_count or stored.chunk_bytes != CHUNK_BYTES:
        raise IntegrityError("its record lacks chunk digests", reason="bad_manifest")


def _items(ranges: Sequence[ShardRange]) -> Iterator[tuple[ShardRange, int]]:
    for shard in ranges:
        for chunk in range(shard.first_chunk, shard.first_chunk + shard.chunk_count):
            yield shard, chunk


def pread_chunks(fd: int, view: memoryview, offset: int) -> None:
    """Fill ``view`` from ``offset``; raises UnavailableError (``gone``) for a file that was cut meanwhile."""
    if os.preadv(fd, [view], offset) != len(view):
        raise UnavailableError(f"the file was cut at {offset} while it was read", reason="gone")


def _pread(fd: int, view: memoryview, chunk: int) -> None:
    if os.preadv(fd, [view], chunk * CHUNK_BYTES) != len(view):
        raise UnavailableError(f"chunk {chunk} was cut while it was read", reason="gone")


def _judge(
    context: JobContext, view: memoryview, *, expected: int, ref: ShardRef | FragmentRef, node: str, chunk: int
) -> None:
    """After the second read of a chunk: count a flip in flight, or raise CorruptSourceError."""
    found = crc32c(view)
    if found == expected:
        context.flipped_in_flight += 1
        return
    raise context.blame(ref, node=node, detail=f"chunk {chunk} has crc {found:08x}, expected {expected:08x}")
