"""Putting the decided snapshot into model, optimizers, extras and generators.

All or an error. Must not guess: whatever does not fit or cannot be verified raises.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from backstay import local, record, shard
from backstay.digest import verify_chunks
from backstay.errors import IntegrityError
from backstay.manifest import CHUNK_BYTES, Manifest
from backstay.restore.load import OpenShard, load, true_dtype, true_shape
from backstay.trainer import optimizer_state, rng, sources, state

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What was loaded, for the gate to hold against what is there afterwards.

    ``description``: of the optimizers' state, as in the header. ``streams``: logical ranks whose random streams this rank
    goes on with; ``cursors``: extras that are a position of one rank alone, and of which; ``generators``: as they were set.
    """

    description: str
    streams: tuple[int, ...]
    cursors: Mapping[str, int] = field(default_factory=dict)
    generators: Mapping[str, torch.Tensor] = field(default_factory=dict)


def apply(target: Target, restored: local.Restored, fds: Sequence[int]) -> Loaded:
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
    description = metadata.get(optimizer_state.METADATA_KEY, "[]")
    states = optimizer_state.make_states(target.optimizers, holdings, description)
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
    return Loaded(
        description=description,
        streams=(own.manifest.rank,),
        cursors=dict.fromkeys(target.extra, own.manifest.rank),
        generators=generators,
    )


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
