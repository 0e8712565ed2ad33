"""The position of a data loader that has no state of its own, and bringing a new loader to it.

A loader is followed: the generators at the start of its pass and the batches taken since are recorded; resuming starts the
pass again from the same generators and skips the batches that were used. Must not draw a random number of its own, nor
change what a loader yields.
"""

from __future__ import annotations

import collections
import functools
import struct
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from backstay.errors import IntegrityError
from backstay.trainer import raw_memory, rng

_PLACE: Final = "_backstay_place"
_FOLLOWS: Final = "_backstay_follows"  # in a class: the class that it replaces
_MAP_STYLE: Final = 0
_START: Final = ("generators", "sources", "primed", "workers", "made")  # of a pass
_SAMPLERS: Final = ("sampler", "batch_sampler")
_COUNTERS: Final = ("epoch", "initial_seed")
_FINISHED: Final = (
    "_iterator_finished"  # of torchdata's StatefulDataLoader; without it a loader that was left early would continue
)


class Position:
    """The positions of all loaders of one training.

    Args:
        order: Gives the places of the training's loaders, in an order that is the same after a restart.
    """

    def __init__(self, order: Callable[[], Sequence[Place]]) -> None:
        self._order = order
        self._waiting: dict[int, dict[str, Any]] = {}
        self._generators: Any = None

    def state(self, ahead: Callable[[Place], int] = lambda place: 0) -> list[dict[str, Any]]:
        """The current positions; ``ahead``: batches that were fetched and not yet used."""
        return [place.state(ahead(place)) for place in self._order()]

    def load(self, states: Sequence[dict[str, Any]]) -> None:
        """Have each loader continue, at its next pass, from its state in ``states``."""
        self._waiting = dict(enumerate(states))

    def arm(self) -> None:
        """Set all generators to what they are now right before the first new batch is fetched."""
        self._generators = read_generators()

    def settle(self, place: Place) -> None:
        """Set the generators of :meth:`arm`, once, when a loader of the training asks (not one of a validation)."""
        if self._generators is not None and any(own is place for own in self._order()):
            generators, self._generators = self._generators, None
            write_generators(generators)

    def claim(self, place: Place) -> dict[str, Any] | None:
        """What was loaded for ``place``, once."""
        index = self._index_of(place) if self._waiting else None
        return None if index is None else self._waiting.pop(index, None)

    def waiting(self, place: Place) -> dict[str, Any] | None:
        """What was loaded for ``place`` and not claimed yet: still its position."""
        index = self._index_of(place) if self._waiting else None
        return None if index is None else self._waiting.get(index)

    def _index_of(self, place: Place) -> int | None:
        return next((i for i, own in enumerate(self._order()) if own is place), None)


class Place:
    """The position of one loader. ``before_fetch`` is called before a pass begins and before each batch is fetched.

    ``source``: what has ``state_dict()`` for the loader, if anything has. ``depth``: how many batches may be fetched ahead.
    """

    def __init__(self, loader: Any, position: Position, depth: int) -> None:
        self.before_fetch: Callable[[Place], None] | None = None
        # It has this place: workers must end with it, not at a garbage collection.
        self.loader: Any = weakref.proxy(loader)
        self.source: Any = self.loader if _keeps_own_state(loader) else None
        self.keeps_states = False
        self.fetched = 0
        self.prepared: Any = None  # what a framework made of it
        self._position = position
        self._start: dict[str, Any] = {}
        self._before: collections.deque[dict[str, Any]] = collections.deque(maxlen=max(1, depth))
        self._iterator: weakref.ref[_Counted] | None = None
        self._had_workers = False  # before the restart, from an earlier pass

    def begin(self, make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """A pass: a new one, or the rest of the one that was loaded."""
        self._iterator = None
        self._notify()
        counted = _Counted(self, make)
        counted.saved = self._position.claim(self)  # followed up at the first batch: who is asked later draws after us
        if counted.saved is None:
            self._begin_new(counted)
        self._iterator = weakref.ref(counted)
        return counted

    def _notify(self) -> None:
        if self.before_fetch is not None:
            self.before_fetch(self)

    def state(self, ahead: int) -> dict[str, Any]:
        """See :meth:`Position.state`."""
        waiting = self._position.waiting(self)
        if waiting is not None:
            return waiting
        counted = self._iterator() if self._iterator is not None else None
        if counted is not None and counted.saved is not None:
            return counted.saved
        if counted is None or counted.is_exhausted:
            return {
                "open": counted is not None,
                "done": True,
                "sources": _read_sources(self.loader),
                "primed": _is_primed(self.loader),
                "workers": self._keeps_workers(),
                "loader": None if self._is_untouched() else self._read_source(0),
                "untouched": self._is_untouched(),
            }
        recent = list(self._before)[len(self._before) - ahead :] if ahead else []
        return {
            "open": True,
            "done": False,
            **self._start,
            "skip": self.fetched - ahead,
            "ahead": [before["generators"] for before in recent],
            "loader": self._read_source(ahead),
        }

    def load_between_passes(self, saved: dict[str, Any]) -> None:
        """Take over the state of a loader without an open pass: at once, for the script may set an epoch before the next."""
        self._iterator = None
        self._load_source(saved)

    def fetch(self, counted: _Counted) -> Any:
        if counted.saved is None:  # loaded after this iterator was made
            counted.saved = self._position.claim(self)
        if counted.saved is not None:
            self._iterator = weakref.ref(counted)
            self._replay(counted)
        self._notify()
        if counted.is_exhausted:
            self._position.settle(self)
            raise StopIteration
        now = read_generators() if counted.ahead else None
        if counted.ahead:
            write_generators(counted.ahead.pop(0))
        else:
            self._position.settle(self)
        before = {"generators": read_generators()}
        if self.fetched == 0:
            self._start["made"] = before["generators"]  # a sampler in this process draws its order now
        if self.keeps_states and self.source is not None:
            before["loader"] = self.source.state_dict()
        try:
            batch = next(counted.inner)
        except StopIteration:
            counted.is_exhausted = True
            raise
        if now is not None:
            # This batch was drawn before: what comes next draws as if it had not been drawn again.
            write_generators(now)
        self._before.append(before)
        self.fetched += 1
        return batch

    def _begin_new(self, counted: _Counted) -> None:
        self._position.settle(self)
        self._start_workers(counted.make)
        self.fetched = 0
        start = {
            "generators": read_generators(),
            "sources": _read_sources(self.loader),
            "primed": _is_primed(self.loader),
            "workers": self._keeps_workers(),
        }
        counted.inner = counted.make()
        self._start = {**start, "made": read_generators()}

    def _replay(self, counted: _Counted) -> None:
        """Go where the pass was. The generators are as they were found, but for a pass that is new."""
        saved, counted.saved = counted.saved, None
        assert saved is not None
        now = read_generators()
        self._load_source(saved)
        counted.is_exhausted = saved["open"] and saved["done"]
        if not saved["done"]:
            self._start = {name: saved[name] for name in _START}
            self.fetched = saved["skip"]
            write_generators(saved["generators"])
            self._start_workers(counted.make)
            counted.inner = counted.make()
            write_generators(saved["made"])
            if self.source is None:
                _pass_over(counted.inner, saved["skip"])
            counted.ahead = list(saved["ahead"])
        write_generators(now)
        if not saved["open"]:
            self._begin_new(counted)

    def _start_workers(self, make: Callable[[], Any]) -> None:
        """Have workers where the pass, before the restart, found those of an earlier one: to make them draws, to reuse them
        does not."""
        if not self._had_workers or self.source is not None or getattr(self.loader, "_iterator", None) is not None:
            return
        generators, sources = read_generators(), _read_sources(self.loader)
        make()
        _set_sources(self.loader, sources)
        write_generators(generators)

    def _keeps_workers(self) -> bool:
        """Whether the next pass is given to the workers of the one before."""
        is_kept = getattr(self.loader, "persistent_workers", False)
        return is_kept and (self._had_workers or getattr(self.loader, "_iterator", None) is not None)

    def _is_untouched(self) -> bool:
        """Whether asking the loader for its state would make an iterator, which draws: it has no state to give yet."""
        return self.prepared is None and getattr(self.loader, "_iterator", self) is None

    def _read_source(self, ahead: int) -> Any:
        if self.source is None:
            return None
        if ahead and self.keeps_states:
            return self._before[-ahead]["loader"]
        return self.source.state_dict()

    def _load_source(self, saved: dict[str, Any]) -> None:
        self._had_workers = saved["workers"]
        if self._keeps_workers() and not self._had_workers:
            self.loader._iterator = None  # restored in a process that has gone on: the pass is begun with new workers
        _set_sources(self.loader, saved["sources"])
        if _is_primed(self.loader) and not saved["primed"]:
            self.loader._iterator, self.loader._initial_iter_for_state_dict = None, False
        state = saved["loader"]
        if saved.get("untouched"):
            return
        if (state is None) != (self.source is None):
            raise IntegrityError(
                f"the data loader {'has' if self.source is not None else 'lacks'} a state_dict() that the one in the snapshot "
                f"{'lacked' if state is None else 'had'}; build the same loader as before the restart",
                reason="wrong_loader",
            )
        if state is not None and (saved["open"] or state.get(_FINISHED, True)):
            self.source.load_state_dict(state)
            if saved["done"]:
                self.loader.state_dict()  # so that the next pass is begun as after a pass, by one draw and not by two


class _Counted:
    """An iterator that has its place fetch every batch."""

    def __init__(self, place: Place, make: Callable[[], Iterator[Any]]) -> None:
        self.place, self.make = place, make
        self.inner: Any = None
        self.saved: dict[str, Any] | None = None
        self.ahead: list[Any] = []
        self.is_exhausted = False

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> Any:
        return self.place.fetch(self)

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Followed:
    """An iterable that is no DataLoader, with a place."""

    def __init__(self, iterable: Any) -> None:
        self._iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        place: Place = self.__dict__[_PLACE]
        return place.begin(lambda: iter(self._iterable))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_iterable"], name)


class FollowedSized(Followed):
    """One with a length."""

    def __len__(self) -> int:
        return len(self._iterable)


def follow(loader: Any, position: Position, *, depth: int = 1) -> Any:
    """The loader to use in place of ``loader``: itself if it is a DataLoader; its place is :func:`place_of`.

    A DataLoader gets a subclass of its class, so that it stays what it is to everybody who looks.
    """
    if place_of(loader) is not None:
        return loader
    if isinstance(loader, DataLoader) and "__class__" not in type(loader).__dict__:
        kind: Any = type(loader)
        if not hasattr(kind, _FOLLOWS):
            loader.__class__ = _followed_class(kind)
    else:
        loader = FollowedSized(loader) if hasattr(loader, "__len__") else Followed(loader)
    loader.__dict__[_PLACE] = Place(loader, position, depth)
    return loader


def release(loader: Any) -> None:
    """Stop following ``loader``; a pass that is under way continues."""
    getattr(loader, "__dict__", {}).pop(_PLACE, None)


def place_of(loader: Any) -> Place | None:
    """The place of a loader that is followed."""
    found = getattr(loader, "__dict__", {}).get(_PLACE)
    return found if isinstance(found, Place) else None


def read_generators() -> dict[str, Any]:
    """All generators of this process, without tensors: a snapshot's layout is the same whether there are any to keep."""
    plain, tensors = rng.read()
    version, numbers, gauss = plain["python"]
    return {
        **plain,
        "python": [version, struct.pack(f"{len(numbers)}I", *numbers), gauss],
        "tensors": {kind: _to_bytes(tensor) for kind, tensor in tensors.items()},
    }


def write_generators(generators: dict[str, Any]) -> None:
    """Inverse of :func:`read_generators`."""
    version, packed, gauss = generators["python"]
    plain = {"python": (version, struct.unpack(f"{len(packed) // 4}I", packed), gauss)}
    if "numpy" in generators:
        plain["numpy"] = generators["numpy"]
    rng.write(plain, {kind: _from_bytes(data) for kind, data in generators["tensors"].items()})


def _to_bytes(state: torch.Tensor) -> bytes:
    return raw_memory.read_bytes(state)


def _from_bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@functools.cache
def _followed_class(kind: Any) -> type[Any]:
    def begin(self: Any) -> Iterator[Any]:
        place = self.__dict__.get(_PLACE)
        make = functools.partial(kind.__iter__, self)
        return make() if place is None else place.begin(make)

    body = {"__iter__": begin, _FOLLOWS: kind, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), body)


def _is_stateful(thing: Any) -> bool:
    return callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None))


def _keeps_own_state(loader: Any) -> bool:
    """Whether the state of ``loader`` holds more than a count: one over a plain data set would draw another order."""
    if not _is_stateful(loader):
        return False
    if not isinstance(loader, DataLoader) or loader._dataset_kind != _MAP_STYLE or _is_stateful(loader.dataset):
        return True
    return any(_is_stateful(sampler) for sampler in _samplers(loader)[1:])


def _is_primed(loader: Any) -> bool:
    """Whether a StatefulDataLoader made the iterator of its next pass in advance, because it was asked for its state."""
    return bool(getattr(loader, "_initial_iter_for_state_dict", False))


def _samplers(loader: Any) -> list[Any]:
    """The loader and its samplers, however they wrap each other."""
    found: list[Any] = []
    todo = [loader]
    while todo and len(found) < 16:
        thing = todo.pop(0)
        if thing is None or any(thing is other for other in found):
            continue
        found.append(thing)
        todo += [getattr(thing, name, None) for name in _SAMPLERS]
    return found


def _read_sources(loader: Any) -> list[dict[str, Any]]:
    sources = []
    for sampler in _samplers(loader):
        generator = getattr(sampler, "generator", None)
        counters = {name: value for name in _COUNTERS if type(value := getattr(sampler, name, None)) is int}
        state = _to_bytes(generator.get_state()) if isinstance(generator, torch.Generator) else None
        sources.append({"generator": state, **counters})
    return sources


def _set_sources(loader: Any, sources: Sequence[dict[str, Any]]) -> None:
    samplers = _samplers(loader)
    if len(samplers) != len(sources):
        raise IntegrityError(
            f"the data loader has {len(samplers) - 1} samplers, that of the snapshot had {len(sources) - 1}; build the same "
            "loader as before the restart",
            reason="wrong_loader",
        )
    for sampler, source in zip(samplers, sources, strict=True):
        generator = getattr(sampler, "generator", None)
        if isinstance(generator, torch.Generator) and source["generator"] is not None:
            generator.set_state(_from_bytes(source["generator"]))
        for name in _COUNTERS:
            if name in source and getattr(sampler, name, None) != source[name]:
                setattr(sampler, name, source[name])


def _pass_over(iterator: Any, count: int) -> None:
    """Take ``count`` batches and drop them; of a map-style data set in this process only their indices are drawn."""
    is_indexed = isinstance(iterator, _BaseDataLoaderIter) and (
        iterator._num_workers == 0 and iterator._dataset_kind == _MAP_STYLE
    )
    take = iterator._next_index if is_indexed else iterator.__next__
    for index in range(count):
        try:
            take()
        except StopIteration:
            raise IntegrityError(
                f"the data ended after {index} batches, the snapshot had used {count}; give it the same data as before the "
                "restart",
                reason="wrong_loader",
            ) from None
