"""What one rank holds after a restore, as statements to compare with those of other ranks: digests, never tensors.

Reads the living objects, not what was loaded. Cost: bytes that ranks declare to share are read once, at the speed of crc32c;
those of a GPU go through a window of host memory. Must not communicate.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from crc32c import crc32c
from torch.distributed.tensor import DTensor

from backstay.errors import IntegrityError
from backstay.protocol import messages
from backstay.restore.load import Target
from backstay.restore.result import Loaded
from backstay.trainer import distributed_tensors, local_tensors, raw_memory, rng
from backstay.trainer.local_tensors import Holdings, LocalTensor, bare_name, optimizer_prefix

WINDOW_BYTES: Final = 16 * 1024 * 1024
MAX_SCOPE_NAMED: Final = 8
MAX_DETAIL_NAMES: Final = 20_000
MAX_DETAIL_NAME: Final = 200

Scope = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """Something on which ``ranks`` (() means all of the world) must agree. ``lines``: tensor → value."""

    name: str
    ranks: Scope
    lines: Mapping[str, str] = field(default_factory=dict)

    def entry(self) -> messages.GateEntry:
        body = "\n".join(f"{name}\t{value}" for name, value in sorted(self.lines.items()))
        return messages.GateEntry(
            name=self.name, ranks=self.ranks, digest=hashlib.sha256(body.encode()).hexdigest()[:32]
        )

    def detail(self, limit: int) -> messages.GateDetail:
        """Value by tensor, the first ``limit`` in the order of their names: the same on all ranks that agree on names."""
        items = sorted(self.lines.items())[:limit]
        names = tuple(name[:MAX_DETAIL_NAME] for name, _ in items)
        return messages.GateDetail(entry=self.name, names=names, digests=tuple(value[:100] for _, value in items))


def make(target: Target, restored: messages.Restored, loaded: Loaded) -> list[Statement]:
    """All statements of this rank.

    Raises:
        IntegrityError: what this rank holds contradicts itself or the snapshot: optimizer state that is missing or does not
            fit, a generator that is not as it was restored. UsageError: a local part that its mesh does not allow.
    """
    holdings = local_tensors.collect(target.model, target.optimizers, rank=target.rank, members=target.members)
    if loaded.description:
        check_optimizers(target, holdings, loaded.description)
    check_generators(loaded)
    layout, counters = _structure(target, holdings)
    statements = [_identity(target, restored)]
    for kind, by_scope in (("layout", layout), ("steps", counters), ("replicas", _contents(holdings))):
        statements += [
            Statement(name=f"{kind}: {_scope_name(scope, target)}", ranks=_ranks(scope, target), lines=lines)
            for scope, lines in sorted(by_scope.items())
        ]
    own = (target.rank,)
    statements += [Statement(name=f"rng: stream {stream}", ranks=own) for stream in loaded.streams]
    statements += [
        Statement(name=f"cursor: position of {name} of rank {of}", ranks=own) for name, of in loaded.cursors.items()
    ]
    return statements


def check_optimizers(target: Target, holdings: Holdings, description: str) -> None:
    """Check that each optimizer has state for exactly the parameters that had some in the snapshot, key by key.

    Raises:
        IntegrityError: naming the parameter and what is missing, unexpected or of another shape.
    """
    problems: list[str] = []
    for index, (optimizer, stored) in enumerate(zip(target.optimizers, json.loads(description), strict=True)):
        prefix = optimizer_prefix(index, len(target.optimizers))
        expected = {fqn: stored["schemas"][schema] for fqn, schema in stored["of"].items()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                fqn = holdings.names[id(parameter)]
                name = f"{prefix}.state.{fqn}"
                problems += _state_problems(
                    name, parameter, optimizer.state.get(parameter) or {}, expected.pop(fqn, [])
                )
        problems += [f"{prefix} has no parameter {fqn}, whose state is in the snapshot" for fqn in expected]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise IntegrityError(
            f"rank {target.rank}: optimizer state is not what the snapshot has: {'; '.join(problems[:3])}{more}; do not train "
            "with what is loaded",
            reason="optimizer_state",
        )


def _state_problems(
    name: str, parameter: torch.Tensor, found: Mapping[Any, Any], expected: Sequence[Sequence[Any]]
) -> Iterator[str]:
    keys = {key[0]: key for key in expected}
    for key in keys.keys() - found.keys():
        yield f"{name}.{key} is missing"
    for key in found.keys() - keys.keys():
        yield f"{name}.{key} is not in the snapshot"
    for key in keys.keys() & found.keys():
        _, kind, dtype, _, shape, _ = keys[key]
        value = found[key]
        if (kind == "value") != (not isinstance(value, torch.Tensor)):
            yield f"{name}.{key} is a {type(value).__name__}, a {kind} in the snapshot"
        elif isinstance(value, torch.Tensor):
            whole = isinstance(value, DTensor) or not isinstance(parameter, DTensor)
            like = parameter.shape if whole else parameter._local_tensor.shape  # type: ignore[attr-defined]
            wanted = (f"torch.{dtype}", tuple(like) if shape is None else tuple(shape))
            if (str(value.dtype), tuple(value.shape)) != wanted:
                yield f"{name}.{key} is {tuple(value.shape)} {value.dtype}, expected {wanted[1]} {wanted[0]}"


def check_generators(loaded: Loaded) -> None:
    """Check that the generators are where they were set: a number drawn since then would make this another run.

    Raises:
        IntegrityError: naming the generator.
    """
    if not loaded.generators:
        return
    _, now = rng.read()
    moved = [name for name, state in loaded.generators.items() if name in now and not torch.equal(now[name], state)]
    if moved:
        raise IntegrityError(
            f"the random generator {moved[0]!r} is not where the snapshot had it: something drew from it during restore()",
            reason="generator_moved",
        )


def _identity(target: Target, restored: messages.Restored) -> Statement:
    return Statement(
        name="identity: what was restored",
        ranks=(),
        lines={
            "run": target.run,
            "attempt": str(restored.attempt),
            "snapshot": f"{restored.snapshot_id} step {restored.step} of attempt {restored.base_attempt}",
            "world": str(target.world_size),
        },
    )


def _structure(target: Target, holdings: Holdings) -> tuple[dict[Scope, dict[str, str]], dict[Scope, dict[str, str]]]:
    """By the ranks that share them: what each tensor is, and how far each parameter's counters are."""
    layout: dict[Scope, dict[str, str]] = defaultdict(dict)
    counters: dict[Scope, dict[str, str]] = defaultdict(dict)
    meshes: dict[int, str] = {}
    scopes: dict[int, Scope] = {}
    for tensor in holdings.tensors:
        scope = scopes[id(tensor.living)] = _scope_of(tensor, target)
        if len(scope) > 1:
            layout[scope][bare_name(tensor.name)] = _describe(tensor, meshes)
    counted: list[tuple[Scope, str, Any]] = []
    for index, optimizer in enumerate(target.optimizers):
        prefix = optimizer_prefix(index, len(target.optimizers))
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            scope = scopes.get(id(parameter), (target.rank,))
            state = optimizer.state.get(parameter)
            if len(scope) > 1 and isinstance(state, dict):
                name = f"{prefix}.state.{holdings.names[id(parameter)]}"
                layout[scope][name] = ", ".join(sorted(f"{key} {_kind(value)}" for key, value in state.items()))
                counted += [(scope, f"{name}.{key}", value) for key, value in state.items() if _is_counter(key, value)]
    for (scope, name, _), value in zip(counted, _read_scalars([v for _, _, v in counted]), strict=True):
        counters[scope][name] = value
    return layout, counters


def _scope_of(tensor: LocalTensor, target: Target) -> Scope:
    """The ranks that hold parts or copies of the same tensor."""
    if isinstance(tensor.living, DTensor):
        return distributed_tensors.mesh_ranks(tensor.living, target.members)
    return tensor.replicas


def _describe(tensor: LocalTensor, meshes: dict[int, str]) -> str:
    """Shape, dtype, mesh and placements. Where all agree, DTensor's arithmetic gives each element to one box."""
    kind = f"{tuple(tensor.global_shape)} {tensor.local.dtype}"
    if not isinstance(tensor.living, DTensor):
        return kind
    mesh = tensor.living.device_mesh
    if id(mesh) not in meshes:
        ranks = hashlib.sha256(repr(mesh.mesh.tolist()).encode()).hexdigest()[:8]
        meshes[id(mesh)] = f"mesh {tuple(mesh.mesh.shape)} {ranks}"
    return f"{kind} {meshes[id(mesh)]} {tensor.living.placements}"


def _kind(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else type(value).__name__


def _is_counter(key: Any, value: Any) -> bool:
    """Counts steps. Other numbers may be statistics of this rank's part alone, and differ by right."""
    if "step" not in str(key):
        return False
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not isinstance(value, DTensor)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _read_scalars(values: Sequence[Any]) -> list[str]:
    """Their values as text; those on one device are fetched at once, not one by one."""
    found = [repr(float(value)) if not isinstance(value, torch.Tensor) else "" for value in values]
    by_device: dict[torch.device, list[int]] = defaultdict(list)
    for index, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            by_device[value.device].append(index)
    for indexes in by_device.values():
        gathered = torch.stack([values[index].detach().reshape(()).to(torch.float64) for index in indexes]).tolist()
        for index, number in zip(indexes, gathered, strict=True):
            found[index] = repr(number)
    return found


def _contents(holdings: Holdings) -> dict[Scope, dict[str, str]]:
    """crc32c of what several ranks declare to hold bit for bit, by those ranks."""
    shared = [tensor for tensor in holdings.tensors if len(tensor.replicas) > 1 and tensor.local.numel()]
    contents: dict[Scope, dict[str, str]] = defaultdict(dict)
    thread_count = max(1, min(2, len(os.sched_getaffinity(0)), len(shared)))
    with ThreadPoolExecutor(max_workers=thread_count) as pool:
        for tensor, crc in zip(shared, pool.map(lambda tensor: crc_of(tensor.local), shared), strict=True):
            contents[tensor.replicas][bare_name(tensor.name)] = f"{crc:08x}"
    return contents


def crc_of(tensor: torch.Tensor) -> int:
    """crc32c of the elements in row-major order, whatever device and strides they have."""
    crc = 0
    for piece in _pieces(tensor.detach()):
        host = piece if raw_memory.is_plain_memory(piece) else piece.resolve_conj().resolve_neg().contiguous().cpu()
        with raw_memory.lent(host) as view:
            crc = crc32c(view, crc)
    return crc


def _pieces(tensor: torch.Tensor) -> Iterable[torch.Tensor]:
    """``tensor`` in parts along its first dimension, each within the window if one row is: a bound on what is copied."""
    if raw_memory.is_plain_memory(tensor) or raw_memory.byte_count(tensor) <= WINDOW_BYTES or tensor.ndim == 0:
        return (tensor,)
    if tensor.is_contiguous():
        return tensor.view(-1).split(WINDOW_BYTES // tensor.element_size())
    rows = max(1, WINDOW_BYTES // max(1, raw_memory.byte_count(tensor) // tensor.shape[0]))
    return tensor.split(rows)


def _ranks(scope: Scope, target: Target) -> Scope:
    return () if len(scope) == target.world_size else scope


def _scope_name(scope: Scope, target: Target) -> str:
    if len(scope) == target.world_size:
        return "all ranks"
    if len(scope) <= MAX_SCOPE_NAMED:
        return f"ranks {', '.join(map(str, scope))}"
    short = hashlib.sha256(repr(scope).encode()).hexdigest()[:8]
    return f"{len(scope)} ranks from {scope[0]} to {scope[-1]} ({short})"
