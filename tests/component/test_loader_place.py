"""DataLoaders in ``extra`` and plain values: a training that is cut anywhere goes on as the one that never was."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import backstay
from backstay.errors import IntegrityError, UsageError
from tests.kit.local_daemon import LocalDaemon
from tests.kit.wording import refuses

EPOCHS, SAMPLES, BATCH = 3, 10, 2


@pytest.fixture
def daemon() -> Iterator[LocalDaemon]:
    with LocalDaemon() as running:
        yield running


class Noisy(torch.utils.data.Dataset[torch.Tensor]):
    """Draws from the generator of the process for each item, as augmentation does."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((4,), float(index)) + torch.rand(4) / 8


class Noiseless(Noisy):
    """Draws nothing: what workers that outlive a pass have drawn is known to nobody."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((4,), float(index))


class Stream(IterableDataset[torch.Tensor]):
    """A stream that knows how far it is."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.at < SAMPLES:
            self.at += 1
            yield torch.full((4,), float(self.at)) + torch.rand(4) / 8
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def plain() -> Any:
    return DataLoader(Noisy(), batch_size=BATCH, shuffle=True)


def stateful() -> Any:
    return StatefulDataLoader(Noisy(), batch_size=BATCH, shuffle=True)


def with_workers() -> Any:
    return StatefulDataLoader(Noisy(), batch_size=BATCH, shuffle=True, num_workers=1, multiprocessing_context="fork")


def with_kept_workers() -> Any:
    return DataLoader(
        Noiseless(),
        batch_size=BATCH,
        shuffle=True,
        num_workers=1,
        multiprocessing_context="fork",
        persistent_workers=True,
    )


def stateful_with_kept_workers() -> Any:
    return StatefulDataLoader(
        Noiseless(),
        batch_size=BATCH,
        shuffle=True,
        num_workers=1,
        multiprocessing_context="fork",
        persistent_workers=True,
    )


def stream() -> Any:
    return StatefulDataLoader(Stream(), batch_size=BATCH)


def own_generator() -> Any:
    generator = torch.Generator().manual_seed(3)
    return DataLoader(Noisy(), batch_size=BATCH, shuffle=True, generator=generator)


def distributed() -> Any:
    sampler: Any = DistributedSampler(range(SAMPLES), num_replicas=1, rank=0, seed=1)
    return DataLoader(Noisy(), batch_size=BATCH, sampler=sampler)


class CutError(Exception):
    """The process ends here."""


Loop = Callable[[Any, Any, Callable[[torch.Tensor], None], int], None]


def over_epochs(keeper: Any, loader: Any, train: Callable[[torch.Tensor], None], step: int) -> None:
    """The loop of the README."""
    for epoch in range(keeper.values.get("epoch", 0), EPOCHS):
        keeper.values["epoch"] = epoch
        if isinstance(loader.sampler, DistributedSampler):
            loader.sampler.set_epoch(epoch)
        for batch in loader:
            train(batch)
            step += 1
            keeper.snapshot(step)


def between_passes(keeper: Any, loader: Any, train: Callable[[torch.Tensor], None], step: int) -> None:
    """A snapshot after each epoch only."""
    for epoch in range(keeper.values.get("epoch", 0), EPOCHS):
        if isinstance(loader.sampler, DistributedSampler):
            loader.sampler.set_epoch(epoch)
        for batch in loader:
            train(batch)
            step += 1
        keeper.values["epoch"] = epoch + 1
        keeper.snapshot(step)


def by_next(keeper: Any, loader: Any, train: Callable[[torch.Tensor], None], step: int) -> None:
    """Steps are counted, and what is random comes before the batch."""
    batches = iter(loader)
    while step < EPOCHS * SAMPLES // BATCH:
        noise = torch.rand(4)
        try:
            batch = next(batches)
        except StopIteration:
            batches = iter(loader)
            batch = next(batches)
        train(batch + noise)
        step += 1
        keeper.snapshot(step)


class Never:
    """No keeper: the run that was never attached."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def snapshot(self, step: int) -> None:
        pass


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(11)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> None:
    model(batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def result(model: nn.Module) -> list[torch.Tensor]:
    return [*(p.detach().clone() for p in model.parameters()), torch.get_rng_state()]


def never_attached(make: Callable[[], Any], loop: Loop) -> list[torch.Tensor]:
    model, optimizer = build()
    loop(Never(), make(), lambda batch: one_step(model, optimizer, batch), 0)
    return result(model)


def cut_and_restarted(daemon: LocalDaemon, make: Callable[[], Any], loop: Loop, cut_at: int) -> list[torch.Tensor]:
    """Cut after ``cut_at`` batches in the first life; the second ends it."""
    run_id = f"{loop.__name__}-{make.__name__}-{cut_at}"
    for life in (0, 1):
        model, optimizer = build()
        torch.manual_seed(100 + life)  # what another start has drawn must not matter
        if life == 0:
            torch.manual_seed(11)
            model, optimizer = build()
        loader = make()
        options: dict[str, Any] = {"socket": daemon.socket_path, "extra": {"loader": loader}}
        with backstay.Snapshotter(model, optimizer, run_id=run_id, **options) as keeper:
            step = keeper.restore().step
            trained = iter(range(1_000))

            def train(
                batch: torch.Tensor, life: int = life, trained: Any = trained, own: Any = (model, optimizer)
            ) -> None:
                if life == 0 and next(trained) == cut_at:
                    raise CutError
                one_step(*own, batch)

            if life == 0:
                with pytest.raises(CutError):
                    loop(Settled(keeper), loader, train, step)
            else:
                assert step
                loop(keeper, loader, train, step)
    return result(model)


class Settled:
    """A keeper each of whose snapshots is committed before training goes on."""

    def __init__(self, keeper: backstay.Snapshotter) -> None:
        self._keeper = keeper
        self.values = keeper.values

    def snapshot(self, step: int) -> None:
        assert self._keeper.snapshot(step).state == "started"
        self._keeper.fence()
        assert self._keeper.wait_committed()


EVERYWHERE = [
    (make, over_epochs, cut) for make in (plain, stateful, stream, own_generator, distributed) for cut in (3, 5, 7)
]
OTHERS = [
    (with_workers, over_epochs, 7),
    *((make, over_epochs, cut) for make in (with_kept_workers, stateful_with_kept_workers) for cut in (3, 7)),
    *((make, between_passes, 7) for make in (with_kept_workers, stateful_with_kept_workers)),
    *((make, between_passes, 7) for make in (plain, stateful, stream, own_generator, distributed)),
    *((make, by_next, cut) for make in (plain, stateful) for cut in (3, 5, 7)),
]


@pytest.mark.parametrize(
    ("make", "loop", "cut_at"), [*EVERYWHERE, *OTHERS], ids=lambda value: getattr(value, "__name__", str(value))
)
def test_a_loop_that_was_cut_ends_as_if_it_never_was(
    daemon: LocalDaemon, make: Callable[[], Any], loop: Loop, cut_at: int
) -> None:
    expected = never_attached(make, loop)
    found = cut_and_restarted(daemon, make, loop, cut_at)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("make", [stateful, with_kept_workers])
def test_one_process_goes_back_with_the_iterator_that_it_has(daemon: LocalDaemon, make: Callable[[], Any]) -> None:
    """restore() in mid-training, without a new start of the script: the same iterator yields the same batches again."""
    model, optimizer = build()
    loader = make()
    with backstay.Snapshotter(
        model, optimizer, run_id="back", socket=daemon.socket_path, extra={"loader": loader}
    ) as keeper:
        keeper.restore()
        batches = iter(loader)
        seen = []
        for step in (1, 2, 3, 4):
            seen.append(next(batches))
            one_step(model, optimizer, seen[-1])
            if step <= 2:
                Settled(keeper).snapshot(step)
        assert keeper.restore().step == 2
        again = []
        for _ in range(2):
            again.append(next(batches))
            one_step(model, optimizer, again[-1])
    assert all(torch.equal(a, b) for a, b in zip(seen[2:], again, strict=True))


def test_a_loader_that_was_not_begun_yet_draws_nothing_when_a_snapshot_is_taken(daemon: LocalDaemon) -> None:
    model, optimizer = build()
    extra = {"later": stream(), "loader": plain()}
    with backstay.Snapshotter(model, optimizer, run_id="later", socket=daemon.socket_path, extra=extra) as keeper:
        keeper.restore()
        before = torch.get_rng_state()
        Settled(keeper).snapshot(1)
        assert torch.equal(torch.get_rng_state(), before)
        assert keeper.restore().step == 1
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("make", [plain, stateful])
def test_a_followed_loader_ends_with_its_last_reference(daemon: LocalDaemon, make: Callable[[], Any]) -> None:
    """A garbage collection would end its workers too, but those sleep 5 s first."""
    model, optimizer = build()
    loader = make()
    gc.collect()
    gc.disable()
    try:
        with backstay.Snapshotter(
            model, optimizer, run_id="end", socket=daemon.socket_path, extra={"loader": loader}
        ) as keeper:
            keeper.restore()
            one_step(model, optimizer, next(iter(loader)))
            Settled(keeper).snapshot(1)
        living = weakref.ref(loader)
        del loader
        assert living() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("make", [plain, stateful])
def test_an_iterator_made_before_the_snapshotter_is_refused(daemon: LocalDaemon, make: Callable[[], Any]) -> None:
    loader = make()
    batches = iter(loader)
    model, optimizer = build()
    with refuses(UsageError, "loader_in_use"):
        backstay.Snapshotter(model, optimizer, run_id="late", socket=daemon.socket_path, extra={"loader": loader})
    assert len(list(batches)) == SAMPLES // BATCH


def test_plain_values_come_back_as_they_were_at_the_snapshot(daemon: LocalDaemon) -> None:
    model, optimizer = build()
    with backstay.Snapshotter(model, optimizer, run_id="values", socket=daemon.socket_path) as keeper:
        keeper.restore()
        keeper.values.update(epoch=3, best=0.25, seen={"a": [1, 2]}, mean=torch.ones(2))
        Settled(keeper).snapshot(1)
        keeper.values.update(epoch=4, later=True)
        assert keeper.restore().step == 1
        found = dict(keeper.values)
    assert torch.equal(found.pop("mean"), torch.ones(2))
    assert found == {"epoch": 3, "best": 0.25, "seen": {"a": [1, 2]}}


def test_a_dictionary_that_takes_the_place_of_the_values_is_what_snapshots_hold(daemon: LocalDaemon) -> None:
    model, optimizer = build()
    with backstay.Snapshotter(model, optimizer, run_id="replaced", socket=daemon.socket_path) as keeper:
        keeper.restore()
        keeper.values = own = {"epoch": 3}
        own["epoch"] = 4
        Settled(keeper).snapshot(1)
        own["epoch"] = 5
        assert keeper.restore().step == 1
        assert keeper.values is own
        assert own == {"epoch": 4}
        with refuses(UsageError, "usage", "keeper.values"):
            keeper.values = [3]  # type: ignore[assignment]


def test_a_plain_value_among_the_extras_is_told_its_place() -> None:
    model, optimizer = build()
    with refuses(UsageError, "usage", 3, "keeper.values"):
        backstay.Snapshotter(model, optimizer, run_id="r", extra={"epoch": 3})


def test_an_extra_added_or_removed_in_mid_run_is_restored_without_by_name(daemon: LocalDaemon) -> None:
    """And without being asked nothing is loaded: a mistyped name must not cost state."""
    options: dict[str, Any] = {"run_id": "partial", "socket": daemon.socket_path}
    model, optimizer = build()
    gone = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    with backstay.Snapshotter(model, optimizer, extra={"gone": gone}, **options) as keeper:
        keeper.restore()
        one_step(model, optimizer, torch.ones(2, 4))
        Settled(keeper).snapshot(1)
    expected = result(model)
    model, optimizer = build()
    ema = nn.Linear(2, 2)
    before = ema.weight.detach().clone()
    with backstay.Snapshotter(model, optimizer, extra={"ema": ema}, **options) as keeper:
        for missing_ok in ((), ["ema"], ["gone"]):
            with refuses(IntegrityError, "wrong_extras", "missing_ok"):
                keeper.restore(missing_ok=missing_ok)
        with refuses(UsageError, "usage", "missing_ok"):
            keeper.restore(missing_ok="ema")
        found = keeper.restore(missing_ok=["ema", "gone"])
        assert found.step == 1
        assert found.extras["ema"].startswith("not in the snapshot")
        assert found.extras["gone"].startswith("left in the snapshot")
        Settled(keeper).snapshot(2)
        assert torch.equal(ema.weight, before)
        assert keeper.restore().extras == {"ema": "state of rank 0 of 1"}
    assert all(torch.equal(a, b) for a, b in zip(expected, result(model), strict=True))
