"""Shards on durable storage that were verified in place: kept open for the trainers of a decision. Verifies nothing.

Files are opened in threads: a file system that hangs delays one decision, not the node.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Collection
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Final

from backstay.errors import BackstayError, UnavailableError
from backstay.ids import SnapshotKey
from backstay.protocol import framing, messages
from backstayd.coder.jobs import JobResult, VerifyShard
from backstayd.core.messages.decisions import Decision, SourceKind, takes_whole
from backstayd.durable.reader import LocalShard, open_local_shard
from backstayd.node.session import Session
from backstayd.store.published import open_for_trainer
from backstayd.store.store import Store

OPEN_DEADLINE_S: Final = 30.0


class OpenFiles:
    """Invariant: each open file is the one that was verified, for a decision that is still current here."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, str], LocalShard] = {}  # (decision id, digest)

    async def take(self, decision_id: str, job: VerifyShard, result: JobResult) -> JobResult:
        """Open what ``job`` verified; returns a failed result if that fails."""
        try:
            shard = await _open(job)
        except BackstayError as error:
            return replace(result, error_class=UnavailableError.__name__, reason=error.reason, message=str(error))
        if shard.file_id != result.file_id:
            shard.close()
            message = f"the file of rank {job.shard.rank} in {job.url} was replaced during verification"
            return replace(result, error_class=UnavailableError.__name__, reason="replaced", message=message)
        self._drop((decision_id, job.shard.digest))
        self._held[decision_id, job.shard.digest] = shard
        return result

    def open_shards(
        self, store: Store, session: Session, decision: Decision
    ) -> tuple[tuple[messages.RestoredShard, ...], tuple[int, ...]]:
        """The whole shards that this trainer reads, and read-only descriptors of them, which the caller closes.

        Raises:
            SnapshotNotFoundError: one is neither open nor in this node's memory.
        """
        shards: list[messages.RestoredShard] = []
        fds: list[int] = []
        base = decision.base
        if base is None or not takes_whole(decision, rank=session.rank, layout=session.layout):
            return (), ()
        key, sources = SnapshotKey(base.attempt, base.step), {source.rank: source for source in decision.sources}
        try:
            for rank in session.needed_ranks:
                source = sources[rank]
                held = self._descriptor(decision.decision_id, source.digest)
                fd, manifest = held or open_for_trainer(
                    store.index(session.run), store.paths(session.run), key, rank=rank
                )
                fds.append(fd)
                where = base.url if source.kind is SourceKind.PERSISTED else ""
                shards.append(
                    messages.RestoredShard(
                        rank=rank,
                        source=source.kind.value,
                        manifest=manifest,
                        fd_index=len(fds) - 1,
                        detail=", ".join(source.holders) or where,
                    )
                )
        except BaseException:
            framing.close_fds(fds)
            raise
        return tuple(shards), tuple(fds)

    def _descriptor(self, decision_id: str, digest: str) -> tuple[int, dict[str, Any]] | None:
        shard = self._held.get((decision_id, digest))
        if shard is None:
            return None
        manifest: dict[str, Any] = json.loads(shard.manifest_bytes)
        fd = os.dup(shard.fd)
        os.lseek(fd, 0, os.SEEK_SET)  # all duplicates share the offset: trainers read at explicit positions
        return fd, manifest

    def keep(self, decisions: Collection[str]) -> list[tuple[str, str]]:
        """Close files of all decisions but these; returns (decision id, digest) of each."""
        dropped = [place for place in self._held if place[0] not in decisions]
        for place in dropped:
            self._drop(place)
        return dropped

    def _drop(self, place: tuple[str, str]) -> None:
        shard = self._held.pop(place, None)
        if shard is not None:
            shard.close()


async def _open(job: VerifyShard) -> LocalShard:
    future: Future[LocalShard] = Future()
    threading.Thread(target=_open_into, args=(future, job), daemon=True, name="open-persisted").start()
    try:
        async with asyncio.timeout(OPEN_DEADLINE_S):
            return await asyncio.shield(asyncio.wrap_future(future))
    except TimeoutError as error:
        future.add_done_callback(_close_late)
        message = f"opening the file of rank {job.shard.rank} in {job.url} took longer than {OPEN_DEADLINE_S:.0f} s"
        raise UnavailableError(message, reason="unreachable") from error
    except asyncio.CancelledError:
        future.add_done_callback(_close_late)
        raise


def _open_into(future: Future[LocalShard], job: VerifyShard) -> None:
    try:
        ref = job.shard
        future.set_result(open_local_shard(job.url, rank=ref.rank, world_size=ref.world_size, digest=ref.digest))
    except (BackstayError, OSError, ValueError) as error:  # raised where the future is awaited
        future.set_exception(error)


def _close_late(future: Future[LocalShard]) -> None:
    if future.exception() is None:
        future.result().close()
