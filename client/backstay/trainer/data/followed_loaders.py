"""DataLoaders among the extras: followed, so that a restarted pass continues with the next batch and draws nothing of its own.

A loader's own ``state_dict()`` is not enough: the iterator that takes it up draws its base seed from the restored generator,
and from then on everything random differs. Must not change what a loader yields.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from backstay.errors import UsageError
from backstay.trainer.data import data_position


class FollowedLoader:
    """An extra: the place of one loader."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        places: list[data_position.Place] = []
        self._position = data_position.Position(lambda: places)
        data_position.release(loader)
        data_position.follow(loader, self._position)
        place = data_position.place_of(loader)
        assert place is not None
        self._place = place
        places.append(place)

    def state_dict(self) -> dict[str, Any]:
        return {**self._place.state(0), "length": _length(self._loader)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Have the next batch, of a new iterator or of one that is there, be the one after the snapshot's."""
        if state["open"]:
            self._position.load([state])
        else:
            self._place.load_between_passes(state)

    def load_scaled(self, state: dict[str, Any]) -> None:
        """As :meth:`load_state_dict`, from a world of another size: as far through a pass of the length that it has here.

        Where ranks divide the samples of one order among them (DistributedSampler), that is where the old ranks were together;
        rounded down to a batch, so that none is left out.
        """
        here, there = _length(self._loader), state.get("length")
        if here is not None and there and "skip" in state:
            state = {**state, "skip": state["skip"] * here // there}
        self.load_state_dict(state)


def is_followed(thing: Any) -> bool:
    """Whether it is a DataLoader whose place backstay keeps; one that reshards its own state does that itself."""
    return (
        isinstance(thing, DataLoader)
        and "__class__" not in type(thing).__dict__
        and not callable(getattr(thing, "load_state_dicts", None))
    )


def follow_all(extra: Mapping[str, Any]) -> dict[str, Any]:
    """``extra`` with each DataLoader replaced by its place.

    Raises:
        UsageError: for a loader that an iterator is reading already: how far it is cannot be known.
    """
    for name, thing in extra.items():
        if is_followed(thing) and _is_being_read(thing):
            raise UsageError(
                f"an iterator of extra {name!r} was made before the Snapshotter, so the batches it has taken are not known; "
                "make the Snapshotter first, then iter(loader)",
                reason="loader_in_use",
            )
    return {name: FollowedLoader(thing) if is_followed(thing) else thing for name, thing in extra.items()}


def refuse(extra: Mapping[str, Any], adapter: str) -> None:
    """Raise UsageError for a DataLoader in the extras of an adapter, which follows its framework's loaders itself."""
    for name, thing in extra.items():
        if is_followed(thing):
            raise UsageError(
                f"extra {name!r} is a {type(thing).__name__}: {adapter} keeps the place of its loaders already; leave it out"
            )


def _length(loader: Any) -> int | None:
    """Batches in a pass; None for a stream of unknown length."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _is_being_read(loader: Any) -> bool:
    if data_position.place_of(loader) is not None or getattr(loader, "_initial_iter_for_state_dict", False):
        return False
    return any(
        issubclass(type(found), _BaseDataLoaderIter)
        and getattr(found, "_index_sampler", None) is loader._index_sampler
        and not getattr(found, "_finished", False)
        for found in gc.get_objects()
    )
