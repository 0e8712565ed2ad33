"""restore(): everything comes back, and whatever does not fit or cannot be verified is refused by name."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import backstay
from backstay.errors import IntegrityError, UnavailableError, UsageError
from backstay.trainer import local_tensors
from tests.kit.local_daemon import LocalDaemon
from tests.kit.wording import refuses


@pytest.fixture
def daemon() -> Iterator[LocalDaemon]:
    with LocalDaemon() as running:
        yield running


class Counter:
    """A loader's position, with a tensor and a tuple in it."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"position": 0, "shuffle": torch.arange(3), "span": (1, 2)}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def build(width: int = 30, *, lr: Any = 0.01) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(20, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())  # column-major
    return model, torch.optim.AdamW(model.parameters(), lr=lr, amsgrad=True)


def keep(
    daemon: LocalDaemon, model: nn.Module, optimizer: Any, run_id: str = "r", **extra: Any
) -> backstay.Snapshotter:
    return backstay.Snapshotter(model, optimizer, run_id=run_id, socket=daemon.socket_path, extra=extra)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = model(torch.rand(8, 20) * random.random()).square().sum()
    loss.backward()
    optimizer.step()
    return loss.item()


def save(daemon: LocalDaemon, **extra: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Three steps, of which the last is committed."""
    torch.manual_seed(1)
    model, optimizer = build()
    with keep(daemon, model, optimizer, **extra) as keeper:
        keeper.restore()
        for step in (1, 2, 3):
            train(model, optimizer)
            keeper.snapshot(step)
        keeper.fence()
        assert keeper.wait_committed()
    return model, optimizer


def test_state_comes_back_bit_for_bit_with_generators_extras_and_hyper_parameters(daemon: LocalDaemon) -> None:
    counter = Counter()
    counter.state["position"] = 17
    model, optimizer = save(daemon, loader=counter)
    optimizer.param_groups[0]["lr"] = 0.5  # after the snapshot: must not come back
    fresh_model, fresh_optimizer = build()
    fresh_counter = Counter()
    with keep(daemon, fresh_model, fresh_optimizer, loader=fresh_counter) as keeper:
        result = keeper.restore()
    assert (result.step, result.outcome, result.attempt, result.base_attempt) == (3, "EXACT", 2, 1)
    assert result.sources == {0: "local"}
    for a, b in zip(model.state_dict().values(), fresh_model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(model.parameters(), fresh_model.parameters(), strict=True):
        assert optimizer.state[a].keys() == fresh_optimizer.state[b].keys()
        for key in optimizer.state[a]:
            assert torch.equal(optimizer.state[a][key], fresh_optimizer.state[b][key])
            assert optimizer.state[a][key].device == fresh_optimizer.state[b][key].device
    assert fresh_optimizer.param_groups[0]["lr"] == 0.01
    assert fresh_counter.state["position"] == 17
    assert fresh_counter.state["span"] == (1, 2)
    assert torch.equal(fresh_counter.state["shuffle"], torch.arange(3))
    here = torch.rand(4)
    with keep(daemon, fresh_model, fresh_optimizer, loader=fresh_counter) as keeper:
        keeper.restore()
    assert torch.equal(torch.rand(4), here), "generators are set, whatever was drawn meanwhile"


def test_a_new_run_starts_at_step_0_and_is_not_touched(daemon: LocalDaemon) -> None:
    model, optimizer = build()
    before, drawn = model[2].weight.clone(), torch.get_rng_state()
    with keep(daemon, model, optimizer, run_id="new") as keeper:
        result = keeper.restore()
    assert (result.step, result.outcome) == (0, "NONE")
    assert torch.equal(model[2].weight, before)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not optimizer.state


def test_tensors_are_written_in_place_where_there_are_some(daemon: LocalDaemon) -> None:
    model, optimizer = save(daemon)
    addresses = [p.data_ptr() for p in model.parameters()] + [s["exp_avg"].data_ptr() for s in optimizer.state.values()]
    with keep(daemon, model, optimizer) as keeper:
        keeper.restore()
    assert addresses == [p.data_ptr() for p in model.parameters()] + [
        s["exp_avg"].data_ptr() for s in optimizer.state.values()
    ]


def test_a_learning_rate_that_is_a_tensor_stays_the_same_tensor(daemon: LocalDaemon) -> None:
    for index in range(2):
        model, optimizer = build(lr=torch.tensor(0.25))
        rate = optimizer.param_groups[0]["lr"]
        with keep(daemon, model, optimizer, run_id="lr") as keeper:
            keeper.restore()
            if index == 0:
                train(model, optimizer)
                rate.fill_(0.125)
                keeper.snapshot(1)
                keeper.fence()
                assert keeper.wait_committed()
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.125


def test_scalar_and_nested_optimizer_state_comes_back(daemon: LocalDaemon) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(5)
        model = nn.Linear(20, 2)
        return model, torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        data = torch.rand(8, 20)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(data).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    model, optimizer = make()
    with keep(daemon, model, optimizer, run_id="lbfgs") as keeper:
        keeper.restore()
        step(model, optimizer)
        keeper.snapshot(1)
        keeper.fence()
        assert keeper.wait_committed()
    step(model, optimizer)
    again, fresh = make()
    with keep(daemon, again, fresh, run_id="lbfgs") as keeper:
        assert keeper.restore().step == 1
    step(again, fresh)
    assert torch.equal(model.weight, again.weight)


class Averaging(torch.optim.SGD):
    """Keeps an average that is a number until there is something to average."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["average"] = state["average"] * 0.9 + parameter.grad.mean() if "average" in state else 0.0


def test_a_number_that_becomes_a_tensor_between_two_snapshots_comes_back(daemon: LocalDaemon) -> None:
    model = nn.Linear(20, 2)
    optimizer = Averaging(model.parameters(), lr=0.1, momentum=0.9)
    with keep(daemon, model, optimizer) as keeper:
        keeper.restore()
        for step in (1, 2):
            train(model, optimizer)
            keeper.snapshot(step)
    fresh = nn.Linear(20, 2)
    fresh_optimizer = Averaging(fresh.parameters(), lr=0.1, momentum=0.9)
    with keep(daemon, fresh, fresh_optimizer) as keeper:
        assert keeper.restore().step == 2
    expected = optimizer.state[model.weight]["average"]
    assert isinstance(expected, torch.Tensor)
    assert torch.equal(fresh_optimizer.state[fresh.weight]["average"], expected)


def test_state_that_its_description_does_not_know_is_refused(
    daemon: LocalDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_tensors.Holdings, "is_current", lambda _: True)  # as if the change above was not noticed
    model = nn.Linear(20, 2)
    optimizer = Averaging(model.parameters(), lr=0.1)
    with keep(daemon, model, optimizer) as keeper:
        keeper.restore()
        train(model, optimizer)
        keeper.snapshot(1)
        train(model, optimizer)
        keeper.snapshot(2)
    with (
        keep(daemon, model, optimizer) as keeper,
        refuses(IntegrityError, "state_not_mappable"),
    ):
        keeper.restore()


def test_where_the_script_has_new_tensors_made_does_not_matter(daemon: LocalDaemon) -> None:
    model, optimizer = build()
    with keep(daemon, model, optimizer) as keeper:
        keeper.restore()
        train(model, optimizer)
        with torch.device("meta"):  # stands in for a GPU, whose addresses cannot be written to either
            assert keeper.snapshot(1).state == "started"
    fresh_model, fresh_optimizer = build()
    with keep(daemon, fresh_model, fresh_optimizer) as keeper, torch.device("meta"):
        assert keeper.restore().step == 1
    assert all(map(torch.equal, model.state_dict().values(), fresh_model.state_dict().values()))


def test_another_model_is_refused_by_the_names_that_differ(daemon: LocalDaemon) -> None:
    save(daemon)
    for model in (build(31)[0], nn.Sequential(nn.Linear(20, 30))):
        before = [p.clone() for p in model.parameters()]
        with keep(daemon, model, torch.optim.AdamW(model.parameters())) as keeper:
            with refuses(IntegrityError, "wrong_model", "model.") as caught:
                keeper.restore()
            assert caught.value.reason == "wrong_model"
            with refuses(UsageError, "not_restored"):
                keeper.snapshot(1)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "nothing was loaded"


def test_other_optimizers_groups_and_extras_are_refused(daemon: LocalDaemon) -> None:
    save(daemon)
    model, _ = build()
    split = torch.optim.AdamW([{"params": model[0].parameters()}, {"params": model[2].parameters()}])
    with keep(daemon, model, split) as keeper, refuses(IntegrityError, "wrong_parameters", 0):
        keeper.restore()
    two = [torch.optim.AdamW(model[0].parameters()), torch.optim.AdamW(model[2].parameters())]
    with (
        keep(daemon, model, two) as keeper,
        refuses(IntegrityError, "wrong_optimizers", 1, 2),
    ):
        keeper.restore()
    model, optimizer = build()
    refused = pytest.raises(IntegrityError, match=r"has extras \[\], this Snapshotter \['loader'\]")
    with keep(daemon, model, optimizer, loader=Counter()) as keeper, refused:
        keeper.restore()


@pytest.mark.parametrize("where", ["header", "parameter", "state"])
def test_a_flipped_byte_is_refused_with_its_chunk(daemon: LocalDaemon, where: str) -> None:
    save(daemon)
    shard = daemon.shard("default/r", 3)
    tensors = {tensor["name"]: tensor for tensor in shard.manifest["tensors"]}
    offset = {
        "header": 3000,
        "parameter": tensors["model.2.weight"]["begin"] + 5,
        "state": tensors["rank-00000.state.json"]["begin"] + 40,
    }[where]
    with open(shard.path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    model, optimizer = build()
    with keep(daemon, model, optimizer) as keeper, pytest.raises(IntegrityError, match=r"chunk 0|header"):
        keeper.restore()


def test_a_shard_of_another_run_step_or_attempt_is_refused(daemon: LocalDaemon) -> None:
    save(daemon)
    shard = daemon.shard("default/r", 3)
    for key, value in (("run", "default/other"), ("step", 4), ("attempt", 9)):
        good = shard.manifest[key]
        shard.manifest[key] = value
        model, optimizer = build()
        with (
            keep(daemon, model, optimizer) as keeper,
            refuses(IntegrityError, "wrong_identity"),
        ):
            keeper.restore()
        shard.manifest[key] = good


def test_a_truncated_shard_is_refused(daemon: LocalDaemon) -> None:
    save(daemon)
    path = daemon.shard("default/r", 3).path
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1)
    model, optimizer = build()
    with keep(daemon, model, optimizer) as keeper, refuses(IntegrityError, "truncated"):
        keeper.restore()


def test_without_a_daemon_restore_raises_within_its_deadline(tmp_path: Any) -> None:
    model, optimizer = build()
    nowhere = backstay.Snapshotter(model, optimizer, run_id="r", socket=str(tmp_path / "nobody"))
    with nowhere as keeper, pytest.raises(UnavailableError, match="nobody"):
        keeper.restore(deadline_s=0.5)


def test_state_that_only_pickle_could_store_is_refused_at_the_first_snapshot(daemon: LocalDaemon) -> None:
    counter = Counter()
    counter.state["odd"] = object()
    model, optimizer = build()
    with backstay.Snapshotter(
        model, optimizer, run_id="odd", socket=daemon.socket_path, extra={"loader": counter}, strict=True
    ) as keeper:
        keeper.restore()
        train(model, optimizer)
        with refuses(UsageError, "unsupported_state", "loader.odd", "builtins.object"):
            keeper.snapshot(1)
