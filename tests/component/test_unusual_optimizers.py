"""Optimizers that keep their state as few do: a restart goes on bit for bit, or is refused by name before training begins."""

from __future__ import annotations

import collections
import copy
import logging
import types
from collections.abc import Callable, Iterator
from typing import Any, Self

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

import backstay
from backstay.errors import IntegrityError, UsageError
from tests.kit.local_daemon import LocalDaemon
from tests.kit.wording import refuses

Training = tuple[nn.Module, Any]


@pytest.fixture
def daemon() -> Iterator[LocalDaemon]:
    with LocalDaemon() as running:
        yield running


class Sam(Optimizer):
    """Shares its groups with an inner optimizer, which has a state of its own (davda54/sam)."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, {"rho": 0.05, **options})
        self.base_optimizer = SGD(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"]):
            self.state[parameter]["old"] = parameter.detach().clone()
            parameter.add_(parameter.grad, alpha=self.param_groups[0]["rho"])
        with torch.enable_grad():
            closure()
        for parameter in (p for group in self.param_groups for p in group["params"]):
            parameter.copy_(self.state[parameter]["old"])
        self.base_optimizer.step()


class Lookahead(Optimizer):
    """Never calls torch's constructor; slow weights are its own, all else is the inner optimizer's."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.state = collections.defaultdict(dict)
        self.counter = 0
        for parameter in (p for group in self.param_groups for p in group["params"]):
            self.state[parameter]["slow"] = parameter.detach().clone()

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    def state_dict(self) -> dict[str, Any]:
        slow = {index: keys["slow"] for index, keys in enumerate(self.state.values())}
        return {"slow": slow, "base": self.optimizer.state_dict(), "counter": self.counter}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.optimizer.step()
        self.counter += 1
        for parameter, keys in self.state.items() if self.counter % 3 == 0 else ():
            keys["slow"].lerp_(parameter, 0.5)
            parameter.copy_(keys["slow"])


class Larc:
    """A façade that is no Optimizer and shows the inner one's state and groups (apex)."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optim = optimizer

    state = property(lambda self: self.optim.state)
    param_groups = property(lambda self: self.optim.param_groups)

    def step(self, closure: Any = None) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"]):
            parameter.grad.mul_(0.5)
        self.optim.step()


class Warmup:
    """A part with a state of its own."""

    def __init__(self) -> None:
        self.passed = 0

    def state_dict(self) -> dict[str, Any]:
        return {"passed": self.passed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.passed = state["passed"]


class Warmed(SGD):
    """Its ``state_dict()`` has attributes and parts beside torch's two keys (Ranger21, SPAM, LOMO)."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.warmup = Warmup()
        self.total = 0
        self.norms = {"all": torch.zeros(())}

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(), "warmup": self.warmup.state_dict(), "total": self.total, "norms": self.norms
        }  # fmt: skip

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.total += 1
        self.warmup.passed += 2
        for parameter in (p for group in self.param_groups for p in group["params"]):
            self.norms["all"].add_(parameter.grad.norm())
            parameter.grad.mul_(self.total / (self.warmup.passed + 1) / (1 + self.norms["all"]))
        super().step()


class Cached(Optimizer):
    """Holds on to the dictionaries and nested tensors of its state from the beginning (Shampoo, foreach caches)."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01})
        self.cache: list[Any] = []
        for parameter in self.param_groups[0]["params"]:
            keys = self.state[parameter]
            keys["moment"] = torch.zeros_like(parameter)
            keys["inner"] = {"squares": [torch.zeros_like(parameter)], "count": 0}
            self.cache.append((parameter, keys, keys["moment"], keys["inner"], keys["inner"]["squares"][0]))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter, keys, moment, inner, square in self.cache:
            moment.mul_(0.9).add_(parameter.grad)
            square.mul_(0.99).addcmul_(parameter.grad, parameter.grad)
            inner["count"] += 1
            keys["late"] = keys.get("late", 0) + 1
            parameter.addcdiv_(moment, square.sqrt() + 1e-3, value=-0.01 / (inner["count"] + keys["late"]))


class Sharing(SGD):
    """State that refers to other state, to a parameter, and is one tensor for all; made at the first step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        parameters = self.param_groups[0]["params"]
        if "time" not in self.state[parameters[0]]:
            time, last = torch.zeros(1), parameters[-1]
            for parameter in parameters:
                keys = self.state[parameter]
                keys["time"], keys["lists"], keys["next"] = time, [keys["momentum_buffer"], time], last
            self.state["totals"] = {parameter: torch.zeros(()) for parameter in parameters}
        self.state[parameters[0]]["time"].add_(1)
        for parameter in parameters:
            buffer, time = self.state[parameter]["lists"]
            buffer.mul_(0.97)
            self.state["totals"][parameter] += time.sum()
            parameter.mul_(1 - 1e-3 * time * (1 + self.state["totals"][parameter]))
            parameter.add_(self.state[parameter]["next"].sum(), alpha=1e-4)


class Turned(Optimizer):
    """Keeps factors that are column-major: a product of them rounds otherwise in row-major order (SOAP)."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            keys = self.state[parameter]
            rows = parameter.grad.reshape(len(parameter), -1)
            if "basis" not in keys:
                generator = torch.Generator().manual_seed(1)
                keys["basis"] = torch.linalg.qr(torch.randn(2 * [rows.shape[0]], generator=generator))[0].t()
                keys["bases"] = [torch.randn(2 * [rows.shape[1]], generator=generator).t()]
            turned = keys["basis"] @ rows @ keys["bases"][0]
            parameter.sub_(turned.reshape(parameter.shape), alpha=1e-4)


MAKERS: dict[str, Callable[[nn.Module], Any]] = {
    "sam": lambda m: Sam(m.parameters(), lr=0.05, momentum=0.9),
    "lookahead": lambda m: Lookahead(SGD(m.parameters(), lr=0.05, momentum=0.9)),
    "larc": lambda m: Larc(SGD(m.parameters(), lr=0.05, momentum=0.9)),
    "warmed": lambda m: Warmed(m.parameters(), lr=0.05, momentum=0.9),
    "cached": lambda m: Cached(m.parameters()),
    "sharing": lambda m: Sharing(m.parameters(), lr=0.05, momentum=0.9),
    "turned": lambda m: Turned(m.parameters()),
}


def build(kind: str, seed: int) -> Training:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(33, 65), nn.Tanh(), nn.Linear(65, 17))
    return model, MAKERS[kind](model)


def train(training: Training, times: int = 1) -> None:
    model, optimizer = training
    for _ in range(times):
        data = torch.rand(4, 33)

        def closure(data: torch.Tensor = data) -> torch.Tensor:
            model.zero_grad()
            loss = model(data).square().mean()
            loss.backward()
            return loss

        closure()
        optimizer.step(closure)


def keep(daemon: LocalDaemon, training: Training) -> backstay.Snapshotter:
    return backstay.Snapshotter(*training, run_id="r", socket=daemon.socket_path)


def train_kept(daemon: LocalDaemon, training: Training, times: int) -> None:
    """Restore, then take so many steps with a snapshot after each."""
    with keep(daemon, training) as keeper:
        begin = keeper.restore().step
        if begin == 0:
            torch.manual_seed(3)
        for step in range(begin + 1, begin + times + 1):
            train(training)
            assert keeper.snapshot(step).state == "started"
            keeper.fence()
            assert keeper.wait_committed()
        assert keeper.stats().last_committed_step == begin + times, keeper.stats().last_problem


@pytest.mark.parametrize("kind", MAKERS)
def test_an_optimizer_of_this_kind_goes_on_bit_for_bit_after_each_of_two_restarts(
    kind: str, daemon: LocalDaemon
) -> None:
    undisturbed = build(kind, 0)
    torch.manual_seed(3)
    train(undisturbed, 13)
    for seed, times in ((0, 4), (11, 4), (12, 5)):
        training = build(kind, seed)
        train_kept(daemon, training, times)
    for (name, expected), found in zip(undisturbed[0].named_parameters(), training[0].parameters(), strict=True):
        assert torch.equal(expected, found), name


def test_state_that_is_made_anew_lies_in_memory_as_it_did(daemon: LocalDaemon) -> None:
    saved = build("turned", 0)
    train_kept(daemon, saved, 2)
    again = build("turned", 1)
    with keep(daemon, again) as keeper:
        assert keeper.restore().step == 2
    for left, right in zip(saved[1].state.values(), again[1].state.values(), strict=True):
        for one, other in ((left["basis"], right["basis"]), (left["bases"][0], right["bases"][0])):
            assert torch.equal(one, other)
            assert one.stride() == other.stride()


class Merging:
    """Two optimizers as one: ``state`` is put together at each access (VeOmni)."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.parts = {f"part{index}": optimizer for index, optimizer in enumerate(optimizers)}

    param_groups = property(lambda self: [group for part in self.parts.values() for group in part.param_groups])
    state = property(lambda self: {key: found for part in self.parts.values() for key, found in part.state.items()})

    def step(self, closure: Any = None) -> None:
        for part in self.parts.values():
            part.step()


def test_a_facade_that_merges_states_is_refused_at_the_first_restore_with_what_to_give(daemon: LocalDaemon) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    merged = Merging(*(SGD(layer.parameters(), lr=0.1, momentum=0.9) for layer in model))
    with (
        keep(daemon, (model, merged)) as keeper,
        refuses(UsageError, "unsupported_optimizer", "optimizer.state", "optimizer.parts"),
    ):
        keeper.restore()
    with backstay.Snapshotter(
        model, merged.parts.values(), run_id="r", socket=daemon.socket_path
    ) as keeper:  # what the message says to do
        assert keeper.restore().outcome == "NONE"


class Apart(SGD):
    """Keeps masks by the id of a parameter, which only its ``state_dict()`` knows how to name."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "masks": {0: torch.ones(2)}}


class Mute(SGD):
    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError("use distributed_state_dict()")


class Quantized(torch.Tensor):
    """A tensor without memory of its own, as torchao's are."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        return made

    def __init__(self, codes: torch.Tensor) -> None:
        self.codes = codes

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


def of_torchao(model: nn.Module) -> Optimizer:
    kind = type("AdamW8bit", (SGD,), {"__module__": "torchao.optim.adam"})
    made: Optimizer = kind(model.parameters(), lr=0.1)
    return made


def with_quantized_state(model: nn.Module) -> Optimizer:
    made = SGD(model.parameters(), lr=0.1)
    made.state[model.weight]["codes"] = Quantized(torch.zeros(3, 3, dtype=torch.uint8))
    return made


def with_an_object(model: nn.Module) -> Optimizer:
    made = SGD(model.parameters(), lr=0.1)
    made.param_groups[0]["projector"] = types.SimpleNamespace(rank=3)
    return made


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: Apart(m.parameters(), lr=0.1), r"optimizer is a Apart whose state_dict\(\) has 'masks' beside"),
        (lambda m: Mute(m.parameters(), lr=0.1), r"a Mute whose state_dict\(\) raises NotImplementedError: use dist"),
        (of_torchao, r"AdamW8bit, which \(torchao\) .* use one of torch.optim, or bitsandbytes' 8-bit"),
        (with_quantized_state, r"state.weight.codes is a Quantized, .* use an optimizer or layer that keeps plain"),
        (with_an_object, r"groups.0.projector is a types.SimpleNamespace, .* use an optimizer of those"),
    ],
)
def test_an_optimizer_that_no_snapshot_could_hold_is_refused_before_training_begins(
    make: Callable[[Any], Optimizer], words: str, daemon: LocalDaemon
) -> None:
    model = nn.Linear(3, 3)
    with keep(daemon, (model, make(model))) as keeper, pytest.raises(UsageError, match=words):
        keeper.restore()


def test_an_inner_optimizer_of_another_kind_is_refused_and_nothing_is_loaded(daemon: LocalDaemon) -> None:
    train_kept(daemon, build("sam", 0), 2)
    other = build("sam", 1)
    other[1].base_optimizer = torch.optim.Adam(other[1].param_groups)
    before = copy.deepcopy(other[0].state_dict())
    with (
        keep(daemon, other) as keeper,
        refuses(IntegrityError, "wrong_optimizers", 1),
    ):
        keeper.restore()
    assert all(map(torch.equal, before.values(), other[0].state_dict().values()))


def test_layers_frozen_since_the_snapshot_or_thawed_are_named_in_the_result_and_the_log(
    daemon: LocalDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    def make(*, frozen: int) -> Training:
        model = nn.Sequential(nn.Linear(33, 5), nn.Linear(5, 5), nn.Linear(5, 5))
        model[frozen].requires_grad_(False)
        return model, SGD(model.parameters(), lr=0.1, momentum=0.9)

    train_kept(daemon, make(frozen=0), 1)
    with caplog.at_level(logging.WARNING, logger="backstay"):
        with keep(daemon, make(frozen=0)) as keeper:
            assert keeper.restore().message == ""
        assert not caplog.records
        with keep(daemon, make(frozen=1)) as keeper:
            message = keeper.restore().message
    stopped = (
        "2 parameters were trained when the snapshot was taken and are frozen here (requires_grad=False): 1.weight"
    )
    begun = "2 parameters were frozen when the snapshot was taken and are trained here (requires_grad=True): 0.weight"
    assert stopped in message
    assert begun in message
    assert [text.split(": ", 2)[2] for text in caplog.messages] == [
        stopped.removeprefix("") + ", 1.bias",
        begun + ", 0.bias",
    ]


def test_a_step_replaced_on_the_object_is_captured_from_the_first_snapshot_on(
    daemon: LocalDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    training = build("warmed", 0)
    model, optimizer = training

    @torch.no_grad()
    def step(self: Any, closure: Any = None) -> None:  # apex's amp: runs none of torch's hooks
        for parameter in model.parameters():
            parameter.sub_(parameter.grad, alpha=0.1)

    optimizer.step = types.MethodType(step, optimizer)
    with keep(daemon, training) as keeper, caplog.at_level(logging.WARNING, logger="backstay"):
        keeper.restore()
        for number in range(1, 6):
            train(training)
            assert keeper.snapshot(number).state == "started"
            expected = copy.deepcopy(model.state_dict())
            assert keeper.wait_committed()
        assert keeper.stats().last_committed_step == 5
    (said,) = caplog.messages
    assert "Warmed.step was replaced on the object" in said
    again = build("warmed", 1)
    with keep(daemon, again) as keeper:
        assert keeper.restore().step == 5
    assert all(map(torch.equal, expected.values(), again[0].state_dict().values()))


def test_a_replaced_step_that_calls_the_former_one_is_captured_in_the_background(daemon: LocalDaemon) -> None:
    training = build("warmed", 0)
    former = training[1].step
    training[1].step = types.MethodType(lambda _, closure=None: former(closure), training[1])
    with keep(daemon, training) as keeper:
        keeper.restore()
        for step in (1, 3):
            train(training)
            assert keeper.snapshot(step).state == "started"
            assert (
                keeper.snapshot(step + 1).reason == f"no optimizer step since snapshot({step})"
            )  # it waits for its fence
            torch.optim.lr_scheduler.StepLR(training[1], 5)  # torch's own schedulers replace it too
        assert not keeper.stats().is_synchronous
