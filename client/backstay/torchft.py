"""A torchft checkpoint transport: a healthy replica's state goes through its daemon's memory to the replica that recovers.

Each node talks to its own daemon only; the daemons carry the bytes, verified and without pickle. Imports torchft, so it is
imported by its users only.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from backstay import ids
from backstay.errors import (
    BackstayError,
    IntegrityError,
    SnapshotNotFoundError,
    UnavailableError,
    UnrecoverableError,
    UsageError,
)
from backstay.ids import DEFAULT_JOB, RunKey
from backstay.protocol.connection import DaemonConnection, find_socket
from backstay.restore.snapshot import OpenedSnapshot, ReadTarget
from backstay.session.attach import ignore, retry
from backstay.stores.store_session import StoreSession, begin
from backstay.trainer.process_group import World
from backstay.trainer.state import packing

try:
    from torchft.checkpointing.transport import CheckpointTransport
except ImportError as error:
    raise ImportError(
        f"backstay.torchft needs torchft 0.2 or later ({error}): pip install 'backstay[torchft]'"
    ) from error

_log = logging.getLogger("backstay")

__all__ = ["BackstayTransport"]

T = TypeVar("T")

KIND: Final = "torchft"  # the layout in manifests
SCHEME: Final = "backstay:"
PAUSE_S: Final = 0.05
FINISH_S: Final = 5.0
_ALONE: Final = World(rank=0, size=1)
_NOT_YET: Final = (UnavailableError, SnapshotNotFoundError, UnrecoverableError)


class BackstayTransport(CheckpointTransport[T]):
    """Give it to torchft's ``Manager(checkpoint_transport=BackstayTransport(run_id="llama-1"))``.

    What a rank of a replica sends is a run of its own, ``<run_id>-<replica>-<rank>``, of which memory keeps the newest. Nothing
    is sent while all replicas are healthy. Thread-safe.

    Args:
        run_id: The training run; the same for all replicas.
        replica: Name of the replica; default ``$REPLICA_GROUP_ID``. It may be the same after a restart.
        rank: Rank within the replica; default ``$RANK``, else 0.
        job: Name of the job the run belongs to.
        socket: Path of the daemon's socket; default ``$BACKSTAY_SOCKET``, then ``/run/backstay/backstayd.sock``.

    Raises:
        UsageError: for names that cannot be used.
    """

    def __init__(
        self,
        *,
        run_id: str,
        replica: str | None = None,
        rank: int | None = None,
        job: str = DEFAULT_JOB,
        socket: str | os.PathLike[str] | None = None,
    ) -> None:
        replica = os.environ.get("REPLICA_GROUP_ID", "") if replica is None else replica
        if not replica:
            raise UsageError("a replica needs a name of its own: replica=..., or $REPLICA_GROUP_ID", reason="bad_name")
        rank = int(os.environ.get("RANK", "0")) if rank is None else rank
        self.run = RunKey(job, f"{run_id}-{replica}-{rank}")
        self._socket_path = find_socket(socket)
        self._session: StoreSession | None = None
        self._sent = -1
        self._lock = threading.Lock()

    def metadata(self) -> str:
        """What the receiver needs: which run to look for, wherever it lies."""
        return f"{SCHEME}{self.run}"

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: T, timeout: timedelta) -> None:
        """Put the state into the daemon's memory. Returns when it is there: ``state_dict`` may change from then on.

        Raises:
            UsageError: for what would need pickle, naming it. UnavailableError, CapacityError: it could not be kept in time.
        """
        if not dst_ranks:
            return
        deadline = time.monotonic() + timeout.total_seconds()
        found = packing.pack(state_dict, _take)
        with self._lock:
            if step == self._sent:
                return  # the same step is the same state: a second replica asks for it, or asks again
            session = self._session_for(step, deadline)
            layout = found.layout()
            try:
                session.write(step, layout, found.tensors, kind=KIND, wait_s=_left_s(deadline))
            except BaseException as error:
                session.abandon(step, str(error))
                raise
            self._sent = step

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> T:
        """The state that another replica sent at ``step``, through this node's daemon; waits for it up to ``timeout``.

        Raises:
            UnavailableError: it did not come in time. IntegrityError: a byte is wrong.
        """
        begin_s = time.monotonic()
        deadline = begin_s + timeout.total_seconds()
        run = _run_of(metadata)
        try:
            found: T = retry(
                lambda _: self._receive(run, step, deadline), deadline=deadline, pause_s=PAUSE_S,
                is_passing=lambda error: isinstance(error, _NOT_YET),
            )  # fmt: skip
        except _NOT_YET as error:
            raise UnavailableError(
                f"timed out after {time.monotonic() - begin_s:.2f} s waiting for step {step} of replica rank {src_rank} "
                f"({run}): {error}",
                reason="deadline",
            ) from error
        return found

    def disallow_checkpoint(self) -> None:
        """Nothing to do: what was sent is a copy, and a committed one never changes."""

    def shutdown(self, wait: bool = True) -> None:
        """Free what this rank sent, and detach. ``wait=False``: detach only; memory is freed by ``job_ttl_s``."""
        with self._lock:
            session, self._session, self._sent = self._session, None, -1
        if session is None:
            return
        if wait:
            _end(session, FINISH_S)
        else:
            session.close()

    def _session_for(self, step: int, deadline: float) -> StoreSession:
        """The session of this world. A step at or before what memory holds is of another history, which ends here."""
        held = self._sent
        while self._session is None or held >= step:
            session, self._session = self._session, None
            if session is not None:
                _end(session, _left_s(deadline))
            begun = begin(
                str(self.run), _ALONE, ids.new_incarnation(), socket_path=self._socket_path, allow_fresh=True,
                deadline_s=_left_s(deadline),
            )  # fmt: skip
            if begun.source is not None:
                begun.source.close()
            self._session, self._sent = begun.session, -1
            held = begun.restored.step if begun.restored.outcome != "NONE" else -1
            if held >= step and time.monotonic() >= deadline:
                raise UnavailableError(
                    f"timed out: {self.run} still holds step {held}, step {step} cannot be sent", reason="deadline"
                )
        return self._session

    def _receive(self, run: str, step: int, deadline: float) -> Any:
        connection = DaemonConnection(self._socket_path, timeout_s=_left_s(deadline))
        try:
            offer = connection.open(run, step, deadline_s=_left_s(deadline))
            if offer.step != step:  # step 0 too means that very step
                raise IntegrityError(f"asked for step {step} of {run}, offered step {offer.step}", reason="bad_reply")
            with OpenedSnapshot.from_offer(connection, offer, run=run, deadline=deadline, on_progress=ignore) as opened:
                return packing.unpack(_read_all(opened), _give)
        finally:
            connection.close()


def _end(session: StoreSession, timeout_s: float) -> None:
    """Free what was sent, and detach; a daemon that is gone frees it by itself, by ``job_ttl_s``."""
    try:
        session.finish(keep=False, timeout_s=timeout_s)
    except BackstayError as error:
        _log.warning("backstay: %s could not be freed: %s", session.identity.run, error)
    finally:
        session.close()


def _read_all(opened: OpenedSnapshot) -> dict[str, torch.Tensor]:
    tensors = {}
    for name in opened.names():
        stored = opened.tensor(name)
        tensors[name] = torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
    opened.read([ReadTarget(name=name, tensor=t, offsets=(0,) * t.ndim) for name, t in tensors.items()])
    return tensors


def _left_s(deadline: float) -> float:
    return max(0.001, deadline - time.monotonic())


def _run_of(metadata: str) -> str:
    if not metadata.startswith(SCHEME):
        raise UsageError(
            f"the healthy replica sends by another transport ({metadata[:80]!r}): all replicas need "
            "checkpoint_transport=BackstayTransport(...)",
            reason="other_transport",
        )
    return str(RunKey.parse(metadata.removeprefix(SCHEME)))


def _take(value: Any) -> tuple[str, Any] | None:
    """A DTensor as its local part and where it belongs: replicas are cut alike."""
    if not isinstance(value, DTensor):
        return None
    mesh = value.device_mesh
    return "DTensor", {
        "local": value._local_tensor,
        "mesh": mesh.mesh.tolist(),
        "mesh_names": list(mesh.mesh_dim_names) if mesh.mesh_dim_names else None,
        "mesh_device": mesh.device_type,
        "placements": [_describe(placement) for placement in value.placements],
        "shape": list(value.shape),
        "stride": list(value.stride()),
    }


def _give(kind: str, body: Any) -> Any:
    if kind != "DTensor":
        raise IntegrityError(f"the state holds a {kind}, which this version does not make", reason="bad_state")
    mesh = DeviceMesh(
        body["mesh_device"], torch.tensor(body["mesh"], dtype=torch.int, device="cpu"), _init_backend=False,
        mesh_dim_names=tuple(body["mesh_names"]) if body["mesh_names"] else None,
        _rank=dist.get_rank() if dist.is_initialized() else 0,
    )  # fmt: skip
    found = body["local"]
    meta = TensorMeta(torch.Size(body["shape"]), tuple(body["stride"]), found.dtype)
    placements = tuple(_placement(*described) for described in body["placements"])
    return DTensor(found, DTensorSpec(mesh, placements, tensor_meta=meta), requires_grad=False)


def _describe(placement: Placement) -> list[Any]:
    if isinstance(placement, Replicate):
        return ["replicate"]
    if type(placement) is Shard:
        return ["shard", placement.dim]
    if type(placement) is _StridedShard:
        return ["strided", placement.dim, placement.split_factor]
    raise UsageError(f"a DTensor with placement {placement} has no state of its own", reason="unsupported_tensor")


def _placement(kind: str, *numbers: int) -> Placement:
    if kind == "replicate":
        return Replicate()
    return Shard(numbers[0]) if kind == "shard" else _StridedShard(numbers[0], split_factor=numbers[1])
