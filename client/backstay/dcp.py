"""PyTorch Distributed Checkpoint into the memory of the nodes: writer, reader and stager for dcp.save, async_save and load.

    store = backstay.dcp.Store(run_id="gpt-7b-3")
    step = store.begin()                                     # None: a new run
    if step is not None:
        dcp.load(state, storage_reader=store.reader())       # into any world size and any sharding
    dcp.save(state, storage_writer=store.writer(100))
    dcp.async_save(state, storage_writer=store.writer(200), async_stager=store.stager())

Must not unpickle what it read, nor write or trust a ``.metadata`` file: what DCP needs to know is in the shards' manifests.
"""

from __future__ import annotations

import io
import logging
import os
from typing import Any, Final, NoReturn

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from backstay.errors import BackstayError, SnapshotNotFoundError, UsageError
from backstay.ids import DEFAULT_JOB, RunKey
from backstay.protocol.connection import find_socket
from backstay.restore.read_plan import true_shape
from backstay.restore.snapshot import OpenedSnapshot, ReadTarget
from backstay.session.session import Slot
from backstay.stores import dcp_items, dcp_staging
from backstay.stores.fill_bytes import fill, hash_in_place, put
from backstay.stores.snapshot_reader import SnapshotReader
from backstay.stores.store_session import StoreSession, begin
from backstay.trainer import argument_checks
from backstay.trainer.process_group import agree_on_id, current_world

_log = logging.getLogger("backstay")

__all__ = ["BackstayReader", "BackstayStager", "BackstayWriter", "Store"]

KIND: Final = "dcp"  # the layout in manifests: cut as DCP planned it
DEFAULT_MAX_WAIT_S: Final = 10.0


class Store:
    """One rank's part of a run that is saved and loaded by DCP.

    Saves are thread-safe against each other's background threads; one save at a time. A step that cannot be kept (no daemon, no
    memory) is a warning and ``last_problem``, and training continues; ``strict`` raises instead, on every rank, as DCP does.

    Args:
        run_id: The training run whose state this is; a new one for a run that starts from scratch.
        job: Name of the job the run belongs to.
        socket: Path of the daemon's socket; default ``$BACKSTAY_SOCKET``, then ``/run/backstay/backstayd.sock``.
        strict: Raise where a step cannot be kept.
        max_wait_s: How long a save may wait for a free slot.
    """

    def __init__(
        self,
        *,
        run_id: str,
        job: str = DEFAULT_JOB,
        socket: str | os.PathLike[str] | None = None,
        strict: bool = False,
        max_wait_s: float = DEFAULT_MAX_WAIT_S,
    ) -> None:
        self._run = RunKey(job, run_id)
        self._socket_path = find_socket(socket)
        self.is_strict = strict
        self.max_wait_s = argument_checks.seconds_of("max_wait_s", max_wait_s)
        self.last_problem = ""
        self.step: int | None = None  # what this world began from; None: nothing
        self._session: StoreSession | None = None
        self._source: SnapshotReader | None = None
        self.save = dcp_staging.Save()

    def begin(self, *, allow_fresh: bool = False, deadline_s: float = 600.0) -> int | None:
        """Join the world of the run and return the step that it continues from; None for a run that is provably new.

        A collective: all ranks of torch.distributed call it, once, before load and save.

        Args:
            allow_fresh: Start over if the run is known but nothing of it can be restored.

        Raises:
            UnavailableError: no daemon, or no decision in time. UnrecoverableError: a known run without a restorable snapshot.
        """
        self.close()
        place = current_world()
        begun = begin(
            str(self._run), place, agree_on_id(place, deadline_s=deadline_s), socket_path=self._socket_path,
            allow_fresh=allow_fresh, deadline_s=deadline_s,
        )  # fmt: skip
        self._session, self._source = begun.session, begun.source
        self.step = begun.source.step if begun.source is not None else None
        return self.step

    def reader(self) -> BackstayReader:
        """For ``dcp.load``: the snapshot that :meth:`begin` found."""
        return BackstayReader(self)

    def writer(self, step: int) -> BackstayWriter:
        """For one ``dcp.save`` or ``dcp.async_save``: all ranks give the same step, higher than the one before."""
        step = argument_checks.step_of("writer", step)
        self.save.aim(step, self.session)
        return BackstayWriter(self, step)

    def stager(self) -> BackstayStager:
        """For ``dcp.async_save``: copies into the memory of the daemon itself, so that each byte is copied once."""
        return BackstayStager(self)

    def wait_complete(self, step: int, timeout_s: float = 60.0) -> bool:
        """Wait until every rank's shard of ``step`` is held; False at the end of the time."""
        return self.session.wait_complete(step, timeout_s)

    def finish(self, *, keep: bool = False) -> None:
        """The run ended well: free its memory everywhere (``keep=True``: it stays until ``job_ttl_s``), and detach."""
        if self._session is not None:
            self._session.finish(keep=keep)
        self.close()

    def close(self) -> None:
        """Detach; what is committed stays in memory. Idempotent."""
        session, self._session = self._session, None
        source, self._source = self._source, None
        if session is not None:
            session.close()
        if source is not None:
            source.close()
        self.save = dcp_staging.Save()

    @property
    def session(self) -> StoreSession:
        if self._session is None:
            raise UsageError(
                "this store has not begun (or was closed): call begin() on all ranks first", reason="not_begun"
            )
        return self._session

    @property
    def source(self) -> SnapshotReader:
        if self._source is None:
            raise SnapshotNotFoundError(
                f"run {self._run} has nothing to load: begin() returned None, or was not called; start from scratch",
                reason="nothing_to_load",
            )
        return self._source

    def refuse(self, step: int, error: Exception) -> None:
        """A step cannot be kept: warn once per reason, or raise."""
        if self._session is not None:
            self._session.abandon(step, str(error))
        if self.is_strict or not isinstance(error, (BackstayError, OSError)) or isinstance(error, UsageError):
            raise error
        if str(error) != self.last_problem:
            _log.warning("backstay: step %d is not kept: %s; training continues", step, error)
        self.last_problem = str(error)


class BackstayWriter(StorageWriter):
    """Writes what DCP planned for this rank as its shard of one step; every rank commits for itself."""

    def __init__(self, store: Store, step: int) -> None:
        self._store = store
        self.step = step
        self.is_committed = False

    def reset(self, checkpoint_id: Any = None) -> None:
        """A checkpoint_id means nothing here: the step is the writer's."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up: each rank is a writer of its own."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Fill a slot and commit it; what was staged is only hashed."""
        store, save = self._store, self._store.save
        staged = save.take(self.step)
        slot: Slot | None = staged.slot if staged is not None else None
        try:
            found = dcp_items.resolve(plan, planner, rank=store.session.place.rank, capacities=save.byte_capacities)
            if staged is not None and staged.problem is not None:
                raise staged.problem
            if staged is not None and staged.layout is not None and slot is not None:
                staged.check(found)
                for name, tensor in found.payloads.items():
                    put(slot.mapping, staged.layout, name, tensor)
                layout, digests = staged.layout, hash_in_place(slot.mapping, staged.layout)
            else:
                layout = dcp_items.layout_of(found)
                slot = store.session.grant(self.step, layout.size_bytes, wait_s=store.max_wait_s)
                digests = fill(store.session.filler, slot.mapping, layout, found.sources, step=self.step)
            store.session.commit(slot, layout, digests, layout_signature=KIND)
            self.is_committed = True
            save.remember(found, layout, staged)
        except Exception as error:  # noqa: BLE001 - whatever it is, the step is given up, and the store warns or raises
            save.forget()
            store.refuse(self.step, error)
        finally:
            save.end()
        future: Future[list[WriteResult]] = Future()
        future.set_result(
            [
                WriteResult(index=item.index, size_in_bytes=found.size_of(item), storage_data=store.session.place.rank)
                for item in plan.items
            ]
            if self.is_committed
            else [WriteResult(index=item.index, size_in_bytes=0, storage_data=None) for item in plan.items]
        )
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Nothing is written: that a step is whole is known to the coordinator, see :meth:`wait_complete`."""
        metadata.storage_data = {result.index: result.storage_data for each in results for result in each}

    def wait_complete(self, timeout_s: float = 60.0) -> bool:
        """Wait until every rank's shard of this step is held; False at the end of the time."""
        return self._store.wait_complete(self.step, timeout_s)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """DCP finds storages by checkpoint_id; this one is always given by hand."""
        return False

    def storage_meta(self) -> StorageMeta | None:
        return None

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            "a backstay writer cannot go to another process: use async_checkpointer_type=AsyncCheckpointerType.THREAD",
            reason="other_process",
        )


class BackstayReader(StorageReader):
    """Reads the snapshot a world began from, into whatever sharding the target state has."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._places: dict[MetadataIndex, tuple[str, tuple[int, ...]]] = {}  # stored name, and where its box begins

    def reset(self, checkpoint_id: Any = None) -> None:
        """A checkpoint_id means nothing here: what is read was decided in begin()."""

    def read_metadata(self, *args: Any, **_: Any) -> Metadata:
        """What the manifests list, and how it was nested when it was saved (planner_data)."""
        source = self._store.source
        metadata, holders = source.read(self._describe)
        nesting: dcp_items.Nesting = {}
        seen: set[int] = set()
        for fqn, ranks in holders.items():
            if fqn not in nesting and ranks and seen.isdisjoint(ranks):  # few are read: ranks nest much alike
                rank = min(ranks)
                seen.add(rank)
                name = dcp_items.nesting_name(rank)
                nesting |= dcp_items.unpack_nesting(source.read_bytes(name), name)
        if seen:
            found = metadata.state_dict_metadata
            metadata.planner_data = {fqn: path for fqn, path in nesting.items() if fqn in found}
            metadata.state_dict_metadata = {fqn: found[fqn] for fqn in metadata.planner_data} | found  # in saved order
        return metadata

    def _describe(self, opened: OpenedSnapshot) -> tuple[Metadata, dict[str, set[int]]]:
        """The metadata without its planner_data, and for each fqn the ranks that hold it and wrote how it is nested."""
        found: dict[str, Any] = {}
        holders: dict[str, set[int]] = {}
        self._places = {}
        own = self._store.session.place.rank
        nested = {rank for rank in opened.manifests if opened.entries(dcp_items.nesting_name(rank))}
        for name in [*opened.names(), *opened.aliases()]:
            if dcp_items.is_nesting_name(name):
                continue
            thing = dcp_items.object_of(name)
            if thing is not None:
                rank, fqn = thing
                found.setdefault(fqn, BytesStorageMetadata())
                holders.setdefault(fqn, set()).update({rank} & nested)
                if rank == own or MetadataIndex(fqn) not in self._places:
                    self._places[MetadataIndex(fqn)] = (name, ())
                continue
            found[name] = self._tensor(opened, name)
            holders[name] = {rank for rank, _ in opened.entries(name)} & nested
        metadata = Metadata(state_dict_metadata=found, storage_data=dict(self._places), storage_meta=StorageMeta())
        return metadata, holders

    def _tensor(self, opened: OpenedSnapshot, name: str) -> TensorStorageMetadata:
        """One tensor and its chunks, whose places are noted."""
        stored = opened.tensor(name)
        tensor = TensorStorageMetadata(
            properties=TensorProperties(dtype=stored.dtype), size=torch.Size(stored.shape), chunks=[]
        )
        for _, entry in opened.entries(name):
            index = MetadataIndex(name, entry.offsets)
            if index not in self._places:  # else a replica
                self._places[index] = (name, entry.offsets)
                sizes = torch.Size(true_shape(entry))
                tensor.chunks.append(ChunkStorageMetadata(offsets=torch.Size(entry.offsets), sizes=sizes))
        return tensor

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Each rank made its metadata itself."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read every planned box into its tensor, verified there.

        Raises:
            IntegrityError: a byte is wrong, or bytes would need more than plain types to be read.
        """
        source = self._store.source
        tensors = [item for item in plan.items if item.type is not LoadItemType.BYTE_IO]
        targets = [planner.resolve_tensor(item).detach() for item in tensors]
        boxes = [self._target(item, target) for item, target in zip(tensors, targets, strict=True)]
        source.read(lambda opened: opened.read(boxes))
        for item, target in zip(tensors, targets, strict=True):
            planner.commit_tensor(item, target)
        for item in plan.items:
            if item.type is LoadItemType.BYTE_IO:
                name, _ = self._places[item.storage_index]
                data = dcp_items.unpack(source.read_bytes(name), item.storage_index.fqn)
                planner.load_bytes(item, io.BytesIO(data))
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _target(self, item: ReadItem, target: torch.Tensor) -> ReadTarget:
        name, begin = self._places[item.storage_index]
        offsets = tuple(a + b for a, b in zip(begin, item.storage_offsets, strict=True))
        return ReadTarget(name=name, tensor=target, offsets=offsets)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """DCP finds storages by checkpoint_id; this one is always given by hand."""
        return False


class BackstayStager(AsyncStager):
    """Stages a state into this rank's slot, so that ``async_save`` copies each byte once.

    Which tensors this rank will write is known from the save before: the first save of a state, and the first after it changed,
    is staged in ordinary memory and copied a second time.
    """

    _synchronize_after_execute = False

    def __init__(self, store: Store) -> None:
        self._store = store

    def stage(self, state_dict: Any) -> Any:
        """A copy of the state that later changes of the original do not reach; returns when it is made."""
        store = self._store
        return store.save.stage(state_dict, store.session, wait_s=store.max_wait_s)

    def synchronize_staging(self) -> None:
        """Staging is done when :meth:`stage` returns."""

    def close(self) -> None:
        """Give back what was staged and not written."""
        session, staged = self._store._session, self._store.save.drop()
        if session is not None and staged is not None and staged.slot is not None:
            session.abandon(staged.slot.step, "staged and never written", slot=staged.slot)
