"""restore(): ask the daemon for the world's decision, then put it into model, optimizers, extras and generators.

All or an error. Must not guess: whatever does not fit or cannot be verified raises.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from backstay import local, optimizer_state, record, rng, shard, sources, state
from backstay.control import DaemonConnection
from backstay.digest import verify_chunks
from backstay.errors import IntegrityError, UnavailableError
from backstay.load import OpenShard, load, true_dtype, true_shape
from backstay.manifest import CHUNK_BYTES, Manifest

_log = logging.getLogger("backstay")
STATE_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreResult:
    """What restore() did.

    ``outcome``: ``EXACT``, ``EXACT_OLDER`` (not the newest step that was begun) or ``NONE`` (a new run: nothing was touched).
    ``attempt`` is the history this world writes, ``base_attempt`` the one that ``step`` is of. ``sources``: rank of a shard →
    ``local``, ``peer``, ``rebuild`` or ``persisted``, with the nodes.
    """

    step: int
    outcome: str
    attempt: int
    base_attempt: int = 0
    snapshot_id: str = ""
    sources: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a snapshot is put."""

    model: torch.nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    extra: Mapping[str, Any]
    rank: int
    world_size: int
    run: str
    signature: str


def ask(
    socket_path: str, attach: local.Attach, *, allow_fresh: bool, deadline_s: float
) -> tuple[DaemonConnection, local.Attached, local.Restored, list[int]]:
    """Attach and wait for the decision, again and again until the deadline while the daemon is unavailable.

    Returns:
        The open connection, its Attached, the decision, and the shards' descriptors, which the caller closes.
    """
    deadline = time.monotonic() + deadline_s
    progress = _Progress(attach.rank)
    while True:
        left = deadline - time.monotonic()
        connection = None
        try:
            connection = DaemonConnection(socket_path, timeout_s=min(5.0, max(0.1, left)))
            attached = connection.attach(attach, deadline_s=min(10.0, max(0.1, left)))
            request = local.Restore(allow_fresh=allow_fresh, deadline_s=max(0.1, left), world_size=attach.world_size)
            restored, fds = connection.restore(request, progress)
            return connection, attached, restored, list(fds)
        except BaseException as error:
            if connection is not None:
                connection.close()
            is_final = not isinstance(error, (UnavailableError, OSError)) or time.monotonic() + 0.2 >= deadline
            if is_final and isinstance(error, OSError):
                raise UnavailableError(f"{socket_path}: {error}; restore() gives up after {deadline_s:g} s") from error
            if is_final:
                raise
            progress.say(f"daemon at {socket_path} is not available ({error}); trying again for {left:.0f} s")
            _pause(0.2)


def apply(target: Target, restored: local.Restored, fds: Sequence[int]) -> None:
    """Load the decided snapshot from its shards.

    Raises:
        IntegrityError: naming what does not fit, is missing or is corrupt.
    """
    shards = [_open(target, restored, fds[item.fd_index], item.manifest) for item in restored.shards]
    own = next((s for s in shards if s.manifest.rank == target.rank), None)
    if own is None:
        raise IntegrityError(
            f"the daemon sent shards of ranks {[s.manifest.rank for s in shards]}, not that of rank {target.rank}",
            reason="missing_shard",
        )
    holdings = sources.collect(target.model, target.optimizers, rank=target.rank)
    _check_signature(target, own, shards, holdings)
    metadata = _metadata(own)
    prefix = f"rank-{target.rank:05d}."
    private = _read_private(own, prefix)
    document = _document(private.pop(f"{prefix}state.json", None), own)
    _check_extras(target, document)
    states = optimizer_state.make_states(target.optimizers, holdings, metadata.get(optimizer_state.METADATA_KEY, "[]"))
    wanted = sources.collect(target.model, target.optimizers, rank=target.rank, states=states)
    load(shards, wanted.tensors, {})
    tensors = _named_by_path(private, f"{prefix}extra.", document, target)
    with torch.no_grad():
        optimizer_state.apply(target.optimizers, holdings, states, document["optimizers"], tensors)
    for name, stateful in target.extra.items():
        stateful.load_state_dict(state.decode(document["extra"][name], tensors))
    start = f"{prefix}rng."
    generators = {name.removeprefix(start): tensor for name, tensor in private.items() if name.startswith(start)}
    rng.write(state.decode(document["rng"], tensors), generators)  # last: all of the above may draw


def read_dynamic(target: Target, holdings: sources.Holdings) -> tuple[bytes, dict[str, torch.Tensor]]:
    """What a snapshot captures besides the tensors of model and optimizers: JSON bytes, and tensors by their stored name."""
    tensors: dict[str, torch.Tensor] = {}
    optimizers = optimizer_state.read_values(target.optimizers, holdings, tensors)
    extra = {name: state.encode(stateful.state_dict(), name, tensors) for name, stateful in target.extra.items()}
    distributed = [path for path, tensor in tensors.items() if isinstance(tensor, DTensor)]
    plain, generators = rng.read()
    document = {
        "format": STATE_FORMAT,
        "optimizers": optimizers,
        "extra": extra,
        "distributed": distributed,
        "rng": state.encode(plain, "rng", tensors),
    }
    prefix = f"rank-{target.rank:05d}."
    named = {f"{prefix}extra.{path}": t._local_tensor if isinstance(t, DTensor) else t for path, t in tensors.items()}
    named.update({f"{prefix}rng.{kind}": tensor for kind, tensor in generators.items()})
    return state.dumps(document), named


class _Progress:
    """Says once a second what is being waited for: to the log if someone listens, else rank 0 to stderr."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._begin_s = time.monotonic()
        self._said_s = self._begin_s
        self._last = ""

    def __call__(self, progress: local.Progress) -> None:
        amount = f" {progress.done_bytes >> 20} of {progress.total_bytes >> 20} MiB" if progress.total_bytes else ""
        self.say(f"{progress.phase}{amount}{': ' if progress.detail else ''}{progress.detail}")

    def say(self, text: str) -> None:
        now = time.monotonic()
        if now - self._said_s < 1.0 or (text == self._last and now - self._said_s < 10.0):
            return
        self._said_s, self._last = now, text
        line = f"backstay restore, rank {self._rank}, {now - self._begin_s:.0f} s: {text}"
        if _log.isEnabledFor(logging.INFO):
            _log.info("%s", line)
        elif self._rank == 0:
            print(line, file=sys.stderr, flush=True)


def _pause(seconds: float) -> None:
    time.sleep(seconds)


def _open(target: Target, restored: local.Restored, fd: int, body: Mapping[str, Any]) -> OpenShard:
    manifest = record.from_json(Manifest, dict(body))
    found = (manifest.run, manifest.attempt, manifest.step, manifest.world_size)
    expected = (target.run, restored.base_attempt, restored.step, target.world_size)
    if found != expected:
        raise IntegrityError(
            f"shard of rank {manifest.rank} is of (run, attempt, step, world size) {found}, decided was {expected}; "
            "nothing was loaded",
            reason="wrong_identity",
        )
    shard.check_file(fd, manifest)
    return OpenShard(manifest=manifest, fd=fd)


def _check_signature(target: Target, own: OpenShard, shards: Sequence[OpenShard], holdings: sources.Holdings) -> None:
    if not own.manifest.model_signature or own.manifest.model_signature == target.signature:
        return
    here = {t.name: (t.global_shape, str(t.local.dtype)) for t in holdings.tensors if ".model." in f".{t.name}"}
    there = {
        e.name: (tuple(e.global_shape), e.torch_dtype)
        for s in shards
        for e in s.manifest.tensors
        if e.name.startswith((f"rank-{target.rank:05d}.model.", "model."))
    }
    differing = [
        f"{n}: {there[n]} in the snapshot, {here[n]} here" for n in here.keys() & there.keys() if here[n] != there[n]
    ]
    raise IntegrityError(
        f"{own.label} was made by another model: missing here {sorted(there.keys() - here.keys())[:5]}, "
        f"missing in the snapshot {sorted(here.keys() - there.keys())[:5]}, differing {sorted(differing)[:5]}; "
        "nothing was loaded. A changed model needs a new run_id",
        reason="wrong_model",
    )


def _metadata(own: OpenShard) -> dict[str, str]:
    """Own keys of the header, read from bytes that were verified in this very buffer."""
    manifest = own.manifest
    end = min(manifest.size_bytes, -(-manifest.header_bytes // CHUNK_BYTES) * CHUNK_BYTES)
    data = shard.read_range(own.fd, 0, end)
    verify_chunks(memoryview(data), manifest, 0)
    return shard.parse_header(data[: manifest.header_bytes], size_bytes=manifest.size_bytes).metadata


def _read_private(own: OpenShard, prefix: str) -> dict[str, torch.Tensor]:
    """This rank's JSON, extras and generator states, by stored name."""
    starts = (f"{prefix}state.json", f"{prefix}extra.", f"{prefix}rng.")
    private = {
        entry.name: torch.empty(true_shape(entry), dtype=true_dtype(entry))
        for entry in own.manifest.tensors
        if entry.name.startswith(starts)
    }
    load([own], [], private)
    return private


def _document(data: torch.Tensor | None, own: OpenShard) -> dict[str, Any]:
    if data is None:
        raise IntegrityError(f"{own.label} has no state of its rank; nothing was loaded", reason="missing_tensor")
    document = state.loads(bytes(data.tolist()))
    if not isinstance(document, dict) or document.get("format") != STATE_FORMAT:
        raise IntegrityError(
            f"{own.label}: state of a format this version does not read; nothing was loaded", reason="bad_state"
        )
    return document


def _check_extras(target: Target, document: Mapping[str, Any]) -> None:
    here, there = set(target.extra), set(document["extra"])
    if here != there:
        raise IntegrityError(
            f"the snapshot has extras {sorted(there)}, this Snapshotter {sorted(here)}; nothing was loaded",
            reason="wrong_extras",
        )


def _named_by_path(
    private: Mapping[str, torch.Tensor], start: str, document: Mapping[str, Any], target: Target
) -> dict[str, torch.Tensor]:
    tensors = {name.removeprefix(start): tensor for name, tensor in private.items() if name.startswith(start)}
    if document["distributed"]:
        templates: dict[str, torch.Tensor] = {}
        for name, stateful in target.extra.items():
            state.encode(stateful.state_dict(), name, templates)
        for path in document["distributed"]:
            template = templates.get(path)
            if not isinstance(template, DTensor) or template._local_tensor.shape != tensors[path].shape:
                raise IntegrityError(
                    f"extra {path} is a DTensor in the snapshot, here it is not or differs", reason="wrong_extras"
                )
            tensors[path] = DTensor.from_local(
                tensors[path].to(template._local_tensor.device), template.device_mesh, template.placements,
                run_check=False, shape=template.shape, stride=template.stride(),
            )  # fmt: skip
    return tensors


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
