"""The optimizers' state as the snapshot has it, made to fit this rank's parameters: united over the ranks that hold them.

A state tensor of its parameter's whole shape is cut like the parameter here, whatever it was cut like there. Must not
guess: what cannot be mapped is refused by name. Attaches nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from backstay.errors import IntegrityError
from backstay.restore.rank_state import StateReader
from backstay.restore.snapshot import OpenedSnapshot
from backstay.restore.stored_names import Naming
from backstay.trainer import nested_optimizers, optimizer_state
from backstay.trainer.local_tensors import Holdings, States, bare_name, optimizer_prefix
from backstay.trainer.optimizer_state import METADATA_KEY, KeySchema, Values
from backstay.trainer.restore_in_place import is_like
from backstay.trainer.state import json_codec

MAX_CONSULTED: Final = (
    16  # ranks whose hyper-parameters are compared; beyond, as many as hold all of this rank's parameters
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerPlan:
    """What the optimizers get: ``states`` are to be filled, "value" keys hold None until attached. ``description``: of them.
    ``notes``: what the user should know."""

    states: Sequence[States]
    values: Sequence[Values]
    description: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Described:
    """One optimizer as one rank of the snapshot described it. ``places``: parameter → (group, position in it)."""

    rank: int
    groups: list[list[str]]
    schemas: list[list[KeySchema]]
    of: dict[str, int]
    distributed: frozenset[str]
    places: dict[str, tuple[int, int]]
    strides: Mapping[tuple[str, Any], tuple[int, ...]]
    encoded: Mapping[str, Any]

    def schema(self, fqn: str) -> list[KeySchema] | None:
        return self.schemas[self.of[fqn]] if fqn in self.of else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where the state of this rank's parameters is read from.

    ``holders``: by parameter name, the ranks of the snapshot that hold parts of it. ``own_rank``: the rank of the snapshot
    that this rank continues. ``is_complete``: this rank holds all that those ranks held, so nothing of theirs may be
    missing here.
    """

    opened: OpenedSnapshot
    naming: Naming
    reader: StateReader
    holders: Mapping[str, frozenset[int]]
    own_rank: int
    is_complete: bool

    @property
    def ranks(self) -> list[int]:
        """Ranks whose descriptions and hyper-parameters are read: all holders if they are few, else as many as it takes."""
        if not self.opened.is_offered or not self.holders:
            return [self.own_rank]
        every = frozenset().union(*self.holders.values())
        if len(every) <= MAX_CONSULTED:
            return sorted(every)
        return _cover(list(self.holders.values()))


def plan(optimizers: Sequence[torch.optim.Optimizer], holdings: Holdings, origin: Origin) -> OptimizerPlan:
    """State dictionaries as the snapshot has them: tensors of the optimizers where they fit, new ones elsewhere.

    Raises:
        IntegrityError: if optimizers, groups or parameters are not those of the snapshot, or state cannot be mapped.
    """
    described: list[list[_Described]] = [[] for _ in optimizers]
    for rank in origin.ranks:
        bodies = json.loads(origin.opened.metadata(rank).get(METADATA_KEY, "[]"))
        if len(bodies) != len(optimizers):
            raise IntegrityError(
                f"the snapshot has {len(bodies)} optimizers, this Snapshotter has {len(optimizers)}; nothing was loaded. "
                "Give those that made it, in the same order, or take a new run_id",
                reason="wrong_optimizers",
            )
        encoded = origin.reader.document(rank)["optimizers"]
        for index, body in enumerate(bodies):
            _check_class(index, optimizers[index], body)
            described[index].append(_read_description(rank, body, encoded[index]))
    ones = [
        _One(origin, described[index], holdings, index=index, count=len(optimizers)) for index in range(len(optimizers))
    ]
    matched = [one.match_groups(optimizer) for one, optimizer in zip(ones, optimizers, strict=True)]
    states = [one.states(optimizer) for one, optimizer in zip(ones, optimizers, strict=True)]
    named = _share(holdings, states, origin.opened.aliases())
    values, notes = [], []
    for index, (one, optimizer) in enumerate(zip(ones, optimizers, strict=True)):
        values.append(one.values(optimizer, matched[index], named))
        nested_optimizers.check_beyond(index, optimizer, values[-1].beyond)
        notes += one.frozen_notes(optimizer)
    description = optimizer_state.describe(optimizers, holdings, states)
    return OptimizerPlan(states=states, values=values, description=description, notes=tuple(notes))


def _check_class(index: int, optimizer: torch.optim.Optimizer, body: Mapping[str, Any]) -> None:
    """Refuse another class: it would silently keep state that it does not read, and start without what it reads."""
    there, here = body["class"], type(optimizer).__name__
    if there != here:
        raise IntegrityError(
            f"optimizer {index} is a {here}, the snapshot's is a {there}, whose state means nothing to it; nothing was loaded. "
            f"Build a {there}, in the order of before if there are several, or take a new run_id",
            reason="wrong_optimizers",
        )


def _cover(sets: Sequence[frozenset[int]]) -> list[int]:
    """Few ranks of which each set has one: always the one that most of the sets left have."""
    left, chosen = [s for s in sets if s], []
    while left:
        counts: dict[int, int] = {}
        for rank in (rank for found in left for rank in found):
            counts[rank] = counts.get(rank, 0) + 1
        best = min(counts, key=lambda rank: (-counts[rank], rank))
        chosen.append(best)
        left = [found for found in left if best not in found]
    return sorted(chosen)


def _read_description(rank: int, body: Mapping[str, Any], encoded: Mapping[str, Any]) -> _Described:
    return _Described(
        rank=rank,
        groups=body["groups"],
        schemas=body["schemas"],
        of=body["of"],
        distributed=frozenset(body.get("distributed", ())),
        places={name: (g, at) for g, names in enumerate(body["groups"]) for at, name in enumerate(names)},
        strides={(name, key): tuple(strides) for name, key, strides in body.get("strides", ())},
        encoded=encoded,
    )


class _One:
    """One optimizer of this rank, and its descriptions by the consulted ranks."""

    def __init__(
        self, origin: Origin, described: Sequence[_Described], holdings: Holdings, *, index: int, count: int
    ) -> None:
        self._origin, self._described, self._holdings = origin, described, holdings
        self._index, self._prefix = index, optimizer_prefix(index, count)

    # ---- groups

    def _groups(self, optimizer: torch.optim.Optimizer) -> list[list[str]]:
        return [[self._holdings.names[id(p)] for p in group["params"]] for group in optimizer.param_groups]

    def match_groups(self, optimizer: torch.optim.Optimizer) -> list[dict[int, int]]:
        """For each group here: rank → index of the group there that its parameters are in."""
        groups = self._groups(optimizer)
        matched: list[dict[int, int]] = []
        known = {name for d in self._described for name in d.places}
        unknown = [name for group in groups for name in group if name not in known]
        lost: set[str] = set()
        if self._origin.is_complete:
            lost = known - {name for group in groups for name in group}
        if unknown or lost:
            raise self._other_parameters(groups, f"missing here {sorted(lost)[:5]}, unexpected {sorted(unknown)[:5]}")
        for number, group in enumerate(groups):
            found: dict[int, int] = {}
            for d in self._described:
                places = [d.places[name] for name in group if name in d.places]
                if len({g for g, _ in places}) > 1 or places != sorted(places):
                    raise self._other_parameters(groups, f"group {number} here is cut or ordered otherwise there")
                if places:
                    found[d.rank] = places[0][0]
                elif not group and number < len(d.groups) and not d.groups[number]:
                    found[d.rank] = number
            matched.append(found)
        for d in self._described:
            taken = [found[d.rank] for found in matched if d.rank in found]
            if len(set(taken)) != len(taken):
                raise self._other_parameters(groups, "parameters of one group there are in several here")
        return matched

    def _other_parameters(self, groups: Sequence[Sequence[str]], what: str) -> IntegrityError:
        there = self._described[0].groups
        return IntegrityError(
            f"optimizer {self._index} has other parameters than in the snapshot: {len(groups)} groups of "
            f"{[len(g) for g in groups][:5]}, in the snapshot {len(there)} of {[len(g) for g in there][:5]} (rank "
            f"{self._described[0].rank}); {what}; nothing was loaded. Build the optimizer as it was, or take a new run_id",
            reason="wrong_parameters",
        )

    # ---- values

    def values(
        self,
        optimizer: torch.optim.Optimizer,
        matched: Sequence[Mapping[int, int]],
        named: Mapping[str, torch.Tensor],
    ) -> Values:
        """Hyper-parameters, scalars and state of no parameter, on which all ranks that hold the parameters agree."""
        decode = self._origin.reader.decode
        decoded = {
            d.rank: {
                key: decode(d.rank, d.encoded.get(key, {}), named=named)
                for key in ("groups", "values", "other", "beyond")
            }
            for d in self._described
        }
        hyper = []
        for number, found in enumerate(matched):
            sources = {rank: decoded[rank]["groups"][at] for rank, at in found.items()}
            hyper.append(self._agreed(sources, f"group {number}") if sources else {})
        scalars: dict[str, Any] = {}
        for name in (name for group in self._groups(optimizer) for name in group):
            sources = {d.rank: decoded[d.rank]["values"].get(name, {}) for d in self._sources(name)}
            agreed = self._agreed(sources, f"state of {name}")
            schema = self._sources(name)[0].schema(name) or []
            unclear = {key[0] for key in schema if key[1] == "value"} ^ agreed.keys()
            if unclear:
                raise self._cannot(name, f"is described otherwise than it is: {sorted(map(str, unclear))[:3]}")
            if agreed:
                scalars[name] = agreed
        other = self._agreed({rank: body["other"] for rank, body in decoded.items()}, "state of no parameter")
        beyond = self._agreed({rank: body["beyond"] for rank, body in decoded.items()}, "its own state_dict()")
        return Values(scalars=scalars, other=other, groups=hyper, beyond=beyond)

    def frozen_notes(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """What the snapshot trained and this program does not, and the other way round: torch's optimizers pass it over."""
        there = {name for d in self._described for name in d.encoded["frozen"]}
        here = {
            self._holdings.names[id(p)]: not p.requires_grad
            for group in optimizer.param_groups
            for p in group["params"]
        }
        stopped = [name for name, is_frozen in here.items() if is_frozen and name not in there]
        begun = [name for name, is_frozen in here.items() if not is_frozen and name in there]
        return [
            f"optimizer {self._index}: {len(names)} parameters {what}: {', '.join(names[:3])}{', ...' if names[3:] else ''}"
            for names, what in (
                (stopped, "were trained when the snapshot was taken and are frozen here (requires_grad=False)"),
                (begun, "were frozen when the snapshot was taken and are trained here (requires_grad=True)"),
            )
            if names
        ]

    def _agreed(self, values: Mapping[int, Any], what: str) -> Any:
        """The value that all ranks have; raises IntegrityError naming the key that differs."""
        (first, value), *others = values.items()
        for rank, found in others:
            if json_codec.is_same(value, found):
                continue
            keys = [key for key in (*value, *found) if not json_codec.is_same(value.get(key), found.get(key))]
            key = keys[0] if keys else "the order of keys"
            raise IntegrityError(
                f"optimizer {self._index}, {what}: {key} is {_shown(value.get(key))} on rank {first} of the snapshot, "
                f"{_shown(found.get(key))} on rank {rank}, and this rank holds parameters of both; nothing was loaded",
                reason="ranks_disagree",
            )
        return value

    # ---- tensors

    def states(self, optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, dict[Any, Any]]:
        """State of each parameter that has some, still to be filled."""
        made: dict[torch.Tensor, dict[Any, Any]] = {}
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            name = self._holdings.names[id(parameter)]
            schemas = {d.rank: d.schema(name) for d in self._sources(name)}
            (first, schema), *others = schemas.items()
            differing = [rank for rank, found in others if found != schema]
            if differing:
                raise self._cannot(name, f"has other keys on rank {first} of the snapshot than on rank {differing[0]}")
            if schema is None:
                continue
            existing = optimizer.state.get(parameter) or {}
            was_distributed = any(name in d.distributed for d in self._sources(name))
            made[parameter] = {
                key[0]: self._make(name, key, parameter, existing.get(key[0]), was_distributed) for key in schema
            }
        return made

    def _sources(self, name: str) -> list[_Described]:
        """The descriptions by ranks that hold the parameter; there is one, as groups were matched."""
        knowing = [d for d in self._described if name in d.places]
        holders = self._origin.holders.get(name, frozenset())
        return [d for d in knowing if d.rank in holders] or knowing

    def _make(self, name: str, schema: KeySchema, parameter: torch.Tensor, existing: Any, was_distributed: bool) -> Any:
        _, kind, dtype_name, device_type, _, placements = schema
        if kind == "value":
            return None
        shape = self._whole_shape(name, schema, parameter)
        local = parameter._local_tensor if isinstance(parameter, DTensor) else parameter
        device = torch.device("cpu") if kind == "plain" and device_type == "cpu" else local.device
        dtype = getattr(torch, dtype_name)
        is_plain = not isinstance(parameter, DTensor) or (
            kind == "plain" and (not shape or was_distributed or not self._origin.opened.is_offered)
        )
        if isinstance(parameter, DTensor) and not is_plain:
            is_same_cut = not self._origin.opened.is_offered
            made: torch.Tensor = make_distributed(parameter, dtype, shape, placements, is_same_cut=is_same_cut)
        elif shape == tuple(local.shape):
            made = torch.empty_like(local.detach(), dtype=dtype, device=device, requires_grad=False)
        else:
            made = torch.empty(shape, dtype=dtype, device=device)
        made = self._laid_out(made, name, schema[0])
        return existing if is_like(existing, made) else made

    def _laid_out(self, made: torch.Tensor, name: str, key: Any) -> torch.Tensor:
        """``made`` with the strides it had on the ranks it is of: kernels round by them."""
        known = (d.strides.get((name, key)) for d in self._sources(name))
        found = {strides for strides in known if strides is not None}
        is_whole = not isinstance(made, DTensor) or not self._origin.opened.is_offered
        local = made._local_tensor if isinstance(made, DTensor) else made
        if len(found) != 1 or not is_whole or len(strides := found.pop()) != local.ndim:
            return made
        laid = torch.empty_strided(local.shape, strides, dtype=local.dtype, device=local.device)
        if not isinstance(made, DTensor):
            return laid
        return DTensor.from_local(
            laid, made.device_mesh, made.placements, run_check=False, shape=made.shape, stride=made.stride()
        )

    def _whole_shape(self, name: str, schema: KeySchema, parameter: torch.Tensor) -> tuple[int, ...]:
        key, kind, _, _, shape, _ = schema
        if kind == "distributed":
            return tuple(parameter.shape if shape is None else shape)
        stored = f"{self._prefix}.state.{name}.{key}"
        copies = self._origin.naming.copies(stored)
        shapes = {self._origin.opened.tensor(copy).shape for copy in copies.values()}
        if not self._origin.opened.is_offered:
            own = [copies[home] for home in (self._origin.own_rank, 0) if home in copies]
            shapes = {self._origin.opened.tensor(own[0]).shape} if own else shapes
        if len(shapes) != 1:
            raise self._cannot(
                name, f"has a {key!r} of shapes {sorted(shapes)[:3]} in the snapshot: each rank made its own"
            )
        return shapes.pop()

    def _cannot(self, name: str, what: str) -> IntegrityError:
        return IntegrityError(
            f"optimizer {self._index}: the state of {name} {what}; it cannot be resharded and nothing was loaded. Restore it "
            "with the ranks and the parallelism that it was written with",
            reason="state_not_mappable",
        )


def _share(holdings: Holdings, states: Sequence[States], aliases: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Have what is one tensor in the snapshot be one in ``states``, and what is two be two; all tensors by name."""
    own = [t for t in holdings.tensors if holdings.is_parameter(t)]
    named = {bare_name(t.name): t.living for t in (*holdings.model_tensors, *own)}
    twins = {bare_name(alias): bare_name(name) for alias, name in aliases.items()}
    seen: set[int] = set()
    for index, made in enumerate(states):
        prefix = optimizer_prefix(index, len(states))
        for parameter, keys in made.items():
            for key, value in keys.items():
                if value is None:
                    continue
                name = f"{prefix}.state.{holdings.names[id(parameter)]}.{key}"
                twin = named.get(twins.get(name, ""))
                if twin is not None and (twin.shape, twin.dtype) == (value.shape, value.dtype):
                    keys[key] = twin
                elif id(value) in seen:
                    keys[key] = torch.empty_like(value)
                named[name] = keys[key]
                seen.add(id(keys[key]))
    return named


def make_distributed(
    parameter: DTensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    placements: Sequence[int] | None,
    *,
    is_same_cut: bool,
) -> DTensor:
    """State of the whole ``shape`` on the parameter's mesh, cut like the parameter in the dimensions it has in common.

    Args:
        placements: As described: by dimension of the mesh it was on, -1 (replicated) or the dimension that was sharded.
        is_same_cut: The mesh is the same, and so are the placements.
    """
    mesh = parameter.device_mesh
    if shape == tuple(parameter.shape):
        local = torch.empty_like(parameter._local_tensor.detach(), dtype=dtype)
        return DTensor.from_local(
            local, mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    described = list(placements or ())
    whole = torch.Size(shape)
    chosen: list[Placement] = [Replicate() if dim < 0 else Shard(dim) for dim in described]
    if not is_same_cut:
        chosen = [
            p if type(p) is Shard and p.dim in described and shape[p.dim] == parameter.shape[p.dim] else Replicate()
            for p in parameter.placements
        ]
    local_shape, _ = compute_local_shape_and_global_offset(whole, mesh, chosen)
    local = torch.empty(local_shape, dtype=dtype, device=parameter._local_tensor.device)
    stride = torch.empty(whole, device="meta").stride()
    return DTensor.from_local(local, mesh, chosen, run_check=False, shape=whole, stride=stride)


def _shown(value: Any) -> str:
    return f"{value!r:.40}"
