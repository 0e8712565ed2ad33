"""Which tensors of a model and its optimizers this process holds, under which names, and who else holds the same bytes.

Reads ``_parameters``, ``_buffers`` and ``optimizer.state`` as they lie: never calls a model's ``state_dict()`` (FSDP2 would
reshard) nor an optimizer's (DCP's getter would step it).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from backstay.errors import UsageError
from backstay.trainer import distributed_tensors, nested_optimizers
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """Everything that was found, in an order that is the same on all replicas.

    ``aliases``: name → name of the tensor that is the same object. ``names``: id of a parameter → its name without prefix.
    ``sizes``: (container, length): another length means that something was added or removed. ``links``: (dictionary, key,
    object or None) and ``lists``: (list, its items): another object means that something was replaced or came to be.
    ``living_names``: id of any of the tensors → its name without home rank. ``attributes``: (object, name, value), by identity.
    ``values``: (dictionary, key) of optimizer state that is no tensor: some begin as a number and become one.
    ``idle``: parameters that no optimizer has and that were not frozen, but may be later.
    """

    tensors: tuple[LocalTensor, ...]
    aliases: dict[str, str]
    names: dict[int, str]
    parameters: dict[str, torch.Tensor]
    sizes: tuple[tuple[Any, int], ...]
    links: tuple[tuple[dict[Any, Any], Any, object], ...]
    lists: tuple[tuple[list[Any], tuple[Any, ...]], ...]
    values: tuple[tuple[dict[Any, Any], Any], ...] = ()
    attributes: tuple[tuple[Any, str, object], ...] = ()
    living_names: dict[int, str] = field(default_factory=dict)
    idle: tuple[torch.nn.Parameter, ...] = ()
    members: tuple[int, ...] = ()  # of the world, by rank (:class:`world.World`)

    def has_frozen_more(self) -> bool:
        """Whether a parameter is frozen now that was not when this was made; :meth:`is_current` stays true."""
        return any(map(_needs_no_gradient, self.idle))

    def is_current(self) -> bool:
        """Cheap check that no tensor appeared, vanished, moved or changed shape: microseconds per tensor."""
        return (
            all(len(owner) == size for owner, size in self.sizes)
            and all(owner.get(key) is found for owner, key, found in self.links)
            and all(getattr(owner, name) is found for owner, name, found in self.attributes)
            and all(len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True)) for a, b in self.lists)
            and all(key in owner and not isinstance(owner[key], torch.Tensor) for owner, key in self.values)
            and all(t.is_current() for t in self.tensors)
        )

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


@dataclass(slots=True)
class _Collector:
    rank: int
    members: tuple[int, ...]  # by rank what torch.distributed calls it; (): the same
    trained: frozenset[int] = frozenset()  # ids of the parameters that optimizers have
    sharded: dict[int, distributed_tensors.Place] = field(default_factory=dict)
    tensors: list[LocalTensor] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    replicas: dict[int, tuple[int, ...]] = field(default_factory=dict)
    stored: dict[int, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    sizes: list[tuple[Any, int]] = field(default_factory=list)
    links: list[tuple[dict[Any, Any], Any, object]] = field(default_factory=list)
    lists: list[tuple[list[Any], tuple[Any, ...]]] = field(default_factory=list)
    values: list[tuple[dict[Any, Any], Any]] = field(default_factory=list)
    attributes: list[tuple[Any, str, object]] = field(default_factory=list)
    idle: list[torch.nn.Parameter] = field(default_factory=list)

    def add(
        self, name: str, owner: dict[Any, Any], key: Any, *, replicas: tuple[int, ...], is_eager: bool = False
    ) -> LocalTensor | None:
        living = owner[key]
        if name in self.used:
            raise UsageError(
                f"two tensors would both be stored as {name!r}; rename one of the modules", reason="duplicate_tensor"
            )
        self.used.add(name)
        if id(living) in self.stored:
            target = self.stored[id(living)]
            self.aliases[target.removesuffix(bare_name(target)) + name] = target
            return None
        tensor = _place(name, living, owner, key, replicas=replicas, is_eager=is_eager, members=self.members)
        if isinstance(living, torch.nn.Parameter) and id(living) not in self.trained:
            is_frozen = _needs_no_gradient(living)
            tensor = dataclasses.replace(tensor, is_frozen=is_frozen)
            self.idle += [] if is_frozen else [living]
        self.stored[id(living)] = tensor.name
        self.tensors.append(tensor)
        return tensor


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

    ``rank`` is that of this process in its world, ``members`` are the world's in torch.distributed (:class:`world.World`).

    Raises:
        UsageError: for FSDP1, lazy or sparse tensors, partial DTensors, naming the tensor.
    """
    trained = frozenset(id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    collector = _Collector(rank, members, trained, distributed_tensors.sharded_places(model))
    with torch.no_grad():
        for clean, module, replicas, ignored in _walk(model, "", (rank,), frozenset(), members):
            _add_module(collector, clean, module, replicas=replicas, ignored=ignored)
        for index, optimizer in enumerate(optimizers):
            collector.attributes += [(optimizer, name, getattr(optimizer, name)) for name in ("state", "param_groups")]
            state = optimizer.state if states is None else states[index]
            _add_optimizer(collector, optimizer_prefix(index, len(optimizers)), optimizer, state)
    _refuse_several_gpus(collector.tensors)
    return Holdings(
        tensors=tuple(collector.tensors),
        aliases=collector.aliases,
        names=collector.names,
        parameters=collector.parameters,
        sizes=tuple(collector.sizes),
        links=tuple(collector.links),
        lists=tuple(collector.lists),
        values=tuple(collector.values),
        attributes=tuple(collector.attributes),
        living_names={id(tensor.living): bare_name(tensor.name) for tensor in collector.tensors},
        idle=tuple(collector.idle),
        members=members,
    )


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


def _add_module(
    collector: _Collector, clean: str, module: torch.nn.Module, *, replicas: tuple[int, ...], ignored: frozenset[str]
) -> None:
    own = (collector.rank,)
    collector.sizes += [(module._parameters, len(module._parameters)), (module._buffers, len(module._buffers))]
    collector.sizes.append((module._modules, len(module._modules)))
    for empty in (module._parameters, module._buffers):
        collector.links += [(empty, name, None) for name, found in empty.items() if found is None]
    collector.links += [(module._modules, name, child) for name, child in module._modules.items()]
    for name, shown in module._parameters.items():
        if shown is not None:
            group = own if name in ignored else replicas
            owner, key = collector.sharded.get(id(shown), (module._parameters, name))
            parameter = owner[key]
            collector.add(f"model.{clean}{name}", owner, key, replicas=group)
            collector.names.setdefault(id(parameter), f"{clean}{name}")
            collector.parameters.setdefault(f"{clean}{name}", parameter)
            collector.replicas.setdefault(id(parameter), group)
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            collector.add(f"model.{clean}{name}", module._buffers, name, replicas=own, is_eager=True)


def _add_optimizer(collector: _Collector, prefix: str, optimizer: torch.optim.Optimizer, states: States) -> None:
    for base in type(optimizer).__mro__:
        package = base.__module__.partition(".")[0]
        why = _UNSUPPORTED_OPTIMIZERS.get(base.__name__) or _UNSUPPORTED_OPTIMIZERS.get(f"{package}.{base.__name__}")
        if why:
            raise UsageError(f"{prefix} is a {type(optimizer).__name__}, {why}", reason="unsupported_optimizer")
    nested_optimizers.refuse_unsteady(prefix, optimizer)
    collector.sizes.append((states, len(states)))
    collector.lists.append((optimizer.param_groups, tuple(optimizer.param_groups)))
    for group_index, group in enumerate(optimizer.param_groups):
        collector.links.append((group, "params", group["params"]))
        collector.lists.append((group["params"], tuple(group["params"])))
        for index, parameter in enumerate(group["params"]):
            if id(parameter) not in collector.names:
                _add_unnamed(collector, f"{prefix}.parameter.{group_index}.{index}", parameter)
            state = states.get(parameter)
            if isinstance(state, dict):
                collector.links.append((states, parameter, state))  # type: ignore[arg-type]
                _add_parameter_state(collector, prefix, parameter, state)


def _add_parameter_state(collector: _Collector, prefix: str, parameter: torch.Tensor, state: dict[Any, Any]) -> None:
    fqn, replicas = collector.names[id(parameter)], collector.replicas[id(parameter)]
    collector.sizes.append((state, len(state)))
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            is_counter = value.ndim == 0 and value.device.type == "cpu" and not isinstance(value, DTensor)
            collector.add(f"{prefix}.state.{fqn}.{key}", state, key, replicas=replicas, is_eager=is_counter)
        else:
            collector.values.append((state, key))


def _add_unnamed(collector: _Collector, name: str, parameter: torch.Tensor) -> None:
    """A parameter the optimizer has and the model lacks."""
    place: dict[str, torch.Tensor] = {"parameter": parameter}
    collector.add(name, place, "parameter", replicas=(collector.rank,))
    collector.names[id(parameter)] = name
    collector.parameters[name] = parameter
    collector.replicas[id(parameter)] = (collector.rank,)


def _place(
    name: str,
    living: torch.Tensor,
    owner: dict[Any, Any],
    key: Any,
    *,
    replicas: tuple[int, ...],
    is_eager: bool,
    members: tuple[int, ...],
) -> LocalTensor:
    home = min(replicas)
    if isinstance(living, DTensor):
        local, offsets, global_shape, replicas, home = distributed_tensors.place_distributed(name, living, members)
    else:
        distributed_tensors.refuse_unsupported(name, living)
        local = living.detach()
        offsets, global_shape = (0,) * local.ndim, tuple(local.shape)
    return LocalTensor(
        name=private_name(name, home),
        living=living,
        local=local,
        offsets=offsets,
        global_shape=global_shape,
        replicas=replicas,
        is_eager=is_eager,
        owner=owner,
        key=key,
    )


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
