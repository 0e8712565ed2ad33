"""What trainers do to a keeper: code of theirs that raises, interrupts, forks, exits, and state that is not what it seems."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import backstay
from backstay.errors import IntegrityError, UsageError
from backstay.protocol import messages
from tests.kit.local_daemon import LocalDaemon
from tests.kit.wording import refuses


@pytest.fixture
def daemon() -> Iterator[LocalDaemon]:
    with LocalDaemon() as running:
        yield running


class Training:
    """A small model and its loop."""

    def __init__(self, daemon: LocalDaemon, *, model: nn.Module | None = None, **options: Any) -> None:
        torch.manual_seed(0)
        self.model: Any = model or nn.Linear(20, 2)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters())
        self.keeper = backstay.Snapshotter(self.model, self.optimizer, run_id="r", socket=daemon.socket_path, **options)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.rand(8, 20)).sum().backward()
        self.optimizer.step()

    def run(self, first: int, last: int) -> list[str]:
        states = []
        for step in range(first, last):
            self.step()
            states.append(self.keeper.snapshot(step + 1).state)
        return states

    def settle(self) -> None:
        self.keeper.fence()
        assert self.keeper.wait_committed(20)


class Extra:
    """What a user hands over; ``state`` may be a function that raises."""

    def __init__(self, state: Any = None) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state() if callable(self.state) else self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def raise_error() -> Any:
    raise RuntimeError("the loader is between two epochs")


def test_an_extra_that_raises_costs_its_snapshot_not_the_run(
    daemon: LocalDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    extra = Extra({"position": 1})
    training = Training(daemon, extra={"loader": extra})
    training.keeper.restore()
    assert training.run(0, 1) == ["started"]
    extra.state = raise_error
    with caplog.at_level(logging.WARNING, logger="backstay"):
        assert training.run(1, 4) == ["refused"] * 3
    assert caplog.text.count("between two epochs") == 1
    extra.state = {"position": 2}
    assert training.run(4, 5) == ["started"]
    training.settle()
    assert daemon.committed_steps("default/r") == [5]
    training.keeper.close()


def test_an_extra_that_no_tensor_copy_can_take_costs_its_snapshot_only(daemon: LocalDaemon) -> None:
    extra = Extra({"t": torch.eye(3).to_sparse()})
    training = Training(daemon, extra={"loader": extra})
    training.keeper.restore()
    assert training.run(0, 2) == ["refused"] * 2
    training.keeper.close()


def test_an_interrupted_fence_commits_nothing_torn(daemon: LocalDaemon) -> None:
    training = Training(daemon)
    training.keeper.restore()
    training.run(0, 3)  # the first two are checked, the next is not
    training.settle()
    daemon.is_frozen = True  # the reservation hangs, the fence waits
    training.step()
    training.keeper.snapshot(5)  # not the step that was reserved ahead
    assert training.keeper._capturer is not None
    capture = training.keeper._capturer.capture
    assert capture is not None
    assert not capture.is_checked
    began = capture.began.wait

    def interrupt(_timeout: float | None = None) -> bool:
        capture.began.wait = began  # type: ignore[method-assign]
        raise KeyboardInterrupt

    capture.began.wait = interrupt  # type: ignore[method-assign,assignment]
    with pytest.raises(KeyboardInterrupt):
        training.step()
    daemon.is_frozen = False
    training.step()  # the user caught it and goes on
    assert training.keeper.wait_committed(20)
    assert 5 not in daemon.committed_steps("default/r")
    training.keeper.close()


def test_a_fence_whose_check_fails_neither_raises_nor_blocks_later_snapshots(
    daemon: LocalDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    training = Training(daemon)
    training.keeper.restore()
    training.run(0, 1)
    assert training.keeper._capturer is not None
    capture = training.keeper._capturer.capture
    assert capture is not None
    assert capture.settled.wait(10)
    capture.slot = None  # the check cannot be made
    with caplog.at_level(logging.WARNING, logger="backstay"):
        training.run(1, 2)
    assert "snapshot of step 1" in caplog.text
    training.settle()
    assert daemon.committed_steps("default/r") == [2]
    training.keeper.close()


def test_every_thread_that_steps_an_optimizer_waits_for_the_copy(daemon: LocalDaemon) -> None:
    training = Training(daemon, max_wait_s=30.0)
    training.keeper.restore()
    daemon.is_frozen = True
    training.step()
    training.keeper.snapshot(1)
    threads = [threading.Thread(target=training.keeper.fence) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(0.2)
    assert all(thread.is_alive() for thread in threads), "one went through while the other waited"
    daemon.is_frozen = False
    for thread in threads:
        thread.join(20)
    training.keeper.close()


def test_extras_whose_tensors_have_the_same_dotted_name_keep_their_own(daemon: LocalDaemon) -> None:
    state = {
        "a": {"b": torch.tensor([1.0])},
        "a.b": torch.tensor([2.0]),
        1: torch.tensor([3.0]),
        "1": torch.tensor([4.0]),
    }
    training = Training(daemon, extra={"loader": Extra(state)})
    training.keeper.restore()
    training.run(0, 1)
    training.settle()
    training.keeper.close()
    extra = Extra()
    again = Training(daemon, extra={"loader": extra})
    assert again.keeper.restore().step == 1
    found = extra.state
    assert [found["a"]["b"].item(), found["a.b"].item(), found[1].item(), found["1"].item()] == [1, 2, 3, 4]
    again.keeper.close()


class Lazy(nn.Module):
    """Has a buffer that calibration makes in the middle of a run."""

    def __init__(self, scale: torch.Tensor | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(20, 2)
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)  # type: ignore[no-any-return]


def test_a_buffer_that_appears_during_the_run_is_captured_and_never_dropped_silently(
    daemon: LocalDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    training = Training(daemon, model=Lazy())
    training.keeper.restore()
    training.run(0, 2)
    training.model.scale = torch.tensor([7.0])
    with caplog.at_level(logging.WARNING, logger="backstay"):
        training.run(2, 4)
    assert caplog.text.count("a restart must build the model as it is now") == 1
    training.settle()
    training.keeper.close()
    with refuses(IntegrityError, "wrong_model", "model.scale"):
        Training(daemon, model=Lazy()).keeper.restore()
    again = Training(daemon, model=Lazy(torch.zeros(1)))
    assert again.keeper.restore().step == 4
    assert again.model.scale.item() == 7.0
    again.keeper.close()


def test_a_model_that_changed_its_dtype_during_the_run_is_restored_as_what_it_became(daemon: LocalDaemon) -> None:
    training = Training(daemon)
    training.keeper.restore()
    training.run(0, 1)
    training.model.double()
    training.optimizer.state.clear()
    torch.set_default_dtype(torch.float64)
    try:
        training.run(1, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    training.settle()
    training.keeper.close()
    again = Training(daemon, model=nn.Linear(20, 2).double())
    assert again.keeper.restore().step == 3
    assert torch.equal(again.model.weight, training.model.weight)
    again.keeper.close()


def test_optimizer_state_that_turns_from_none_into_a_tensor_is_captured(daemon: LocalDaemon) -> None:
    class Late(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    state["average"] = None if "average" not in state else p.detach().clone()
            return result

    def build() -> tuple[nn.Linear, torch.optim.Optimizer, backstay.Snapshotter]:
        model = nn.Linear(20, 2)
        optimizer = Late(model.parameters(), lr=0.1)
        return model, optimizer, backstay.Snapshotter(model, optimizer, run_id="r", socket=daemon.socket_path)

    model, optimizer, keeper = build()
    keeper.restore()
    for step in (1, 2, 3):
        optimizer.zero_grad()
        model(torch.rand(8, 20)).sum().backward()
        optimizer.step()
        keeper.snapshot(step)
    keeper.fence()
    assert keeper.wait_committed()
    keeper.close()
    again, optimizer_2, keeper = build()
    assert keeper.restore().step == 3
    average = optimizer_2.state[again.weight]["average"]
    assert torch.equal(average, optimizer.state[model.weight]["average"])
    keeper.close()


def test_state_of_a_parameter_that_was_replaced_does_not_end_snapshots(daemon: LocalDaemon) -> None:
    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for p in self.param_groups[0]["params"]:
                self.state[p]["count"] = self.state[p].get("count", 0) + 1
            return super().step(closure)

    training = Training(daemon)
    training.optimizer = Counting(training.model.parameters(), lr=0.1)
    training.keeper = backstay.Snapshotter(training.model, training.optimizer, run_id="r", socket=daemon.socket_path)
    training.keeper.restore()
    training.run(0, 1)
    training.keeper.fence()
    grown = nn.Parameter(torch.rand(3, 20))
    training.model.weight, training.model.bias = grown, nn.Parameter(torch.rand(3))
    training.optimizer.param_groups[0]["params"][:] = training.model.parameters()
    assert training.run(1, 3) == ["started"] * 2
    training.settle()
    assert daemon.committed_steps("default/r") == [3]
    training.keeper.close()


def test_an_expanded_buffer_is_restored(daemon: LocalDaemon) -> None:
    class Expanded(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.linear = nn.Linear(20, 2)
            self.register_buffer("mask", torch.full((1, 3), value).expand(4, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)  # type: ignore[no-any-return]

    training = Training(daemon, model=Expanded(5.0))
    training.keeper.restore()
    training.run(0, 1)
    training.settle()
    training.keeper.close()
    again = Training(daemon, model=Expanded(0.0))
    assert again.keeper.restore().step == 1
    assert torch.equal(again.model.mask, torch.full((4, 3), 5.0))
    again.keeper.close()


def test_a_forked_child_cannot_restore_and_does_not_wait(daemon: LocalDaemon) -> None:
    training = Training(daemon)
    training.keeper.restore()
    training.run(0, 2)
    training.settle()
    assert training.keeper._capturer is not None
    read_end, write_end = os.pipe()
    with training.keeper._capturer.background._wake:  # the fork comes while the session's thread may hold it
        pid = os.fork()
        if pid == 0:
            found: list[object] = []
            guard = threading.Timer(5, os._exit, (1,))
            guard.start()
            spare = [os.open("/dev/null", os.O_RDONLY) for _ in range(30)]
            found.append(training.keeper.wait_committed(60))
            try:
                training.keeper.restore(deadline_s=0.5)
            except UsageError as error:
                found.append(error.reason)
            training.keeper.stats()
            training.keeper.finish()
            for fd in spare:
                os.fstat(fd)  # nobody closed a number that is somebody else's by now
            os.write(write_end, repr(found).encode())
            os._exit(0)
    os.close(write_end)
    text = os.read(read_end, 1000).decode()
    os.close(read_end)
    os.waitpid(pid, 0)
    assert text == "[True, 'forked']"
    training.run(2, 3)
    training.settle()
    assert daemon.committed_steps("default/r") == [3]
    training.keeper.close()


def test_a_strict_keeper_that_raises_while_it_closes_is_closed(daemon: LocalDaemon) -> None:
    training = Training(daemon, strict=True, max_wait_s=0.2)
    training.keeper.restore()
    daemon.kill()
    training.run(0, 1)
    with pytest.raises(backstay.BackstayError):
        training.keeper.finish()
    assert not training.optimizer._optimizer_step_pre_hooks
    assert not [t for t in threading.enumerate() if t.name.startswith("backstay-")]


LAST_WORDS = """
import sys, torch, backstay
model = torch.nn.Linear(2000, 2000)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
keeper = backstay.Snapshotter(model, optimizer, run_id="r", socket=sys.argv[1])
keeper.restore()
keeper.snapshot(1)
"""


def test_a_process_that_ends_right_after_a_snapshot_leaves_it_committed(daemon: LocalDaemon) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LAST_WORDS, daemon.socket_path], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == "backstay: new run default/r\n"
    assert daemon.committed_steps("default/r") == [1]


def test_a_daemon_without_memory_is_told_of_once(daemon: LocalDaemon, caplog: pytest.LogCaptureFixture) -> None:
    training = Training(daemon)
    training.keeper.restore()
    daemon.is_full = True
    with caplog.at_level(logging.WARNING, logger="backstay"):
        training.run(0, 6)
        training.settle()
    told = [r.getMessage() for r in caplog.records if "no room" in r.getMessage()]
    assert len(told) <= 2, told  # the session's line, and at most the step's
    daemon.is_full = False
    training.run(6, 7)
    training.settle()
    assert daemon.committed_steps("default/r") == [7]
    training.keeper.close()


def test_a_tensor_without_memory_of_its_own_is_refused_by_name(daemon: LocalDaemon) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model = nn.Linear(20, 2)
    model.weight = nn.Parameter(TwoTensor(torch.rand(2, 20), torch.rand(2, 20)))  # type: ignore[no-untyped-call]
    with pytest.raises(UsageError, match=r"model\.weight .*TwoTensor"):
        Training(daemon, model=model).keeper.restore()


@pytest.mark.parametrize("name", ["ZeroRedundancyOptimizer", "PostLocalSGDOptimizer"])
def test_an_optimizer_whose_replicas_are_none_is_refused_by_name(daemon: LocalDaemon, name: str) -> None:
    model = nn.Linear(20, 2)
    kind = type(name, (torch.optim.SGD,), {})  # torch's want a process group
    keeper = backstay.Snapshotter(model, kind(model.parameters()), run_id="r", socket=daemon.socket_path)
    with refuses(UsageError, "unsupported_optimizer", name):
        keeper.restore()
    keeper.close()


def test_a_model_on_several_gpus_of_one_process_is_refused() -> None:
    from backstay.trainer import local_tensors

    tensors = local_tensors.collect(nn.Linear(2, 2), [], rank=0).tensors
    gpus: list[Any] = [SimpleNamespace(device=torch.device("cuda", index)) for index in (0, 1)]
    spread = [dataclasses.replace(tensor, local=gpu) for tensor, gpu in zip(tensors, gpus, strict=True)]
    with refuses(UsageError, "unsupported_module", "model.weight", 0, "model.bias", 1):
        local_tensors._refuse_several_gpus(spread)
    local_tensors._refuse_several_gpus(spread[:1])


class Generous(LocalDaemon):
    """Sends a descriptor with every answer, asked for or not."""

    def _answer(self, attach: messages.Attach, message: Any) -> tuple[Any, tuple[int, ...]]:
        reply, fds = super()._answer(attach, message)
        return reply, fds or (os.open("/dev/null", os.O_RDONLY),)


def test_descriptors_nobody_asked_for_are_closed() -> None:
    with Generous() as daemon:
        daemon.hold_slots = True
        training = Training(daemon, max_wait_s=0.2)
        training.keeper.restore()
        counts = []
        for first in (0, 5, 10):
            training.run(first, first + 5)
            training.settle()
            counts.append(sum(os.readlink(f"/proc/self/fd/{fd}") == "/dev/null" for fd in _own_fds()))
        training.keeper.close()
    assert counts[0] == counts[-1], counts


def _own_fds() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]


class Foreign(LocalDaemon):
    """After the restore, somebody else listens on the socket: whatever comes is answered with other text."""

    is_foreign = False

    def _answer(self, attach: messages.Attach, message: Any) -> tuple[Any, tuple[int, ...]]:
        if self.is_foreign:
            for connection in list(self._connections):
                connection.sendall(b"\x00\x00\x00\x05hello")
        return super()._answer(attach, message)

    def _attach(self, attach: messages.Attach) -> messages.Attached:
        if self.is_foreign:
            raise IntegrityError("220 mail.example.org ESMTP")
        return super()._attach(attach)


def test_a_foreign_server_on_the_socket_does_not_disturb_training(caplog: pytest.LogCaptureFixture) -> None:
    with Foreign() as daemon:
        training = Training(daemon, max_wait_s=0.3)
        training.keeper.restore()
        training.run(0, 2)
        training.settle()
        daemon.is_foreign = True
        with caplog.at_level(logging.WARNING, logger="backstay"):
            training.run(2, 12)
            training.settle()
        assert len(caplog.records) < 6, caplog.text
        daemon.is_foreign = False
        steps = iter(range(12, 100_000))
        end = time.monotonic() + 20
        while daemon.committed_steps("default/r")[-1] < 12:
            assert time.monotonic() < end, "it never attached to the real daemon again"
            training.run(step := next(steps), step + 1)
        training.keeper.close()


def test_a_masked_array_is_refused_and_not_stripped_of_its_mask() -> None:
    numpy = pytest.importorskip("numpy")
    from backstay.trainer.state import json_codec

    with pytest.raises(UsageError, match=r"loader\.m is a numpy.*MaskedArray"):
        json_codec.encode({"m": numpy.ma.array([1, 2], mask=[0, 1])}, "loader", {})
