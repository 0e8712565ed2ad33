"""State that a snapshot cannot see: kept where it can be, named where it cannot."""

from __future__ import annotations

import collections
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import backstay
from backstay.trainer import uncaptured_state
from backstay.trainer.state import packing, state_file
from tests.kit.local_daemon import LocalDaemon


class Versioned(nn.Module):
    """Of version 2, which keeps the scale itself where version 1 kept its logarithm."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("version", 1) < 2:
            state[f"{prefix}scale"] = state[f"{prefix}scale"].exp()
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def versioned(scale: float) -> nn.Module:
    teacher = nn.Sequential(Versioned())
    nn.init.constant_(teacher[0].scale, scale)
    return teacher


def test_a_module_among_the_extras_is_not_converted_a_second_time() -> None:
    with LocalDaemon() as daemon:
        for scale in (2.0, 0.0):
            model, teacher = nn.Linear(2, 2), versioned(scale)
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            options: dict[str, Any] = {"run_id": "r", "socket": daemon.socket_path, "extra": {"teacher": teacher}}
            with backstay.Snapshotter(model, optimizer, **options) as keeper:
                if keeper.restore().step == 0:
                    keeper.snapshot(1)
                    keeper.fence()
                    assert keeper.wait_committed()
    assert teacher[0].scale.item() == 2.0


class Opaque:
    """Something that a tool packs itself."""


def test_the_versions_of_modules_pass_through_files_and_packed_states() -> None:
    given = versioned(2.0).state_dict()
    file = io.BytesIO()
    state_file.write(file, {"model": given}, name="checkpoint")
    file.seek(0)
    read = state_file.read(file, size_bytes=len(file.getvalue()), label="it")["model"]
    given["opaque"] = Opaque()
    made = packing.pack(given, lambda value: ("Opaque", {}) if isinstance(value, Opaque) else None)
    unpacked = packing.unpack(made.tensors, lambda kind, body: Opaque())
    for found in (read, unpacked):
        assert isinstance(found, collections.OrderedDict)
        assert found._metadata == given._metadata  # type: ignore[attr-defined]
        assert found._metadata["0"] == {"version": 2}  # type: ignore[attr-defined]


class Packs(nn.Linear):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise AssertionError("its code must not run")


class Quantized(nn.Parameter):
    """As bitsandbytes' Params4bit has its scales."""


class Scales:
    def __init__(self) -> None:
        self.absmax = torch.ones(2)


def _quantized() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    weight = Quantized(torch.ones(2, 2), requires_grad=False)
    weight.quant_state, weight.blocksize = Scales(), 64  # type: ignore[attr-defined]
    model[0].weight = weight
    return model


def _hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))

    def adds_more(*_: Any) -> None:
        raise AssertionError("its code must not run")

    model[0]._register_state_dict_hook(adds_more)
    return model


LEFT_OUT = [
    (nn.Sequential(nn.Linear(2, 2), Packs(2, 2)), "1 (Packs has a _save_to_state_dict() of its own)"),
    (_hooked(), "0 (the hook _hooked.<locals>.adds_more runs in its state_dict())"),
    (_quantized(), "0.weight (Quantized: quant_state): tensors that are attributes of a parameter are not captured"),
]


@pytest.mark.parametrize(("model", "words"), LEFT_OUT, ids=["own-save", "hook", "attributes"])
def test_state_that_only_state_dict_shows_is_named(
    model: nn.Module, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with LocalDaemon() as daemon:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with backstay.Snapshotter(model, optimizer, run_id="r", socket=daemon.socket_path) as keeper:
            keeper.restore()
    (record,) = (record for record in caplog.records if "captured" in record.message or "state_dict" in record.message)
    assert words in record.message
    assert "extra={...}" in record.message


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_communication_hook_with_state_is_named_and_one_without_is_not(caplog: pytest.LogCaptureFixture) -> None:
    model = DistributedDataParallel(nn.Linear(2, 2))
    model.register_comm_hook(None, fp16_compress_hook)
    uncaptured_state.warn(model)
    assert not caplog.records
    model = DistributedDataParallel(nn.Linear(2, 2))
    model.register_comm_hook(PowerSGDState(process_group=None), powerSGD_hook)
    uncaptured_state.warn(model)
    assert "(root) has the hook powerSGD_hook with a PowerSGDState" in caplog.text


def test_what_torch_itself_adds_to_modules_is_not_named(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is lost of it, and a warning at every start would not be read any more."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.nn.utils.parametrizations import weight_norm

    model = nn.Sequential(
        checkpoint_wrapper(nn.Linear(2, 2)), weight_norm(nn.Linear(2, 2)), nn.utils.spectral_norm(nn.Linear(2, 2)),
        nn.LazyLinear(2), nn.BatchNorm1d(2), nn.MultiheadAttention(2, 1), torch.compile(nn.Linear(2, 2), backend="eager"),
    )  # fmt: skip
    uncaptured_state.warn(model)
    assert not caplog.records, caplog.text


class Tokens:
    """A packing buffer as Python numbers, or as a tensor."""

    def __init__(self, *, is_tensor: bool) -> None:
        numbers = list(range(300_000))
        self.state: dict[str, Any] = {"buffer": torch.tensor(numbers) if is_tensor else numbers}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


@pytest.mark.parametrize("is_tensor", [False, True], ids=["numbers", "tensor"])
def test_numbers_that_cost_the_training_thread_its_time_are_named_once(
    is_tensor: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    extra = {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3), "tokens": Tokens(is_tensor=is_tensor)}
    with (
        LocalDaemon() as daemon,
        backstay.Snapshotter(model, optimizer, run_id="r", socket=daemon.socket_path, extra=extra) as keeper,
    ):
        keeper.restore()
        for step in (1, 2):
            keeper.snapshot(step)
            optimizer.step()
            assert keeper.wait_committed()
    found = [record.message for record in caplog.records if "MiB of each snapshot" in record.message]
    assert len(found) == (0 if is_tensor else 1)
    assert all("most of it is extra 'tokens' (1.9 MiB): keep it in tensors" in message for message in found)
