"""Putting a snapshot into model, optimizers, extras and generators.

Everything is planned, checked and brought to this node before the first byte is written. Must not guess: whatever does not
fit or cannot be verified raises.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from backstay.errors import IntegrityError
from backstay.format.shard import IMPORTED_KEY
from backstay.restore import imported_state, optimizers, rank_state
from backstay.restore.imported_state import ImportedPlan
from backstay.restore.optimizers import Origin
from backstay.restore.rank_state import StateReader
from backstay.restore.read_plan import Reading
from backstay.restore.result import Loaded, RestoreResult
from backstay.restore.snapshot import OpenedSnapshot, ReadTarget
from backstay.restore.stored_names import Naming
from backstay.trainer import local_tensors, optimizer_state, rng
from backstay.trainer.data.followed_loaders import FollowedLoader
from backstay.trainer.state import json_codec

_log = logging.getLogger("backstay")


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
    members: tuple[int, ...] = ()  # by rank what torch.distributed calls it; (): the same
    values: dict[str, Any] = field(default_factory=dict)  # plain values of the script
    missing_ok: frozenset[str] = frozenset()  # extras that the snapshot, or the script, may lack


@dataclass(frozen=True, slots=True, kw_only=True)
class _Private:
    """Decoded state of this rank alone. ``extras``: name → (method, arguments); ``origins``: name → where it is from."""

    extras: Mapping[str, tuple[str, tuple[Any, ...]]]
    values: Mapping[str, Any]
    cursors: Mapping[str, int]
    rng: tuple[Any, dict[str, torch.Tensor]]
    rng_origin: str
    origins: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A restore that is planned, checked, and whose bytes are on this node: :meth:`load` is all that is left."""

    target: Target
    opened: OpenedSnapshot
    reading: Reading
    holdings: local_tensors.Holdings
    optimizers: optimizers.OptimizerPlan | None
    private: _Private | None
    notes: tuple[str, ...]
    imported: ImportedPlan | None = None

    def load(self) -> Loaded:
        """Write everything in place.

        Raises:
            IntegrityError: a chunk differs from its digest; the model is half written then.
        """
        opened, target, private = self.opened, self.target, self.private
        opened.run_plan(self.reading)
        description = ""
        with torch.no_grad():
            if self.optimizers is not None:
                optimizer_state.attach(target.optimizers, self.holdings, self.optimizers.states, self.optimizers.values)
                description = self.optimizers.description
                for note in self.optimizers.notes:
                    _log.warning("backstay: %s", note)
            if self.imported is not None:
                description = imported_state.settle(self.imported, target.optimizers, self.holdings)
        if private is not None:
            for name, (method, arguments) in private.extras.items():
                getattr(target.extra[name], method)(*arguments)
            target.values.clear()
            target.values.update(private.values)
            rng.write(*private.rng)  # last: all of the above may draw
        result = RestoreResult(
            sources={rank: opened.source_of(rank) for rank in sorted(opened.used_ranks)},
            base_world_size=opened.world_size,
            is_resharded=opened.is_offered,
            rng=private.rng_origin if private else "untouched",
            extras=private.origins if private else dict.fromkeys(target.extra, "untouched"),
            message="; ".join(self.notes),
            needed_bytes=opened.needed_bytes if opened.is_offered else 0,
            fetched_bytes=opened.fetched_bytes if opened.is_offered else 0,
        )
        return Loaded(
            result=result,
            description=description,
            streams=(target.rank,) if private else (),
            cursors=private.cursors if private else {},
            generators=private.rng[1] if private else {},
        )


def prepare(target: Target, opened: OpenedSnapshot) -> Prepared:
    """Plan the restore of ``target`` from ``opened`` and have all bytes brought here; writes nothing.

    Raises:
        IntegrityError: naming what does not fit, is missing, cannot be mapped or is corrupt; nothing was loaded.
    """
    holdings = local_tensors.collect(target.model, target.optimizers, rank=target.rank, members=target.members)
    naming = Naming(opened, rank=target.rank, world_size=target.world_size)
    is_complete = not opened.is_offered or holds_whole_model(holdings, target.world_size)
    own_rank = target.rank % opened.world_size
    reader = StateReader(opened, naming, target.members)
    is_import = IMPORTED_KEY in opened.metadata(own_rank) and reader.find(own_rank) is None
    if is_import:
        naming.rename(imported_state.stored_names(holdings, opened))
    check_model(target, opened, naming, holdings, is_complete=is_complete)
    notes = _buffer_notes(naming, holdings, target.world_size != opened.world_size)
    if is_import:
        return _prepare_import(target, opened, naming, holdings)
    origin = Origin(
        opened=opened,
        naming=naming,
        reader=reader,
        holders=_holders(opened, naming, target, holdings),
        own_rank=own_rank,
        is_complete=is_complete,
    )
    private = _prepare_private(target, opened, reader, holdings)
    planned = optimizers.plan(target.optimizers, holdings, origin)
    wanted = local_tensors.collect(
        target.model, target.optimizers, rank=target.rank, members=target.members, states=planned.states
    )
    reading = opened.plan(_targets(opened, naming, wanted, wanted.tensors))
    opened.fetch(reading.chunks)
    return Prepared(
        target=target,
        opened=opened,
        reading=reading,
        holdings=holdings,
        optimizers=planned,
        private=private,
        notes=(*notes, *planned.notes),
    )


def _prepare_import(
    target: Target, opened: OpenedSnapshot, naming: Naming, holdings: local_tensors.Holdings
) -> Prepared:
    """Model and, where the snapshot has some, tensors of the optimizers; everything else stays the script's."""
    found = imported_state.plan(target.optimizers, holdings, opened, target.rank % opened.world_size)
    reading = opened.plan([*_targets(opened, naming, holdings, holdings.model_tensors), *found.targets])
    opened.fetch(reading.chunks)
    return Prepared(
        target=target, opened=opened, reading=reading, holdings=holdings, optimizers=None, private=None, notes=(found.note,),
        imported=found,
    )  # fmt: skip


def holds_whole_model(holdings: local_tensors.Holdings, world_size: int) -> bool:
    """Whether each parameter is spread over all ranks, so that each rank knows the whole model (no pipeline stages)."""
    parameters = [t for t in holdings.tensors if holdings.is_parameter(t)]
    return world_size == 1 or (bool(parameters) and all(_rank_count(t) == world_size for t in parameters))


def _rank_count(tensor: local_tensors.LocalTensor) -> int:
    living = tensor.living
    return int(living.device_mesh.mesh.numel()) if isinstance(living, DTensor) else len(tensor.replicas)


def check_model(
    target: Target, opened: OpenedSnapshot, naming: Naming, holdings: local_tensors.Holdings, *, is_complete: bool
) -> None:
    """Raise IntegrityError unless the snapshot has this very model: names, shapes, dtypes, what is tied to what."""
    missing: list[str] = []
    differing: list[str] = []
    unclear: list[str] = []
    for tensor in holdings.model_tensors:
        bare = local_tensors.split_name(tensor.name)[1]
        stored = naming.find(tensor.name, is_own=not holdings.is_parameter(tensor))
        if stored is None and not opened.is_whole and not tensor.local.numel():
            continue  # nothing of it lies here, so this rank's shard does not name it
        if stored is None:
            (unclear if naming.copies(tensor.name) else missing).append(bare)
            continue
        there, here = opened.tensor(stored), (tensor.global_shape, tensor.local.dtype)
        if (there.shape, there.dtype) != here:
            differing.append(f"{bare}: {there.shape} {there.dtype} in the snapshot, {here[0]} {here[1]} here")
    for alias, name in holdings.model_aliases.items():
        pair = naming.find(alias, is_own=False), naming.find(name, is_own=False)
        if pair[0] and pair[1] and naming.content(pair[0]) != naming.content(pair[1]):
            differing.append(f"{alias} and {name} are one tensor here, two in the snapshot")
    lost: set[str] = set()
    if is_complete and {m.model_signature for m in opened.manifests.values()} != {target.signature}:
        known = {local_tensors.split_name(t.name)[1] for t in holdings.tensors}
        known |= {local_tensors.split_name(alias)[1] for alias in holdings.aliases}
        lost = {name for name in naming.bare_names() if name.startswith("model.")} - known
    if missing or differing or lost:
        raise IntegrityError(
            f"{opened.label} was made by another model: missing here {sorted(lost)[:5]}, missing in the snapshot "
            f"{sorted(missing)[:5]}, differing {sorted(differing)[:5]}; nothing was loaded. A changed model needs a new run_id",
            reason="wrong_model",
        )
    if unclear:
        raise IntegrityError(
            f"{opened.label} does not say which tensor belongs here: {naming.why_not(unclear[0])} ({len(unclear)} tensors in "
            f"all); nothing was loaded. Parameters that are each rank's own come back with {opened.world_size} ranks, each in "
            "its place, or as DTensors, which say what they are parts of",
            reason="ranks_differ",
        )


def _targets(
    opened: OpenedSnapshot,
    naming: Naming,
    holdings: local_tensors.Holdings,
    tensors: Sequence[local_tensors.LocalTensor],
) -> list[ReadTarget]:
    targets, unclear = [], []
    own = {id(t.living) for t in holdings.model_tensors if not holdings.is_parameter(t)}
    for tensor in tensors:
        stored = naming.find(tensor.name, is_own=id(tensor.living) in own)
        if stored is not None:
            targets.append(ReadTarget(name=stored, tensor=tensor.local, offsets=tensor.offsets))
        elif tensor.local.numel():
            unclear.append(naming.why_not(tensor.name))
    if unclear:
        raise IntegrityError(
            f"the {opened.label} does not fit this model: {'; '.join(unclear[:5])} ({len(unclear)} tensors in all); nothing "
            "was loaded",
            reason="layout_mismatch",
        )
    return targets


def _holders(
    opened: OpenedSnapshot, naming: Naming, target: Target, holdings: local_tensors.Holdings
) -> dict[str, frozenset[int]]:
    """By name of an optimizer's parameter: the ranks of the snapshot that hold parts of what is read of it here."""
    trained = {id(p) for o in target.optimizers for group in o.param_groups for p in group["params"]}
    found: dict[str, frozenset[int]] = {}
    for tensor in holdings.tensors:
        if id(tensor.living) in trained:
            stored = naming.find(tensor.name, is_own=False)
            entries = opened.entries(stored) if stored is not None else ()
            found[holdings.names[id(tensor.living)]] = frozenset(rank for rank, _ in entries)
    return found


def _buffer_notes(naming: Naming, holdings: local_tensors.Holdings, is_other_size: bool) -> tuple[str, ...]:
    if not is_other_size:
        return ()
    buffers = [t for t in holdings.model_tensors if not holdings.is_parameter(t)]
    differing = [t.name for t in buffers if not naming.is_one(naming.copies(t.name))]
    if not differing:
        return ()
    stored = naming.find(differing[0], is_own=True) or ""
    return (
        f"{len(differing)} buffers differ from rank to rank in the snapshot; taken are those of one rank, such as {stored}",
    )


def _prepare_private(
    target: Target, opened: OpenedSnapshot, reader: StateReader, holdings: local_tensors.Holdings
) -> _Private:
    own_rank = target.rank % opened.world_size
    document = reader.document(own_rank)
    here, there = set(target.extra), set(document["extra"])
    if (here ^ there) - target.missing_ok:
        raise IntegrityError(
            f"the snapshot has extras {sorted(there)}, this Snapshotter {sorted(here)}; nothing was loaded. Give the same "
            f"names, or restore(missing_ok={sorted(here ^ there)}): those stay as the script made them",
            reason="wrong_extras",
        )
    extras: dict[str, tuple[str, tuple[Any, ...]]] = {}
    origins: dict[str, str] = dict.fromkeys(here - there, "not in the snapshot: as the script made it")
    origins |= dict.fromkeys(there - here, "left in the snapshot: this Snapshotter has none of that name")
    for name, stateful in target.extra.items():
        if name not in there:
            continue
        if target.world_size != opened.world_size and callable(getattr(stateful, "load_state_dicts", None)):
            states = [reader.decode(rank, reader.document(rank)["extra"][name]) for rank in range(opened.world_size)]
            extras[name] = ("load_state_dicts", (states, target.rank, target.world_size))
            origins[name] = f"its load_state_dicts() got the states of all {opened.world_size} ranks"
            continue
        encoded = document["extra"][name]
        is_cut_there = not json_codec.tensor_paths(encoded).isdisjoint(document["distributed"])
        templates = _templates(name, stateful, encoded, holdings, is_cut_there=is_cut_there)
        is_scaled = isinstance(stateful, FollowedLoader) and target.world_size != opened.world_size
        extras[name] = (
            "load_scaled" if is_scaled else "load_state_dict",
            (reader.decode(own_rank, encoded, templates),),
        )
        origins[name] = f"state of rank {own_rank} of {opened.world_size}" + (
            ", scaled to its length" if is_scaled else ""
        )
    streams, rng_origin = _prepare_rng(target, opened, reader)
    is_same_size = target.world_size == opened.world_size
    cursors = dict.fromkeys(extras, own_rank) if is_same_size else {}
    values = reader.decode(own_rank, document["values"])
    return _Private(extras=extras, values=values, cursors=cursors, rng=streams, rng_origin=rng_origin, origins=origins)


def _templates(
    name: str, stateful: Any, encoded: Any, holdings: local_tensors.Holdings, *, is_cut_there: bool
) -> dict[str, torch.Tensor]:
    """Tensors that the extra has now, by path: DTensors among them show how to cut. Empty where there can be none."""
    templates: dict[str, torch.Tensor] = {}
    is_cut_here = any(isinstance(t.living, DTensor) for t in holdings.tensors)
    if is_cut_there or (is_cut_here and json_codec.tensor_paths(encoded)):
        json_codec.encode(stateful.state_dict(), name, templates)
    return templates


def _prepare_rng(
    target: Target, opened: OpenedSnapshot, reader: StateReader
) -> tuple[tuple[Any, dict[str, torch.Tensor]], str]:
    """Generator states of this logical rank, each owned by one rank, and where they are from."""
    if target.rank < opened.world_size:
        generators = reader.generators(target.rank)
        plain = reader.decode(target.rank, reader.document(target.rank)["rng"])
        origin = f"stream of rank {target.rank} of {opened.world_size} goes on"
    else:
        has_cuda = "cuda" in reader.generators(0)
        plain, generators = rank_state.derived_streams(opened.snapshot_id, target.rank, has_cuda=has_cuda)
        origin = f"new stream, derived from the snapshot and rank {target.rank}: the snapshot has {opened.world_size} streams"
    if "numpy" in plain and importlib.util.find_spec("numpy") is None:
        raise IntegrityError(
            "the snapshot has the state of numpy's generator and this environment has no numpy; nothing was loaded: "
            "pip install numpy",
            reason="missing_package",
        )
    if "cuda" in generators and not torch.cuda.is_available():
        raise IntegrityError(
            "the snapshot has a CUDA generator, this process has no GPU; nothing was loaded", reason="missing_device"
        )
    return (plain, generators), origin
