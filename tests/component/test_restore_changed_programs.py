"""A program that changed between two starts: what fits comes back, everything else is refused by name and costs nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import backstay
from backstay.errors import IntegrityError
from tests.kit.local_daemon import LocalDaemon
from tests.kit.wording import refuses

Training = tuple[nn.Module, Any]


@pytest.fixture
def daemon() -> Iterator[LocalDaemon]:
    with LocalDaemon() as running:
        yield running


class Note:
    """An extra."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


class Experts(nn.Module):
    """Of four experts only two ever get a gradient; the gate is tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.head = nn.Linear(6, 4, bias=False)
        self.head.weight = self.gate.weight

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.head(self.experts[0](value) + self.experts[2](value)).square().sum()


def keep(daemon: LocalDaemon, training: Training, **extra: Any) -> backstay.Snapshotter:
    return backstay.Snapshotter(*training, run_id="r", socket=daemon.socket_path, extra=extra)


def train(training: Training) -> None:
    model, optimizers = training
    many = optimizers if isinstance(optimizers, list) else [optimizers]
    for optimizer in many:
        optimizer.zero_grad()
    model(torch.rand(3, 6)).backward()
    for optimizer in many:
        optimizer.step()


def save(daemon: LocalDaemon, training: Training, *, steps: int = 2, **extra: Any) -> Training:
    with keep(daemon, training, **extra) as keeper:
        first = keeper.restore().step
        for step in range(first + 1, first + steps + 1):
            train(training)
            assert keeper.snapshot(step).state == "started"
            keeper.fence()
            assert keeper.wait_committed()
    return training


def experts(make: Callable[[nn.Module], Any] = lambda m: torch.optim.AdamW(m.parameters(), lr=0.1)) -> Training:
    model = Experts()
    return model, make(model)


def check_equal(left: Training, right: Training) -> None:
    """Parameters, state and hyper-parameters, by name."""
    assert {n: p.tolist() for n, p in left[0].named_parameters()} == {
        n: p.tolist() for n, p in right[0].named_parameters()
    }
    names = [{id(p): n for n, p in t[0].named_parameters()} for t in (left, right)]
    found = []
    for (_, optimizers), named in zip((left, right), names, strict=True):
        many = optimizers if isinstance(optimizers, list) else [optimizers]
        found.append({
            (i, named[id(p)]): (
                {k: v.tolist() if torch.is_tensor(v) else v for k, v in o.state.get(p, {}).items()},
                {k: v for k, v in group.items() if k != "params"},
            )
            for i, o in enumerate(many)
            for group in o.param_groups
            for p in group["params"]
        })  # fmt: skip
    assert found[0] == found[1]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


def renamed() -> Training:
    model = Experts()
    model.specialists = model.experts
    del model.experts
    return model, torch.optim.AdamW(model.parameters())


def without_an_expert() -> Training:
    model = Experts()
    del model.experts[3]
    return model, torch.optim.AdamW(model.parameters())


def in_half() -> Training:
    model = Experts().bfloat16()
    return model, torch.optim.AdamW(model.parameters())


def with_one_more() -> Training:
    model = Experts()
    model.experts.append(nn.Linear(6, 6))
    return model, torch.optim.AdamW(model.parameters())


def untied() -> Training:
    model = Experts()
    model.head.weight = nn.Parameter(torch.zeros(4, 6))
    return model, torch.optim.AdamW(model.parameters())


def part_of_it() -> Training:
    model = Experts()
    return model, torch.optim.AdamW(model.experts.parameters())


CHANGES: dict[str, tuple[Callable[[], Training], str, str]] = {
    "other_class": (lambda: experts(sgd), "is a SGD, the snapshot's is a AdamW", "Build a AdamW"),
    "renamed": (renamed, r"missing here .*model\.experts.*missing in the snapshot .*model\.specialists", "new run_id"),
    "missing": (without_an_expert, "missing here .*model.experts.3.bias", "new run_id"),
    "dtype": (in_half, "torch.float32 in the snapshot, .*torch.bfloat16 here", "new run_id"),
    "larger": (with_one_more, "missing in the snapshot .*model.experts.4.bias", "new run_id"),
    "untied": (untied, "unexpected .*head.weight", "new run_id"),
    "frozen_part": (part_of_it, "missing here .*gate.weight", "new run_id"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_program_that_changed_is_refused_by_name_and_the_snapshot_is_still_there(
    daemon: LocalDaemon, change: str
) -> None:
    build, message, advice = CHANGES[change]
    saved = save(daemon, experts(), note=Note(5))
    other = build()
    before = copy.deepcopy(dict(other[0].named_parameters()))
    with keep(daemon, other, note=Note()) as keeper, pytest.raises(IntegrityError, match=message) as caught:
        keeper.restore()
    assert "nothing was loaded" in str(caught.value)
    assert advice in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in other[0].named_parameters())
    many = other[1] if isinstance(other[1], list) else [other[1]]
    assert not any(optimizer.state for optimizer in many)
    again, note = experts(), Note()
    with keep(daemon, again, note=note) as keeper:
        assert keeper.restore().step == 2
    check_equal(saved, again)
    assert note.value == 5


def test_fewer_extras_are_refused_and_the_snapshot_is_still_there(daemon: LocalDaemon) -> None:
    saved = save(daemon, experts(), note=Note(5))
    with keep(daemon, experts()) as keeper, refuses(IntegrityError, "wrong_extras"):
        keeper.restore()
    again = experts()
    with keep(daemon, again, note=Note()) as keeper:
        assert keeper.restore().step == 2
    check_equal(saved, again)


def test_groups_in_another_order_keep_their_own_hyper_parameters(daemon: LocalDaemon) -> None:
    def groups(model: Any) -> list[dict[str, Any]]:
        return [
            {"params": [model.gate.weight], "lr": 0.01},
            {"params": list(model.experts.parameters()), "lr": 0.02, "weight_decay": 0.5},
        ]

    saved = save(daemon, experts(lambda m: torch.optim.AdamW(groups(m))))
    again = experts(lambda m: torch.optim.AdamW([{**g, "lr": 9.0} for g in reversed(groups(m))]))
    with keep(daemon, again) as keeper:
        assert keeper.restore().step == 2
    check_equal(saved, again)


def test_several_optimizers_in_another_order_are_refused(daemon: LocalDaemon) -> None:
    def two(model: Any) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(model.experts.parameters()), torch.optim.AdamW([model.gate.weight])]

    save(daemon, experts(two))
    swapped = experts(lambda m: two(m)[::-1])
    with keep(daemon, swapped) as keeper, refuses(IntegrityError, "wrong_parameters", 0):
        keeper.restore()


def test_a_parameter_of_two_optimizers_gets_the_state_of_each(daemon: LocalDaemon) -> None:
    def two(model: Any) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(model.parameters()), torch.optim.SGD([model.gate.weight], lr=0.01, momentum=0.9)]

    saved = save(daemon, experts(two))
    again = experts(two)
    with keep(daemon, again) as keeper:
        assert keeper.restore().step == 2
    check_equal(saved, again)


def test_idle_experts_have_no_state_before_and_after_and_what_was_there_is_gone(daemon: LocalDaemon) -> None:
    saved = save(daemon, experts())
    idle = saved[0].experts[1].weight
    assert idle not in saved[1].state
    again = experts()
    for parameter in again[0].parameters():
        parameter.grad = torch.ones_like(parameter)
    again[1].step()
    with keep(daemon, again) as keeper:
        assert keeper.restore().step == 2
    assert again[0].experts[1].weight not in again[1].state
    check_equal(saved, again)


def test_frozen_after_the_snapshot_and_thawed_before_the_next(daemon: LocalDaemon) -> None:
    saved = save(daemon, experts())
    again = experts()
    for parameter in again[0].experts.parameters():
        parameter.requires_grad_(False)
    with keep(daemon, again) as keeper:
        assert keeper.restore().step == 2
        check_equal(saved, again)
        train(again)
        keeper.snapshot(3)
        keeper.fence()
        assert keeper.wait_committed()
        again[0].requires_grad_(True)
        train(again)
        keeper.snapshot(4)
        keeper.fence()
        assert keeper.wait_committed()
    third = experts()
    with keep(daemon, third) as keeper:
        assert keeper.restore().step == 4
    check_equal(again, third)


def test_compiled_and_plain_are_the_same_model(daemon: LocalDaemon) -> None:
    model = Experts()
    saved = save(daemon, (torch.compile(model, backend="eager"), torch.optim.AdamW(model.parameters())))
    plain = experts()
    with keep(daemon, plain) as keeper:
        assert keeper.restore().step == 2
    check_equal((model, saved[1]), plain)
    inner = Experts()
    inner.compile(backend="eager")
    again = inner, torch.optim.AdamW(inner.parameters())
    with keep(daemon, again) as keeper:
        assert keeper.restore().step == 2
    check_equal(plain, again)


def test_an_optimizer_without_state_comes_back_without_state(daemon: LocalDaemon) -> None:
    saved = experts()
    with keep(daemon, saved) as keeper:
        keeper.restore()
        saved[1].step()
        keeper.snapshot(1)
        keeper.fence()
        assert keeper.wait_committed()
    again = experts()
    train(again)
    with keep(daemon, again) as keeper:
        assert keeper.restore().step == 1
    assert not again[1].state
    check_equal(saved, again)


def test_parameters_replaced_while_training_are_captured_as_they_are(daemon: LocalDaemon) -> None:
    saved = experts()
    with keep(daemon, saved) as keeper:
        keeper.restore()
        train(saved)
        keeper.snapshot(1)
        keeper.fence()
        assert keeper.wait_committed()
        layer = saved[0].experts[0]
        old, new = layer.weight, nn.Parameter(layer.weight.detach() * 2)
        layer.weight = new
        params = saved[1].param_groups[0]["params"]
        params[[p is old for p in params].index(True)] = new
        saved[1].state[new] = saved[1].state.pop(old)
        train(saved)
        keeper.snapshot(2)
        keeper.fence()
        assert keeper.wait_committed()
    again = experts()
    with keep(daemon, again) as keeper:
        assert keeper.restore().step == 2
    check_equal(saved, again)


class Odd(nn.Module):
    """Tensors that lie in memory in every way."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        rows = torch.randn(40, 30, generator=draw)
        self.turned = nn.Parameter(rows.t())
        self.slice = nn.Parameter(torch.randn(50, 50, generator=draw)[5:40:3, 2::7])
        self.expanded = nn.Parameter(torch.randn(1, 7, generator=draw).expand(5, 7), requires_grad=False)
        self.number = nn.Parameter(torch.randn((), generator=draw))
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.complex = nn.Parameter(torch.randn(5, 4, dtype=torch.complex64, generator=draw).t())
        self.large = nn.Parameter(torch.randn(3, dtype=torch.complex128, generator=draw))
        self.conjugate = nn.Parameter(torch.randn(3, dtype=torch.complex64, generator=draw).conj(), requires_grad=False)
        self.register_buffer("eight", torch.randn(9, 9, generator=draw).to(torch.float8_e4m3fn).t())
        self.register_buffer("flags", torch.rand(17, generator=draw) > 0.5)
        self.register_buffer("wide", torch.randn(1, 3, generator=draw).expand(4, 3))

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        values = [p for p in self.parameters() if p.requires_grad]
        return torch.stack([p.abs().square().sum().double() for p in values]).sum()


def test_tensors_that_lie_in_memory_in_any_way_come_back_bit_for_bit(daemon: LocalDaemon) -> None:
    model = Odd(1)
    saved = save(daemon, (model, torch.optim.AdamW(model.parameters())))
    other = Odd(2)
    again = other, torch.optim.AdamW(other.parameters())
    strides = [t.stride() for t in (*other.parameters(), *other.buffers())]
    with keep(daemon, again) as keeper:
        assert keeper.restore().step == 2
    assert [t.stride() for t in (*other.parameters(), *other.buffers())] == strides
    check_equal(saved, again)
    assert all(
        torch.equal(a.float() if a.dtype.itemsize == 1 else a, b.float() if b.dtype.itemsize == 1 else b)
        for a, b in zip(model.buffers(), other.buffers(), strict=True)
    )
    train(saved)
    train(again)
    check_equal(saved, again)


def muon_and_adam(model: Any) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    return [torch.optim.Muon(matrices, lr=0.05), torch.optim.AdamW([p for p in model.parameters() if p.ndim != 2])]


def test_complaint_2_muon_beside_another_optimizer_goes_on_as_the_same_model(daemon: LocalDaemon) -> None:
    saved = save(daemon, experts(muon_and_adam))
    again = experts(muon_and_adam)
    with keep(daemon, again) as keeper:
        assert keeper.restore().step == 2
    check_equal(saved, again)
    for training in (saved, again):
        torch.manual_seed(9)
        train(training)
        train(training)
    check_equal(saved, again)


def test_complaint_2_an_optimizer_that_would_begin_anew_is_refused(daemon: LocalDaemon) -> None:
    save(daemon, experts(muon_and_adam))
    for make in (
        lambda m: muon_and_adam(m)[::-1],
        lambda m: [torch.optim.SGD(g.param_groups[0]["params"], lr=0.1, momentum=0.9) for g in muon_and_adam(m)],
        lambda m: torch.optim.AdamW(m.parameters()),
    ):
        other = experts(make)
        before = [p.detach().clone() for p in other[0].parameters()]
        with keep(daemon, other) as keeper, refuses(IntegrityError, "wrong_optimizers"):
            keeper.restore()
        assert all(torch.equal(a, b) for a, b in zip(before, other[0].parameters(), strict=True))


def test_complaint_4_what_is_written_after_snapshot_returned_is_in_no_snapshot(daemon: LocalDaemon) -> None:
    """The next optimizer step begins at once, and waits for nothing that the user calls."""
    training = experts()
    expected: dict[str, torch.Tensor] = {}
    with keep(daemon, training) as keeper:
        keeper.restore()
        for step in range(1, 8):
            train(training)
            if keeper.snapshot(step).state == "started":
                started, expected = step, {n: p.detach().clone() for n, p in training[0].named_parameters()}
        train(training)
        assert keeper.wait_committed()
        assert keeper.stats().last_committed_step == started
    again = experts()
    with keep(daemon, again) as keeper:
        assert keeper.restore().step == started
    assert all(torch.equal(value, expected[name]) for name, value in again[0].named_parameters())


class Scaled(nn.Linear):
    """Keeps a scale that is neither parameter nor buffer, as FP8 modules do."""

    def get_extra_state(self) -> Any:
        raise AssertionError("its code must not run")


def test_state_that_only_the_module_knows_is_said_to_be_left_out(
    daemon: LocalDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), Scaled(2, 2))
    with keep(daemon, (model, torch.optim.AdamW(model.parameters()))) as keeper:
        keeper.restore()
    assert "1 have a get_extra_state(), which is not captured" in caplog.text
