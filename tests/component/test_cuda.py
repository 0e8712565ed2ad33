"""Capture and restore of tensors on a GPU: registered slots, the side stream, the fence as a stream wait."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import backstay
from tests.kit.local_daemon import LocalDaemon

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture
def daemon() -> Iterator[LocalDaemon]:
    with LocalDaemon() as running:
        yield running


def build(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 2048), nn.BatchNorm1d(2048), nn.Dropout(0.2), nn.Linear(2048, 8)).cuda()
    options: dict[str, bool] = {
        "fused": {"fused": True},
        "foreach": {"foreach": True},
        "capturable": {"capturable": True},
    }[name]
    return model, torch.optim.AdamW(model.parameters(), **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    optimizer.zero_grad()
    loss = model(torch.rand(32, 256, device="cuda")).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    state = [value for keys in optimizer.state.values() for value in keys.values() if isinstance(value, torch.Tensor)]
    return [*model.state_dict().values(), *state]


@pytest.mark.parametrize("name", ["fused", "foreach", "capturable"])
def test_a_restored_gpu_run_goes_on_bit_for_bit(daemon: LocalDaemon, name: str) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    model, optimizer = build(name)
    with backstay.Snapshotter(model, optimizer, run_id=name, socket=daemon.socket_path, check_every=1) as keeper:
        keeper.restore()
        for step in range(6):
            train(model, optimizer)
            assert keeper.snapshot(step + 1).state == "started"
        keeper.fence()
        assert keeper.wait_committed()
        stats = keeper.stats()
        assert (stats.committed, stats.is_synchronous) == (6, False)
    expected = [train(model, optimizer) for _ in range(3)]
    again, fresh = build(name)
    with backstay.Snapshotter(again, fresh, run_id=name, socket=daemon.socket_path) as keeper:
        assert keeper.restore().step == 6
    found = [train(again, fresh) for _ in range(3)]
    assert torch.equal(torch.stack(expected), torch.stack(found))
    for a, b in zip(everything(model, optimizer), everything(again, fresh), strict=True):
        assert a.device == b.device
        assert torch.equal(a, b)


def test_attaching_does_not_change_a_gpu_run(daemon: LocalDaemon) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    results = []
    for is_attached in (False, True):
        model, optimizer = build("fused")
        keeper = (
            backstay.Snapshotter(model, optimizer, run_id="same", socket=daemon.socket_path) if is_attached else None
        )
        if keeper is not None:
            keeper.restore()
        for step in range(5):
            train(model, optimizer)
            if keeper is not None:
                keeper.snapshot(step + 1)
        results.append([t.clone() for t in everything(model, optimizer)])
        if keeper is not None:
            keeper.close()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_slots_are_registered_and_copied_without_a_host_wait(daemon: LocalDaemon) -> None:
    model = nn.ParameterList([nn.Parameter(torch.rand(16 * 1024 * 1024, device="cuda")) for _ in range(8)])  # 512 MiB
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with backstay.Snapshotter(model, optimizer, run_id="large", socket=daemon.socket_path, check_every=0) as keeper:
        keeper.restore()
        for step in range(6):
            for parameter in model:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            keeper.snapshot(step + 1)
        keeper.fence()
        assert keeper.wait_committed()
        assert keeper.stats().committed == 6
        assert keeper._capturer is not None
        (copier,) = keeper._capturer._filler.copiers.values()
        assert copier._registered
        assert all(copier._registered.values())


def test_a_gpu_update_past_the_fence_is_discarded(daemon: LocalDaemon) -> None:
    model, optimizer = build("fused")
    with backstay.Snapshotter(model, optimizer, run_id="torn", socket=daemon.socket_path) as keeper:
        keeper.restore()
        train(model, optimizer)
        keeper.snapshot(1)
        assert keeper._capturer is not None
        capture = keeper._capturer.capture
        assert capture is not None
        assert capture.settled.wait(20)
        model[0].weight.data.mul_(2)
        train(model, optimizer)
        assert keeper.wait_committed()
        assert keeper.stats().is_synchronous
        assert daemon.committed_steps("default/torn") == []


def test_the_digest_of_a_gpu_tensor_is_that_of_its_bytes_and_goes_through_a_window() -> None:
    from backstay.restore.gate_statements import WINDOW_BYTES, crc_of

    host = torch.randn(WINDOW_BYTES // 4 + 4096, 4)
    assert crc_of(host.cuda()) == crc_of(host)
    assert crc_of(host.cuda().t().contiguous().t()) == crc_of(host)


def test_nan_in_a_gpu_gradient_after_a_restore_is_told_and_stops_nothing(daemon: LocalDaemon) -> None:
    for part in ("first", "second"):
        model, optimizer = build("fused")
        with backstay.Snapshotter(model, optimizer, run_id="nan", socket=daemon.socket_path) as keeper:
            base = keeper.restore().step
            train(model, optimizer)
            if part == "second":
                next(model.parameters()).grad[0, 0] = float("nan")  # type: ignore[index]
                optimizer.step()
            keeper.snapshot(base + 1)
            keeper.fence()
            keeper.wait_committed()
    told = daemon.runs["default/nan"].distrusted
    assert [(rank, step) for rank, step, _ in told] == [(0, 3)]
    assert "gradients of 0.weight" in told[0][2]
