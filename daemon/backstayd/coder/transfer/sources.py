"""Where the chunks of a shard can be had: from a peer, or from durable storage. One interface, so that a fetch is one job.

Every chunk is verified in the buffer that is handed on. Must not decide which chunks are wanted, nor write any.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol

from crc32c import crc32c

from backstay.errors import IntegrityError, SnapshotNotFoundError
from backstay.format.manifest import CHUNK_BYTES
from backstayd.coder.context import CorruptSourceError, JobContext
from backstayd.coder.verified_reads import LocalFragment, LocalShards, RemoteShards, ShardRange
from backstayd.core.inventory.durable_names import manifest_name
from backstayd.durable.open import open_place
from backstayd.durable.place import MIN_RANGE_BYTES
from backstayd.durable.reader import PARALLEL_REQUESTS, PersistedShard, open_file
from backstayd.store.paths import ShardRef
from backstayd.store.record_files import ShardChunks, parse_manifest

Take = Callable[[int, memoryview], None]  # (first chunk, the bytes of whole chunks from it on), valid during the call

LOCAL_CHUNKS: Final = 16  # read at once from a file system of this machine
LOCAL_THREADS: Final = 2  # reading and checking beside writing
REMOTE_CHUNKS: Final = PARALLEL_REQUESTS * MIN_RANGE_BYTES // CHUNK_BYTES


class ChunkSource(Protocol):
    """One holder of the shards of a snapshot. Close it."""

    fault_point: str  # reached in the middle of what is read from it

    def manifest(self, ref: ShardRef) -> bytes:
        """The exact bytes of the shard's manifest; raises IntegrityError unless they have its digest."""

    def read(self, chunks: ShardChunks, runs: Sequence[range], take: Take) -> None:
        """Hand every chunk of ``runs`` to ``take`` once, verified; several threads may call it at a time.

        Raises:
            CorruptSourceError: a chunk is wrong at its source.
        """

    def blame(self, ref: ShardRef, detail: str) -> CorruptSourceError:
        """Note that what lies there is not the shard; returns the error to raise."""

    def close(self) -> None: ...


def sources_of(context: JobContext, addresses: Sequence[str], url: str) -> Iterator[ChunkSource]:
    """The directory ``url`` on durable storage if there is one, else the peers at ``addresses``, each once."""
    if url:
        yield DurableSource(context, url)
    else:
        yield from (PeerSource(context, address) for address in dict.fromkeys(addresses))


class PeerSource:
    """A peer, over one connection at a time."""

    fault_point = "mid_fetch"

    def __init__(self, context: JobContext, address: str) -> None:
        self._context = context
        self._address = address
        self._client = context.client(address)

    def manifest(self, ref: ShardRef) -> bytes:
        raw = self._client.get_manifest(ref)
        parse_manifest(raw, digest=ref.digest)
        return raw

    def read(self, chunks: ShardChunks, runs: Sequence[range], take: Take) -> None:
        self._client.close()  # the manifest is here, and the chunks come over a connection of their own
        ranges = [ShardRange(chunks, run.start, len(run)) for run in runs]
        read_in_order(self._context, RemoteShards(self._context, self._address, ranges), runs, take)

    def blame(self, ref: ShardRef, detail: str) -> CorruptSourceError:
        return self._context.blame(ref, node=self._address, detail=detail)

    def close(self) -> None:
        self._context.release(self._client)


class DurableSource:
    """The directory of a snapshot on durable storage."""

    fault_point = "mid_fetch_persisted"

    def __init__(self, context: JobContext, url: str) -> None:
        self._context = context
        self._url = url
        self._place = open_place(url)

    def manifest(self, ref: ShardRef) -> bytes:
        try:
            raw = self._place.read_small(manifest_name(ref.rank, ref.world_size))
        except SnapshotNotFoundError as error:
            raise IntegrityError(str(error), reason=error.reason) from error
        parse_manifest(raw, digest=ref.digest)
        return raw

    def read(self, chunks: ShardChunks, runs: Sequence[range], take: Take) -> None:
        try:
            shard = open_file(self._place, chunks)
        except (IntegrityError, SnapshotNotFoundError) as error:
            raise self.blame(chunks.ref, str(error)) from error
        count, threads = (REMOTE_CHUNKS, 1) if shard.is_remote else (LOCAL_CHUNKS, LOCAL_THREADS)
        try:
            read_blocks(self._context, shard, self._url, runs, take, block_chunks=count, threads=threads)
        finally:
            shard.close()

    def blame(self, ref: ShardRef, detail: str) -> CorruptSourceError:
        return self._context.blame(ref, url=self._url, detail=detail)

    def close(self) -> None:
        """Nothing stays open."""


def read_in_order(
    context: JobContext, reader: LocalShards | RemoteShards | LocalFragment, runs: Sequence[range], take: Take
) -> None:
    """Hand on the chunks of ``runs``, which ``reader`` gives verified and in that order; closes it."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    try:
        for run in runs:
            for chunk in run:
                context.check()
                with context.timed("read"):
                    length = reader.read_into(buffer)
                take(chunk, buffer[:length])
    finally:
        reader.close()


def read_blocks(
    context: JobContext,
    shard: PersistedShard,
    url: str,
    runs: Sequence[range],
    take: Take,
    *,
    block_chunks: int,
    threads: int,
) -> None:
    """Read ``runs`` of a shard that lies in the directory ``url``, a few threads each with one buffer of ``block_chunks``.

    The first error keeps the threads from taking further blocks, and is raised. Threads take blocks themselves: a future
    for each block would cost a third of the time of reading and checking 1 MiB.
    """
    blocks = iter(_blocks(runs, block_chunks))

    def work() -> None:
        buffer = memoryview(bytearray(min(block_chunks * CHUNK_BYTES, shard.chunks.size_bytes)))
        try:
            for block in blocks:
                context.check()
                with context.timed("read"):
                    found = _read_block(context, shard, url, block, buffer)
                for first, view in found:
                    take(first, view)
        except BaseException:
            deque(blocks, maxlen=0)
            raise

    with ThreadPoolExecutor(threads, thread_name_prefix="blocks") as pool:
        for worker in [pool.submit(work) for _ in range(threads)]:
            worker.result()


def _read_block(
    context: JobContext, shard: PersistedShard, url: str, block: Sequence[range], buffer: memoryview
) -> list[tuple[int, memoryview]]:
    """(first chunk, bytes) of each run in ``block``, verified. A wrong chunk is read once more: it may have been flipped
    on its way."""
    chunks, found, begin = shard.chunks, list[tuple[int, memoryview]](), 0
    for run in block:
        length = sum(chunks.chunk_length(chunk) for chunk in run)
        found.append((run.start, buffer[begin : begin + length]))
        begin += length
    try:
        shard.read_ranges([(first * CHUNK_BYTES, view) for first, view in found])
        for first, view in found:
            for place in range(0, len(view), CHUNK_BYTES):
                _check(context, shard, first + place // CHUNK_BYTES, view[place : place + CHUNK_BYTES])
    except IntegrityError as error:
        raise context.blame(chunks.ref, url=url, detail=str(error)) from error
    return found


def _check(context: JobContext, shard: PersistedShard, chunk: int, piece: memoryview) -> None:
    expected = shard.chunks.chunk_crc(chunk)
    if crc32c(piece) == expected:
        return
    shard.read_ranges([(chunk * CHUNK_BYTES, piece)])
    found = crc32c(piece)
    if found != expected:
        raise IntegrityError(f"chunk {chunk} has crc {found:08x}, expected {expected:08x}")
    context.flipped_in_flight += 1


def _blocks(runs: Sequence[range], block_chunks: int) -> list[list[range]]:
    """The same chunks in lists of at most ``block_chunks``."""
    blocks: list[list[range]] = []
    room = 0
    for run in runs:
        begin = run.start
        while begin < run.stop:
            if room == 0:
                blocks.append([])
                room = block_chunks
            end = min(run.stop, begin + room)
            blocks[-1].append(range(begin, end))
            room -= end - begin
            begin = end
    return blocks
