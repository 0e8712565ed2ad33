"""Staging a state for async_save: into the slot itself where it is known from the save before what this rank will write.

What the writer gets back is recognised by its address: bytes that lie in the slot are not copied again. Must not
know how DCP names or plans things.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from backstay.errors import BackstayError, UnavailableError, UsageError
from backstay.format import shard
from backstay.session.session import Slot
from backstay.stores.dcp_items import Found
from backstay.stores.fill_bytes import put
from backstay.stores.store_session import StoreSession
from backstay.trainer import raw_memory

_log = logging.getLogger("backstay")

Path = tuple[Any, ...]
Signature = tuple[tuple[Path, str], ...]
_NONE: Final = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What the save before came to: for a state of this ``signature``, which leaf is which tensor of the shard."""

    signature: Signature
    layout: shard.Layout
    specs: Mapping[str, shard.TensorSpec]
    owned: Mapping[Path, str]


@dataclass(slots=True, kw_only=True)
class Staged:
    """A staged state: in ``slot`` by ``layout``, or (both None) in private memory. ``problem``: it must not be written."""

    step: int
    signature: Signature = ()
    slot: Slot | None = None
    layout: shard.Layout | None = None
    known: _Known | None = None
    problem: Exception | None = None
    paths: dict[int, Path] = field(default_factory=dict)  # address of a private copy -> leaf

    def check(self, found: Found) -> None:
        """Raise UnavailableError unless exactly what lies in the slot is what was planned now."""
        assert self.slot is not None
        assert self.layout is not None
        assert self.known is not None
        base = self.slot.mapping.address
        is_same = found.specs == self.known.specs and all(
            found.sources[entry.name].data_ptr() == base + entry.begin
            for entry in self.layout.entries
            if entry.end > entry.begin and entry.name not in found.payloads
        )
        if not is_same:
            raise UnavailableError(
                "what this rank writes changed since the save before, after its state was staged; the next save is whole "
                "again",
                reason="plan_changed",
            )


class Save:
    """The saves of one process, one after the other, and what the last one taught.

    Invariant: at most one state is staged and not yet written.
    """

    def __init__(self) -> None:
        self.byte_capacities: dict[str, int] = {}
        self._known: _Known | None = None
        self._staged: Staged | None = None
        self._step = _NONE
        self._writing = _NONE
        self._dropped = _NONE

    def aim(self, step: int, session: StoreSession) -> None:
        """The next save is of ``step``; one that was staged and never written is given up."""
        if self._writing != _NONE:
            raise UsageError(f"step {self._writing} is still being written: wait for its future before step {step}")
        staged = self.drop()
        if staged is not None:
            session.abandon(staged.step, "a later save began before this one was written", slot=staged.slot)
        self._step = step

    def drop(self) -> Staged | None:
        """Take back what was staged and not written."""
        staged, self._staged = self._staged, None
        if staged is not None:
            self._dropped = staged.step
        return staged

    def stage(self, state: Any, session: StoreSession, *, wait_s: float) -> Any:
        """A copy of ``state`` that later changes do not reach.

        Raises:
            UsageError: no writer was made for it, or it holds what cannot be staged.
        """
        if self._step == _NONE or self._staged is not None:
            raise UsageError("make a writer for each save: storage_writer=store.writer(step)", reason="no_writer")
        signature: list[tuple[Path, str]] = []
        _walk(state, (), lambda path, leaf: signature.append((path, _describe(path, leaf))))
        staged = Staged(step=self._step, signature=tuple(signature))
        known = self._known if self._known is not None and self._known.signature == staged.signature else None
        if known is not None:
            try:
                staged.slot = session.grant(staged.step, known.layout.size_bytes, wait_s=wait_s)
            except (BackstayError, OSError) as error:
                staged.problem = error
                self._staged = staged
                return state  # nothing of it will be written
            staged.known, staged.layout = known, known.layout
        self._staged = staged
        with torch.no_grad():
            return _walk(state, (), lambda path, leaf: _copy(path, leaf, staged))

    def take(self, step: int) -> Staged | None:
        """What was staged for ``step``; None if it is saved from where it lies."""
        self._writing = step
        staged, self._staged = self._staged, None
        if staged is None and step == self._dropped:
            problem = UnavailableError("a later save began before this one was written", reason="overtaken")
            return Staged(step=step, problem=problem)
        return staged

    def end(self) -> None:
        self._writing, self._step = _NONE, _NONE

    def remember(self, found: Found, layout: shard.Layout, staged: Staged | None) -> None:
        """Learn from a save what the next one will look like."""
        self.byte_capacities = {name: raw_memory.byte_count(packed) for name, packed in found.payloads.items()}
        if staged is None or staged.slot is not None:
            return
        owned = {}
        for entry in layout.entries:
            if entry.end == entry.begin or entry.name in found.payloads:
                continue
            path = staged.paths.get(found.sources[entry.name].data_ptr())
            if path is None:
                self._known = None  # the planner writes something else than what it was given
                return
            owned[path] = entry.name
        self._known = _Known(signature=staged.signature, layout=layout, specs=dict(found.specs), owned=owned)

    def forget(self) -> None:
        """The next save is staged whole."""
        self._known = None


def _walk(value: Any, path: Path, visit: Callable[[Path, Any], Any]) -> Any:
    """The same nesting of dicts, lists and tuples with every leaf replaced."""
    if isinstance(value, Mapping):
        return {key: _walk(item, (*path, key), visit) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_walk(item, (*path, index), visit) for index, item in enumerate(value))
    return visit(path, value)


def _describe(path: Path, leaf: Any) -> str:
    if isinstance(leaf, ShardedTensor):
        raise UsageError(f"{'.'.join(map(str, path))} is a ShardedTensor, which is not staged; use DTensors (FSDP2)")
    if not isinstance(leaf, torch.Tensor):
        return type(leaf).__name__
    local = leaf._local_tensor if isinstance(leaf, DTensor) else leaf
    place = f" {leaf.placements} of {tuple(leaf.shape)}" if isinstance(leaf, DTensor) else ""
    return f"{local.dtype} {tuple(local.shape)}{place}"


def _copy(path: Path, leaf: Any, staged: Staged) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return copy.deepcopy(leaf)
    local = (leaf._local_tensor if isinstance(leaf, DTensor) else leaf).detach()
    if staged.slot is not None and staged.layout is not None and staged.known is not None:
        name = staged.known.owned.get(path)
        if name is None and local.numel():
            return leaf.detach()  # another rank writes it: only its shape is needed
        copied = put(staged.slot.mapping, staged.layout, name, local) if name is not None else local
    else:
        copied = torch.empty(local.shape, dtype=local.dtype, device="cpu").copy_(local)
        if copied.numel():
            staged.paths[copied.data_ptr()] = path
    # Not from_local: it would move the copy to the mesh's device.
    return DTensor(copied, leaf._spec, requires_grad=False) if isinstance(leaf, DTensor) else copied
