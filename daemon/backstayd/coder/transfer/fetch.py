"""Copying a whole shard from peers into this node's staging, each chunk verified in the buffer it is written from."""

from __future__ import annotations

from backstay import faults
from backstay.errors import BackstayError, IntegrityError, UnavailableError
from backstay.format.manifest import CHUNK_BYTES
from backstayd.coder.context import CorruptSourceError, JobContext, shard_ref_of
from backstayd.coder.jobs import FetchShard, shard_event
from backstayd.coder.verified_reads import RemoteShards, ShardRange
from backstayd.store.record_files import ShardChunks, parse_manifest
from backstayd.store.staging import StagedShard, prepare_staging
from backstayd.transport.bulk.client import ShardRef


def run_fetch(context: JobContext, job: FetchShard) -> None:
    """Do ``job``; on return the shard is whole and verified in staging. A failing source is replaced by the next.

    Raises:
        CorruptSourceError, or what the last source failed with: no source is left.
    """
    ref = shard_ref_of(job)
    failures: list[BackstayError] = []
    fetch = _Fetch(context, ref)
    try:
        for address in dict.fromkeys(job.addresses):
            context.check()
            try:
                fetch.copy_from(address)
            except BackstayError as error:
                context.check()
                if error.reason == "no_space":
                    raise
                failures.append(error)
                continue
            return
    finally:
        fetch.close()
    corrupt = [error for error in failures if isinstance(error, CorruptSourceError)]
    if failures:
        raise corrupt[0] if corrupt else failures[-1]
    raise UnavailableError(f"no source named for rank {job.rank} of step {job.step}", reason="no_source")


class _Fetch:
    """One shard on its way; keeps the chunks it has when a source fails."""

    def __init__(self, context: JobContext, ref: ShardRef) -> None:
        self._context = context
        self._ref = ref
        self._staged: StagedShard | None = None
        self._next_chunk = 0

    def copy_from(self, address: str) -> None:
        """Copy what is missing from ``address``."""
        staged = self._staged or self._prepare(address)
        chunks = staged.chunks
        shard = ShardRange(chunks, self._next_chunk, chunks.chunk_count - self._next_chunk)
        source = RemoteShards(self._context, address, [shard] if shard.chunk_count else [])
        buffer = memoryview(bytearray(CHUNK_BYTES))
        try:
            for chunk in range(self._next_chunk, chunks.chunk_count):
                self._context.check()
                if chunk == chunks.chunk_count // 2:
                    faults.reach("mid_fetch", step=chunks.step, rank=chunks.rank)
                with self._context.timed("read"):
                    length = source.read_into(buffer)
                with self._context.timed("write"):
                    staged.write_verified(chunk, [buffer[:length]])
                self._next_chunk = chunk + 1
                self._context.done_bytes += length
        finally:
            source.close()
        self._context.emit(shard_event("shard_staged", chunks))

    def close(self) -> None:
        if self._staged is not None:
            self._staged.close()

    def _prepare(self, address: str) -> StagedShard:
        raw, _chunks = self._manifest(address)
        paths = self._context.paths(self._ref.run)
        prepare_staging(paths, raw, digest=self._ref.digest, incarnation=self._context.incarnation)
        self._staged = StagedShard(paths, rank=self._ref.rank, world_size=self._ref.world_size, digest=self._ref.digest)
        return self._staged

    def _manifest(self, address: str) -> tuple[bytes, ShardChunks]:
        client = self._context.client(address)
        try:
            raw = client.get_manifest(self._ref)
            return raw, parse_manifest(raw, digest=self._ref.digest)
        except IntegrityError as error:
            raise self._context.blame(self._ref, node=address, detail=str(error)) from error
        finally:
            self._context.release(client)
