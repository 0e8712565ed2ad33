"""Which tensors of a model and its optimizers this process holds, under which names, and who else holds the same bytes.

Reads ``_parameters``, ``_buffers`` and ``optimizer.state`` as they lie: never calls a model's ``state_dict()`` (FSDP2 would
reshard) nor an optimizer's (DCP's getter would step it).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from backstay.errors import UsageError
from backstay.trainer import nested_optimizers
from backstay.trainer.distributed_tensors import Place, place_distributed, refuse_unsupported, sharded_places
from backstay.trainer.process_group import within

_IN_SUBCLASSES = (
    "which (torchao) keeps its state in tensor subclasses without memory of their own; unsupported: use one of torch.optim, or "
    "bitsandbytes' 8-bit optimizers, whose state is plain tensors"
)
_UNSUPPORTED_OPTIMIZERS = {  # by class, of a package where others have a class of that name
    "ZeroRedundancyOptimizer": (
        "which keeps its state in an optimizer of its own, another part on each rank; unsupported: use FSDP2, or a plain "
        "optimizer"
    ),
    "PostLocalSGDOptimizer": (
        "with which DDP's replicas differ until they are averaged, so that none stands for the others; it is not supported: "
        "use FSDP2, or a plain optimizer"
    ),
    **{f"torchao.{name}{bits}": _IN_SUBCLASSES for name in ("Adam", "AdamW") for bits in ("8bit", "4bit", "Fp8")},
    "torchao.CPUOffloadOptimizer": (
        "which keeps its state in optimizers of its own, copied behind the step; it is not supported: use one of torch.optim"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTensor:
    """One tensor as this rank holds it.

    ``local`` is the detached local part, a box of shape ``local.shape`` at ``offsets`` of the whole tensor of ``global_shape``.
    ``replicas`` are the ranks that declare to hold the same bytes, in order, this rank among them. ``is_eager``: may change
    before the next fence; ``is_frozen``: nothing trains it (no gradient, in no group of an optimizer). ``owner[key]`` is where
    the living object (``living``) was found.
    """

    name: str
    living: torch.Tensor
    local: torch.Tensor
    offsets: tuple[int, ...]
    global_shape: tuple[int, ...]
    replicas: tuple[int, ...]
    is_eager: bool
    owner: dict[Any, Any]
    key: Any
    is_frozen: bool = False

    def is_current(self) -> bool:
        """Whether the object in its place still is this memory, and frozen if it was."""
        found = self.owner.get(self.key)
        if found is not self.living or (self.is_frozen and (found.requires_grad or found.grad is not None)):
            return False
        local = found._local_tensor if isinstance(found, DTensor) else found
        return (
            local.data_ptr() == self.local.data_ptr()
            and local.shape == self.local.shape
            and local.stride() == self.local.stride()
            and local.dtype == self.local.dtype
        )


@dataclass(slots=True)
class _Containers:
    """The containers that tensors were found in, by identity.

    ``sizes``: (container, length): another length means that something was added or removed. ``links``: (dictionary, key,
    object or None), ``lists``: (list, its items) and ``attributes``: (object, name, value): another object means that
    something was replaced or came to be. ``values``: (dictionary, key) of optimizer state that is no tensor: some begin as a
    number and become one.
    """

    sizes: list[tuple[Any, int]] = field(default_factory=list)
    links: list[tuple[dict[Any, Any], Any, object]] = field(default_factory=list)
    lists: list[tuple[list[Any], tuple[Any, ...]]] = field(default_factory=list)
    attributes: list[tuple[Any, str, object]] = field(default_factory=list)
    values: list[tuple[dict[Any, Any], Any]] = field(default_factory=list)

    def is_same(self) -> bool:
        return (
            all(len(owner) == size for owner, size in self.sizes)
            and all(owner.get(key) is found for owner, key, found in self.links)
            and all(getattr(owner, name) is found for owner, name, found in self.attributes)
            and all(len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True)) for a, b in self.lists)
            and all(key in owner and not isinstance(owner[key], torch.Tensor) for owner, key in self.values)
        )


@dataclass(slots=True)
class Holdings:
    """Everything that was found, in an order that is the same on all replicas; not changed afterwards.

    ``aliases``: name → name of the tensor that is the same object. ``names``: id of a parameter → its name without prefix.
    ``living_names``: id of any of the tensors → its name without home rank. ``idle``: parameters that no optimizer has and that
    were not frozen, but may be later. ``members``: as of :class:`backstay.trainer.process_group.World`.
    """

    members: tuple[int, ...] = ()
    tensors: list[LocalTensor] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    living_names: dict[int, str] = field(default_factory=dict)
    idle: list[torch.nn.Parameter] = field(default_factory=list)
    containers: _Containers = field(default_factory=_Containers)

    def has_frozen_more(self) -> bool:
        """Whether a parameter is frozen now that was not when this was made; :meth:`is_current` stays true."""
        return any(map(_needs_no_gradient, self.idle))

    def is_current(self) -> bool:
        """Cheap check that no tensor appeared, vanished, moved or changed shape: microseconds per tensor."""
        return self.containers.is_same() and all(t.is_current() for t in self.tensors)

    @property
    def model_tensors(self) -> tuple[LocalTensor, ...]:
        """Parameters and buffers of the model, without the optimizers' state."""
        return tuple(t for t in self.tensors if _is_of_model(t.name))

    @property
    def model_aliases(self) -> dict[str, str]:
        """``aliases`` without state that an optimizer shares between parameters."""
        return {alias: name for alias, name in self.aliases.items() if _is_of_model(alias)}

    def is_parameter(self, tensor: LocalTensor) -> bool:
        """Whether it is one of the model's or the optimizers' parameters, neither buffer nor state."""
        return id(tensor.living) in self.names

    @property
    def needs(self) -> tuple[int, ...]:
        """Ranks whose shards hold parts of what this rank holds."""
        return tuple(sorted({rank for tensor in self.tensors for rank in tensor.replicas}))


States = Mapping[torch.Tensor, dict[Any, Any]]


def collect(
    model: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    rank: int,
    members: tuple[int, ...] = (),
    states: Sequence[States] | None = None,
) -> Holdings:
    """Walk ``model`` and ``optimizers``; ``states`` stand in for the optimizers' own (a restore that is not yet applied).

    ``rank`` and ``members``: as of :class:`backstay.trainer.process_group.World`.

    Raises:
        UsageError: for FSDP1, lazy or sparse tensors, partial DTensors, naming the tensor.
    """
    trained = frozenset(id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    found = Holdings(members)
    collector = _Collector(found, rank=rank, trained=trained, sharded=sharded_places(model))
    with torch.no_grad():
        for clean, module, replicas, ignored in _walk(model, "", (rank,), frozenset(), members):
            collector.add_module(clean, module, replicas, ignored)
        for index, optimizer in enumerate(optimizers):
            state = optimizer.state if states is None else states[index]
            collector.add_optimizer(optimizer_prefix(index, len(optimizers)), optimizer, state)
    _refuse_several_gpus(found.tensors)
    return found


class _Collector:
    """Walks a model and its optimizers, and adds what it finds to ``found``."""

    def __init__(self, found: Holdings, *, rank: int, trained: frozenset[int], sharded: Mapping[int, Place]) -> None:
        """``trained``: ids of the parameters that optimizers have. ``sharded``: where those lie that FSDP2 shows unsharded."""
        self.found = found
        self._own, self._trained, self._sharded = (rank,), trained, sharded
        self._replicas: dict[int, tuple[int, ...]] = {}  # by id of a parameter
        self._stored: dict[int, str] = {}  # name by id of a tensor
        self._used: set[str] = set()

    def add_module(
        self, clean: str, module: torch.nn.Module, replicas: tuple[int, ...], ignored: frozenset[str]
    ) -> None:
        found, containers = self.found, self.found.containers
        for owner in (module._parameters, module._buffers, module._modules):
            containers.sizes.append((owner, len(owner)))
        for empty in (module._parameters, module._buffers):
            containers.links += [(empty, name, None) for name, value in empty.items() if value is None]
        containers.links += [(module._modules, name, child) for name, child in module._modules.items()]
        for name, shown in module._parameters.items():
            if shown is not None:
                group = self._own if name in ignored else replicas
                place, key = self._sharded.get(id(shown), (module._parameters, name))
                self._add(f"model.{clean}{name}", place, key, group)
                found.names.setdefault(id(place[key]), f"{clean}{name}")
                self._replicas.setdefault(id(place[key]), group)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                self._add(f"model.{clean}{name}", module._buffers, name, self._own, is_eager=True)

    def add_optimizer(self, prefix: str, optimizer: torch.optim.Optimizer, states: States) -> None:
        _refuse_optimizer(prefix, optimizer)
        containers = self.found.containers
        containers.attributes += [(optimizer, name, getattr(optimizer, name)) for name in ("state", "param_groups")]
        containers.sizes.append((states, len(states)))
        containers.lists.append((optimizer.param_groups, tuple(optimizer.param_groups)))
        for group_index, group in enumerate(optimizer.param_groups):
            containers.links.append((group, "params", group["params"]))
            containers.lists.append((group["params"], tuple(group["params"])))
            for index, parameter in enumerate(group["params"]):
                if id(parameter) not in self.found.names:  # the model lacks it
                    name = self.found.names[id(parameter)] = f"{prefix}.parameter.{group_index}.{index}"
                    self._add(name, {"parameter": parameter}, "parameter", self._own)
                    self._replicas[id(parameter)] = self._own
                state = states.get(parameter)
                if isinstance(state, dict):
                    containers.links.append((states, parameter, state))  # type: ignore[arg-type]
                    self._add_state(prefix, parameter, state)

    def _add_state(self, prefix: str, parameter: torch.Tensor, state: dict[Any, Any]) -> None:
        name, replicas = self.found.names[id(parameter)], self._replicas[id(parameter)]
        self.found.containers.sizes.append((state, len(state)))
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                is_counter = value.ndim == 0 and value.device.type == "cpu" and not isinstance(value, DTensor)
                self._add(f"{prefix}.state.{name}.{key}", state, key, replicas, is_eager=is_counter)
            else:
                self.found.containers.values.append((state, key))

    def _add(
        self, name: str, owner: dict[Any, Any], key: Any, replicas: tuple[int, ...], *, is_eager: bool = False
    ) -> None:
        found, living = self.found, owner[key]
        if name in self._used:
            raise UsageError(
                f"two tensors would both be stored as {name!r}; rename one of the modules", reason="duplicate_tensor"
            )
        self._used.add(name)
        if id(living) in self._stored:
            target = self._stored[id(living)]
            found.aliases[target.removesuffix(bare_name(target)) + name] = target
            return
        is_idle = isinstance(living, torch.nn.Parameter) and id(living) not in self._trained
        is_frozen = is_idle and _needs_no_gradient(living)
        if is_idle and not is_frozen:
            found.idle.append(living)
        if isinstance(living, DTensor):
            local, offsets, whole, replicas, home = place_distributed(name, living, found.members)
        else:
            refuse_unsupported(name, living)
            local, home = living.detach(), min(replicas)
            offsets, whole = (0,) * local.ndim, tuple(local.shape)
        tensor = LocalTensor(
            name=private_name(name, home), living=living, local=local, offsets=offsets, global_shape=whole,
            replicas=replicas, is_eager=is_eager, owner=owner, key=key, is_frozen=is_frozen,
        )  # fmt: skip
        self._stored[id(living)] = tensor.name
        found.living_names[id(living)] = name
        found.tensors.append(tensor)


def _needs_no_gradient(parameter: torch.Tensor) -> bool:
    return not parameter.requires_grad and parameter.grad is None


def optimizer_prefix(index: int, count: int) -> str:
    """``optimizer`` for the only one, ``optimizer.<i>`` among several."""
    return "optimizer" if count == 1 else f"optimizer.{index}"


def model_signature(holdings: Holdings) -> str:
    """SHA-256 over names, global shapes and dtypes of parameters and buffers; 64 hex digits, the same on all replicas."""
    lines = [f"{bare_name(t.name)} {t.global_shape} {t.local.dtype}" for t in holdings.model_tensors]
    lines += [f"{bare_name(alias)} = {bare_name(name)}" for alias, name in holdings.model_aliases.items()]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def layout_signature(holdings: Holdings) -> str:
    """SHA-256 over which boxes of which parameters and buffers this rank holds, and who else does; 64 hex digits.

    Ranks with the same signature as the writer of a shard can take that shard as it is. Optimizer state is not in it: a fresh
    optimizer has none.
    """
    lines = [
        f"{t.name} {t.global_shape} {t.local.dtype} {t.offsets} {tuple(t.local.shape)} {t.replicas}"
        for t in holdings.model_tensors
    ]
    lines += [f"{alias} = {name}" for alias, name in holdings.model_aliases.items()]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _is_of_model(name: str) -> bool:
    return bare_name(name).startswith("model.")


def bare_name(name: str) -> str:
    """``name`` without the rank that it is private to."""
    return split_name(name)[1]


def split_name(name: str) -> tuple[int, str]:
    """Home rank and bare name of what :func:`private_name` made."""
    if name.startswith("rank-") and name[5:10].isdigit() and name[10:11] == ".":
        return int(name[5:10]), name[11:]
    return 0, name


def private_name(name: str, home: int) -> str:
    """The name of a thing whose copies live on several ranks with different bytes: those of rank 0 keep the bare name."""
    return name if home == 0 else f"rank-{home:05d}.{name}"


def _walk(
    module: torch.nn.Module,
    clean: str,
    replicas: tuple[int, ...],
    ignored: frozenset[str],
    members: tuple[int, ...],
) -> Iterator[tuple[str, torch.nn.Module, tuple[int, ...], frozenset[str]]]:
    """Modules in order with their name free of wrappers, and the ranks over which DDP replicates their parameters."""
    wrapped, replicas, ignored = _unwrap(module, clean, replicas, ignored, members)
    if wrapped is not None:
        yield from _walk(wrapped, clean, replicas, ignored, members)
        return
    yield clean, module, replicas, ignored
    for name, child in module._modules.items():
        if child is not None:
            inner = frozenset(rest.removeprefix(f"{name}.") for rest in ignored if rest.startswith(f"{name}."))
            yield from _walk(child, f"{clean}{name}.", replicas, inner, members)


def _unwrap(
    module: torch.nn.Module,
    clean: str,
    replicas: tuple[int, ...],
    ignored: frozenset[str],
    members: tuple[int, ...],
) -> tuple[torch.nn.Module | None, tuple[int, ...], frozenset[str]]:
    kind = type(module).__name__
    if isinstance(module, torch.nn.parallel.DistributedDataParallel):
        shared = torch.distributed.get_process_group_ranks(module.process_group)
        ranks = tuple(sorted(within(members, shared, what=f"module {clean.rstrip('.') or '(root)'} under DDP")))
        return module.module, ranks, frozenset(getattr(module, "parameters_to_ignore", ()))
    if isinstance(module, torch.nn.DataParallel):
        return module.module, replicas, ignored
    if kind == "FullyShardedDataParallel":
        raise UsageError(
            f"module {clean.rstrip('.') or '(root)'} is wrapped by FSDP1 (FullyShardedDataParallel), which backstay does not "
            "support; use torch.distributed.fsdp.fully_shard (FSDP2)",
            reason="unsupported_module",
        )
    for attribute in ("_orig_mod", "_checkpoint_wrapped_module"):
        if set(module._modules) == {attribute}:
            inner = frozenset(name.removeprefix(f"{attribute}.") for name in ignored)
            return module._modules[attribute], replicas, inner
    return None, replicas, ignored


def _refuse_optimizer(prefix: str, optimizer: torch.optim.Optimizer) -> None:
    for base in type(optimizer).__mro__:
        package = base.__module__.partition(".")[0]
        why = _UNSUPPORTED_OPTIMIZERS.get(base.__name__) or _UNSUPPORTED_OPTIMIZERS.get(f"{package}.{base.__name__}")
        if why:
            raise UsageError(f"{prefix} is a {type(optimizer).__name__}, {why}", reason="unsupported_optimizer")
    nested_optimizers.refuse_unsteady(prefix, optimizer)


def _refuse_several_gpus(tensors: Sequence[LocalTensor]) -> None:
    """A capture waits for the streams of one GPU: the bytes of another would arrive after they were hashed."""
    first: dict[torch.device, str] = {}
    for tensor in tensors:
        if tensor.local.device.type == "cuda":
            first.setdefault(tensor.local.device, tensor.name)
    if len(first) > 1:
        places = ", ".join(f"{name} on {device}" for device, name in first.items())
        raise UsageError(
            f"the model is spread over {len(first)} GPUs of one process ({places}), which backstay does not support; use one "
            "process per GPU",
            reason="unsupported_module",
        )
